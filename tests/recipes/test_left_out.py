"""The small LVLM with a part of its decoder left at full precision: what is calibrated is nearer to the whole model than what is rounded."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

from recipes.evaluate import answer, batches, scores
from recipes.methods import calibration_batches
from recipes.small_lvlm.data import chosen
from recipes.small_lvlm.model import load
from torchao_qig import QIGWeightOnlyConfig

LAYERS = "model.language_model.layers."


def all_but_the_first(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.startswith(LAYERS) and not name.startswith(f"{LAYERS}0.")


@pytest.fixture(scope="module")
def setting() -> Any:
    tokenizer, full = load()
    asked, reference = batches(chosen("test", 24), tokenizer), list[torch.Tensor]()
    answer(full, asked, keep=reference, progress=False)
    return full, asked, reference, calibration_batches(tokenizer, 64)


@pytest.mark.parametrize(("settings", "filter_fn"), [({}, all_but_the_first), ({"modules": ["language_model.layers.5"]}, None)], ids=["all but one", "one"])
def test_better_than_rounding(setting: Any, settings: dict[str, Any], filter_fn: Any) -> None:
    """By half and more. (With the stream frozen at a block left out, KL was 80 times that of rounding.)"""
    full, asked, reference, data = setting

    def kl(**method: Any) -> float:
        model = copy.deepcopy(full)
        quantize_(model, QIGWeightOnlyConfig(bits=3, calib=data, verbose=False, **settings, **method), filter_fn)
        return float(scores(answer(model.eval(), asked, reference, progress=False))["all"]["kl"][0])

    assert kl() < 0.8 * kl(method="rtn")
