"""The models that vllm_check.py compares: tiny random ones, and the trained small LVLM."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn

from recipes.methods import calibration_batches
from recipes.small_lvlm import model as small_lvlm
from recipes.small_lvlm.data import chosen
from tests import tiny_models


class Subject(NamedTuple):
    """A float model, batches to calibrate with, prompts as vLLM takes them, and the same prompts as transformers takes them."""

    build: Callable[[], nn.Module]
    batches: list[dict[str, Tensor]]
    prompts: list[dict[str, Any]]
    inputs: list[dict[str, Tensor]]
    files: Path | None  # tokenizer and processor


def random_ids(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, 150, (1, 12 + 5 * i), generator=generator)} for i in range(count)]


def outspoken(model: nn.Module) -> nn.Module:
    """Random layers start so small that the last token's embedding decides alone; these count."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            module.weight.data *= 5
    return model


def tiny_qwen2(folder: Path) -> Subject:
    inputs = random_ids(6, seed=1)
    return Subject(lambda: outspoken(tiny_models.qwen2()[0]), random_ids(8, seed=0), [{"ids": x["input_ids"][0].tolist()} for x in inputs], inputs, None)


def tiny_qwen2_vl(folder: Path) -> Subject:
    """Prompts of text, and of pictures of 56 x 56 and 84 x 56, which need no resizing (libraries resize differently)."""
    special = {"<|image_pad|>": tiny_models.IMAGE, "<|video_pad|>": tiny_models.VIDEO, "<|vision_start|>": tiny_models.START, "<|vision_end|>": tiny_models.END}
    named = {i: token for token, i in special.items()}
    backend = Tokenizer(models.WordLevel({named.get(i, f"w{i}"): i for i in range(200)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, additional_special_tokens=list(special), pad_token="w0")
    tokenizer.save_pretrained(folder)
    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 28 * 28, "max_pixels": 112 * 112}
    colours = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    for name, kind in (("preprocessor", "image"), ("video_preprocessor", "video")):
        settings = {f"{kind}_processor_type": f"Qwen2VL{kind.title()}Processor", "processor_class": "Qwen2VLProcessor", **sizes, **colours}
        (folder / f"{name}_config.json").write_text(json.dumps(settings))
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)
    rng = np.random.default_rng(0)
    prompts: list[dict[str, Any]] = []
    inputs = random_ids(3, seed=1)
    prompts += [{"text": tokenizer.decode(x["input_ids"][0], clean_up_tokenization_spaces=False)} for x in inputs]
    for i, size in enumerate([(56, 56), (56, 84), (84, 56)]):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        seen = pixels(images=[Image.open(folder / f"{i}.png")], return_tensors="pt")
        words = f"w{3 + i} w{40 + i} <|vision_start|> {{}} <|vision_end|> w{7 * i + 1} w9 w{120 - i}"
        ids = tokenizer(words.format("<|image_pad|> " * int(seen["image_grid_thw"].prod() // 4)), return_tensors="pt")["input_ids"]
        inputs.append({"input_ids": ids, **seen, "mm_token_type_ids": (ids == tiny_models.IMAGE).int()})
        prompts.append({"text": words.format("<|image_pad|>"), "image": str(folder / f"{i}.png")})
    return Subject(lambda: outspoken(tiny_models.qwen2_vl()[0]), [*random_ids(6, seed=0), tiny_models.qwen2_vl()[1]], prompts, inputs, folder)


def trained_lvlm(folder: Path) -> Subject:
    """The small LVLM under the names that checkpoints of its kind have on the hub (from transformers 5.23 on, new models have others)."""
    shutil.copytree(small_lvlm.WEIGHTS, folder, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    save_file({name.replace("vision_tower.", "vision_tower.vision_model."): t for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    tokenizer, _ = small_lvlm.load(folder)
    asked = [(sample.pixels, question.text) for sample in chosen("test", 4) for question in sample.questions[:2]]
    prompts = []
    for i, (picture, question) in enumerate(asked):
        Image.fromarray(picture).save(folder / f"{i}.png")
        prompts.append({"text": f"<|user|><image> {question}<|assistant|>", "image": str(folder / f"{i}.png")})
    inputs = [small_lvlm.inputs(tokenizer, [picture], [question]) for picture, question in asked]
    return Subject(lambda: small_lvlm.load(folder)[1], calibration_batches(tokenizer, 32), prompts, inputs, folder)


SUBJECTS = {"tiny Qwen2": tiny_qwen2, "tiny Qwen2-VL": tiny_qwen2_vl, "small LVLM": trained_lvlm}
