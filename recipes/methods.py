"""The methods that are compared, each as the config that it is, and the calibration samples of the small LVLM."""

from __future__ import annotations

import copy
import random
import time

from torch import Tensor, nn
from torchao.quantization import quantize_
from transformers import PreTrainedTokenizerFast

from recipes.small_lvlm.data import sample
from recipes.small_lvlm.model import inputs
from torchao_qig import QIGWeightOnlyConfig

# AWQ and MBQ search the same candidates at the same outputs as QIG; what differs is what a token's error counts (and AWQ's loss).
METHODS = {
    "rtn": lambda **kwargs: QIGWeightOnlyConfig(sensitivity=None, **kwargs),
    "awq": lambda **kwargs: QIGWeightOnlyConfig(sensitivity="uniform", loss="mse", **kwargs),
    "mbq": lambda **kwargs: QIGWeightOnlyConfig(sensitivity="modality", **kwargs),
    "qig-paper": lambda **kwargs: QIGWeightOnlyConfig.paper(**kwargs),
    "qig": lambda **kwargs: QIGWeightOnlyConfig(**kwargs),
}


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


def quantized(model: nn.Module, tokenizer: PreTrainedTokenizerFast, method: str, *, seed: int = 0, count: int = 128, **grid: int) -> tuple[nn.Module, float]:
    """A quantized copy, and the seconds that took."""
    start = time.perf_counter()
    model = copy.deepcopy(model)
    quantize_(model, METHODS[method](**grid, calib=calibration_batches(tokenizer, count, seed), verbose=False))
    return model.eval(), time.perf_counter() - start
