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
from torchao_qig import Calibration, QIGWeightOnlyConfig, calibrate

# AWQ and MBQ search the same candidates at the same outputs as QIG; what differs is what a token's error counts (and AWQ's loss).
METHODS = {
    "rtn": lambda **grid: QIGWeightOnlyConfig(sensitivity=None, **grid),
    "awq": lambda **grid: QIGWeightOnlyConfig(sensitivity="uniform", loss="mse", **grid),
    "mbq": lambda **grid: QIGWeightOnlyConfig(sensitivity="modality", **grid),
    "qig-paper": lambda **grid: QIGWeightOnlyConfig.paper(**grid),
    "qig": lambda **grid: QIGWeightOnlyConfig(**grid),
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


def quantized(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, method: str, *, seed: int = 0, count: int = 128, **grid: int
) -> tuple[nn.Module, Calibration | None, float]:
    """A quantized copy, its calibration, and the seconds that took."""
    start = time.perf_counter()
    model, calibration = copy.deepcopy(model), None
    config = METHODS[method](**grid)
    config.verbose = False
    if config.sensitivity is not None:
        calibration = calibrate(model, calibration_batches(tokenizer, count, seed), config)
        config.calib = calibration
        quantize_(model, config)
    else:
        quantize_(model, config, filter_fn=lambda module, name: isinstance(module, nn.Linear) and ".language_model.layers." in name)
    return model.eval(), calibration, time.perf_counter() - start
