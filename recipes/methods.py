"""The methods that are compared, each as a config, and the calibration samples of the small LVLM."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torchao.quantization import quantize_
from transformers import PreTrainedTokenizerFast

from recipes.small_lvlm.data import sample
from recipes.small_lvlm.model import inputs
from torchao_qig import Equalize, QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig
from torchao_qig.methods.presets import PRESETS

# Presets of torchao_qig/methods/presets.py, which says what each of them is.
METHODS: dict[str, Callable[..., QIGWeightOnlyConfig]] = {name: partial(QIGWeightOnlyConfig, method=name) for name in PRESETS}
INT8_METHODS: dict[str, Callable[..., QIGWeightOnlyConfig]] = {
    name: partial(QIGInt8DynamicActivationConfig, method=name) for name in ("rtn", "smoothquant", "mbq", "qig-paper", "qig", "default", "default+qig")
} | {"qig-clean": partial(QIGInt8DynamicActivationConfig, steps=[Equalize("qig", propagate_error=True)])}  # errors against full-precision outputs
PAPERS = ("rtn", "awq", "mbq", "qig-paper", "qig", "default")
BEYOND = ("rtn", "awq", "qig", "qig+clip", "gptq", "gptq-modality", "gptaq", "qig+gptq", "default", "default+clip", "default+qig-weights", "default+qig")


def calibration_batches(tokenizer: PreTrainedTokenizerFast, count: int = 128, seed: int = 0, size: int = 16) -> list[dict[str, Tensor]]:
    """Batches of `count` pictures of the calibration split, each with one question. Every other question asks for the caption, since the
    paper's samples are captioned pictures."""
    rng = random.Random(f"calibration {seed}")
    samples = [sample("calibration", seed * count + i) for i in range(count)]
    asked = [one.questions[0] if i % 2 == 0 else rng.choice(one.questions[1:]) for i, one in enumerate(samples)]
    return [
        inputs(tokenizer, [one.pixels for one in samples[i : i + size]], [q.text for q in asked[i : i + size]], [q.answer for q in asked[i : i + size]])
        for i in range(0, count, size)
    ]


def quantized(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, method: str, *, seed: int = 0, count: int = 128, int8_activations: bool = False, **grid: Any
) -> tuple[nn.Module, float]:
    """A quantized copy of the model, and the seconds that quantizing took."""
    start = time.perf_counter()
    model = copy.deepcopy(model)
    make = (INT8_METHODS if int8_activations else METHODS)[method]
    quantize_(model, make(**grid, calib=calibration_batches(tokenizer, count, seed), verbose=False))
    return model.eval(), time.perf_counter() - start
