"""The methods that are compared, each as the config that it is, and the calibration samples of the small LVLM."""

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
from torchao_qig import QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig

SCALES: dict[str, Any] = dict(clip=False, compensate=False)  # nothing but equalization scales
GPTQ: dict[str, Any] = dict(compensate=True, repair=0.0, sweeps=0)  # errors passed on, nothing else

# AWQ and MBQ search the same candidates at the same outputs as QIG; what differs is what a token's error counts (and AWQ's loss).
METHODS: dict[str, Callable[..., QIGWeightOnlyConfig]] = {
    "rtn": partial(QIGWeightOnlyConfig, sensitivity=None, **SCALES),
    "awq": partial(QIGWeightOnlyConfig, sensitivity="uniform", loss="mse", **SCALES),
    "mbq": partial(QIGWeightOnlyConfig, sensitivity="modality", **SCALES),
    "qig-paper": QIGWeightOnlyConfig.paper,
    "qig": partial(QIGWeightOnlyConfig, **SCALES),
    # beyond the paper: integers chosen without scales, piece by piece up to the defaults
    "gptq": partial(QIGWeightOnlyConfig, **GPTQ),
    "gptq-modality": partial(QIGWeightOnlyConfig, sensitivity="modality", grid=1, **GPTQ),
    "gptaq": partial(QIGWeightOnlyConfig, **{**GPTQ, "repair": 1.0}),
    "default": QIGWeightOnlyConfig,
    "default+clip": partial(QIGWeightOnlyConfig, clip=True),
    "default+qig-weights": partial(QIGWeightOnlyConfig, sensitivity="qig", grid=1),  # one candidate: no scale
    # the same pieces on top of scales
    "qig+clip": partial(QIGWeightOnlyConfig, clip=True, compensate=False),
    "qig+gptq": partial(QIGWeightOnlyConfig, sensitivity="qig", **GPTQ),
    "default+qig": partial(QIGWeightOnlyConfig, sensitivity="qig"),
}

# With int8 activations: names mean the same, on QIGInt8DynamicActivationConfig.
INT8_METHODS: dict[str, Callable[..., QIGWeightOnlyConfig]] = {
    "rtn": partial(QIGInt8DynamicActivationConfig, sensitivity=None, **SCALES),
    "smoothquant": partial(QIGInt8DynamicActivationConfig, smoothquant=0.5, **SCALES),
    "mbq": partial(QIGInt8DynamicActivationConfig, sensitivity="modality", **SCALES),
    "qig-paper": QIGInt8DynamicActivationConfig.paper,
    "qig": partial(QIGInt8DynamicActivationConfig, sensitivity="qig", **SCALES),
    "qig-clean": partial(QIGInt8DynamicActivationConfig, sensitivity="qig", propagate_error=True, **SCALES),  # against outputs of full precision
    "default": QIGInt8DynamicActivationConfig,
    "default+qig": partial(QIGInt8DynamicActivationConfig, sensitivity="qig"),
}
PAPERS = ("rtn", "awq", "mbq", "qig-paper", "qig", "default")
BEYOND = ("rtn", "awq", "qig", "qig+clip", "gptq", "gptq-modality", "gptaq", "qig+gptq", "default", "default+clip", "default+qig-weights", "default+qig")


def calibration_batches(tokenizer: PreTrainedTokenizerFast, count: int = 128, seed: int = 0, size: int = 16) -> list[dict[str, Tensor]]:
    """`count` pictures of the calibration split, each with one question: the caption for every other one, as the paper's samples
    are captioned pictures."""
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
    """A quantized copy, and the seconds that took."""
    start = time.perf_counter()
    model = copy.deepcopy(model)
    make = (INT8_METHODS if int8_activations else METHODS)[method]
    quantize_(model, make(**grid, calib=calibration_batches(tokenizer, count, seed), verbose=False))
    return model.eval(), time.perf_counter() - start
