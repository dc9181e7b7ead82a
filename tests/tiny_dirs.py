"""Directories as users have them: a tiny random model of each family with its processor, tokenizer and generation config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests import tiny_models
from tests.tiny_models import END, IMAGE, START, VIDEO
from torchao_qig.lvlm.load import images_only

USER, ASSISTANT, STOP, PAD = 194, 195, 196, 0
TILES = {f"<row_{i}_col_{j}>": 150 + 6 * i + j for i in range(1, 5) for j in range(1, 5)}
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PINPOINTS = [[28, 28], [28, 56], [56, 28]]
QWEN = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def tokenizer(special: dict[str, int], **named: str) -> PreTrainedTokenizerFast:
    """One token per printable character, 200 in all; `named`: attributes for special tokens."""
    ids = {"<pad>": PAD, "<|user|>": USER, "<|assistant|>": ASSISTANT, "<|end|>": STOP, "<|system|>": 197, **special}
    characters = {chr(33 + i): 2 + i for i in range(94)} | {"Ġ": 1, "Ċ": 96, "<unk>": 97}  # as byte-level tokenizers write space and newline
    known = {i: token for token, i in (characters | ids).items()}
    vocabulary = {known.get(i, f"<filler{i}>"): i for i in range(200)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(list(ids))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<|end|>", unk_token="<unk>", extra_special_tokens=named)


def _qwen(processor: type, patch: int) -> Any:
    pixels = (2 * patch) ** 2
    images = hf.Qwen2VLImageProcessor(patch_size=patch, min_pixels=pixels, max_pixels=16 * pixels)
    return images_only(processor)(images, tokenizer(QWEN), chat_template=TEMPLATE.replace("IMAGE", QWEN_IMAGE))


def llava_onevision() -> Any:
    sides = {"height": 28, "width": 28}
    images = hf.LlavaOnevisionImageProcessor(size=sides, crop_size=sides, image_grid_pinpoints=PINPOINTS)
    words = tokenizer({"<image>": IMAGE, "<video>": VIDEO})
    made = images_only(hf.LlavaOnevisionProcessor)
    return made(images, words, chat_template=TEMPLATE.replace("IMAGE", "<image>"), num_image_tokens=4, vision_feature_select_strategy="full")


def internvl() -> Any:
    images = hf.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4)
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    words = tokenizer({"<IMG_CONTEXT>": IMAGE, "<video>": VIDEO, "<img>": START, "</img>": END}, **names)
    return images_only(hf.InternVLProcessor)(images, words, image_seq_length=4, chat_template=TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>"))


def smolvlm() -> Any:
    images = hf.SmolVLMImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    words = tokenizer({"<image>": IMAGE, "<fake_token_around_image>": START, "<global-img>": END, "<end_of_utterance>": 198, **TILES})
    return images_only(hf.SmolVLMProcessor)(images, words, None, image_seq_len=4, chat_template=TEMPLATE.replace("IMAGE", "<image>"))


def gemma3() -> Any:
    images = hf.Gemma3ImageProcessor(size={"height": 28, "width": 28})
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    words = tokenizer({"<image_soft_token>": IMAGE, "<start_of_image>": START, "<end_of_image>": END}, **names)
    return images_only(hf.Gemma3Processor)(images, words, image_seq_length=4, chat_template=TEMPLATE.replace("IMAGE", "<start_of_image>"))


def text() -> Any:
    words = tokenizer({})
    words.chat_template = TEMPLATE
    return words


PROCESSORS = {
    "llava_onevision": llava_onevision,
    "qwen2_vl": lambda: _qwen(hf.Qwen2VLProcessor, 14),
    "qwen2_5_vl": lambda: _qwen(hf.Qwen2_5_VLProcessor, 14),
    "qwen3_vl": lambda: _qwen(hf.Qwen3VLProcessor, 16),
    "internvl": internvl,
    "smolvlm": smolvlm,
    "gemma3": gemma3,
    "qwen2": text,
}


def directory(family: str, path: Path, dtype: Any = None) -> Path:
    """Write a checkpoint directory; `family`: a name in `PROCESSORS`."""
    model, _ = getattr(tiny_models, family)(*(() if dtype is None else (dtype,)))
    if hasattr(model.config, "image_grid_pinpoints"):
        model.config.image_grid_pinpoints = PINPOINTS
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, STOP
    model.save_pretrained(path)
    PROCESSORS[family]().save_pretrained(path)
    return path
