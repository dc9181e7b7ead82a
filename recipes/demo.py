"""Quantizes the small LVLM that comes with the repository, and prints what quantizing costs and gains.

    torchao-qig demo [--bits 3] [--samples 128] [--pictures 250] [--no-speed]

Compares full precision, rounding to nearest, QIG's scales, and the default (integers chosen by compensation). Prints accuracy,
NLL and KL on test questions that the model has never seen, bytes of the decoder's linears, tokens per second of the compiled
decoder, and the answers to one question about a picture (written to demo.png). Then the default model is saved and loaded again
by plain `from_pretrained`.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import torchao_qig
from benchmarks.timing import paired_seconds
from recipes.evaluate import answer, batches, scores
from recipes.methods import quantized
from recipes.small_lvlm.data import Sample, chosen
from recipes.small_lvlm.model import inputs, load
from torchao_qig import PackedIntTensor


def decoder_bytes(model: nn.Module) -> int:
    """Bytes of the linears in the decoder's blocks."""
    weights = [m.weight for m in model.model.language_model.layers.modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr, operator]
    return sum(w.nbytes_packed() if isinstance(w, PackedIntTensor) else w.numel() * 2 for w in weights)  # 2: as stored, in bfloat16


def as_stored(model: nn.Module) -> nn.Module:
    """A copy of the model in bfloat16. Buffers keep their dtype, as they do on loading, since rotary frequencies would lose digits."""
    model = copy.deepcopy(model)
    kept = [buffer.clone() for buffer in model.buffers()]
    model.to(torch.bfloat16)
    for buffer, value in zip(model.buffers(), kept, strict=True):
        buffer.data = value
    return model


@torch.no_grad()
def tokens_per_second(models: dict[str, nn.Module], repeats: int = 50) -> dict[str, float]:
    """The tokens per second of each model's compiled decoder. Single decode steps are timed, the models taking turns."""
    steps = {name: as_stored(model.model.language_model) for name, model in models.items()}  # type: ignore[union-attr, arg-type]
    for step in steps.values():
        for layer in step.layers:  # type: ignore[union-attr]
            layer.compile(fullgraph=True, dynamic=False)  # one layer's code serves all: compiling a whole decoder takes minutes
    token = torch.tensor([[7]])
    seconds = paired_seconds({name: lambda step=step: step(token, use_cache=False) for name, step in steps.items()}, repeats)
    return {name: 1 / float(np.median(values)) for name, values in seconds.items()}


@torch.no_grad()
def say(model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, sample: Sample, question: str) -> str:
    """The model's greedy answer to a question about the sample's picture."""
    batch = inputs(tokenizer, [sample.pixels], [question])
    new = model.generate(**batch, max_new_tokens=64, do_sample=False)[0, batch["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def drawn(pixels: np.ndarray, width: int = 56) -> str:
    """A picture in colored half blocks, for a terminal."""
    small = np.asarray(Image.fromarray(pixels).resize((width, width), Image.Resampling.BOX))
    rows = zip(small[::2], small[1::2], strict=True)
    cell = "\033[38;2;{};{};{}m\033[48;2;{};{};{}m▀"
    return "\n".join("".join(cell.format(*a, *b) for a, b in zip(up, low, strict=True)) + "\033[0m" for up, low in rows)


def main(bits: int = 3, samples: int = 128, pictures: int = 250, speed: bool = True) -> None:
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch")
    if speed and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        print("no C++ compiler found, which torch.compile needs on a CPU: no speed is measured")
        speed = False

    tokenizer, full = load()
    shown = list(chosen("test", pictures))
    asked = batches(shown, tokenizer)
    reference: list[Tensor] = []
    results = {"full precision": scores(answer(full, asked, keep=reference))}
    models: dict[str, nn.Module] = {"full precision": full}
    took: dict[str, float] = {}
    for label, method in ((f"W{bits} rounded", "rtn"), (f"W{bits} QIG scales", "qig"), (f"W{bits} default", "default")):
        models[label], took[label] = quantized(full, tokenizer, method, count=samples, bits=bits, group_size=128)
        results[label] = scores(answer(models[label], asked, reference))
    print(f"\n{results['full precision']['questions']} test questions; calibrated on {samples} other pictures")

    rate = tokens_per_second(models) if speed else {}
    print(f"{'weights':15} {'accuracy':>9} {'NLL':>8} {'KL':>8} {'decoder MB':>11} {'seconds':>8}" + (f" {'tokens/s':>9}" if rate else ""))
    for name, model in models.items():
        every = results[name]["all"]
        kl = every["kl"][0] if "kl" in every else 0.0
        line = f"{name:15} {100 * every['accuracy'][0]:8.1f}% {every['nll'][0]:8.4f} {kl:8.4f} {decoder_bytes(model) / 1e6:11.2f} {took.get(name, 0.0):8.1f}"
        print(line + (f" {rate[name]:9.0f}" if rate else ""))

    sample = next(one for one in shown if "objects" in one.scene)
    question = next(q for q in sample.questions if q.family == "spatial")
    Image.fromarray(sample.pixels).resize((448, 448), Image.Resampling.NEAREST).save("demo.png")
    print("\n" + (drawn(sample.pixels) if sys.stdout.isatty() else "picture: demo.png"))
    print(f"{question.text}  (right: {question.answer})")
    for name, model in models.items():
        print(f"  {name:15} {say(model, tokenizer, sample, question.text)}")  # type: ignore[arg-type]

    last = as_stored(models[f"W{bits} default"])
    with tempfile.TemporaryDirectory() as directory:
        torchao_qig.save_pretrained(last, directory)
        size = (Path(directory) / "model.safetensors").stat().st_size
        loaded = LlavaOnevisionForConditionalGeneration.from_pretrained(directory)
        with torch.no_grad():
            batch = inputs(tokenizer, [one.pixels for one in shown[:2]], ["describe the picture."] * 2)
            batch["pixel_values"] = batch["pixel_values"].to(loaded.dtype)
            same = torch.equal(loaded(**batch).logits, last(**batch).logits)
    verdict = "bit-identical" if same else "DIFFER"
    print(f"\nsaved ({size / 1e6:.2f} MB, embeddings and vision tower included) and loaded with from_pretrained: logits {verdict}")
    if not same:
        raise SystemExit(1)
