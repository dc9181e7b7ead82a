"""`quantize_(model, QIGWeightOnlyConfig(...))`: errors name what to do and leave the model whole."""

import copy
import dataclasses
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig, IntxWeightOnlyConfig, quantize_

import torchao_qig
from tests.test_qig import QUICK, assert_whole, packed, plain
from torchao_qig import QIG, Calibration, Clip, Compensate, Equalize, PackedIntTensor, QIGWeightOnlyConfig, Running
from torchao_qig.lvlm.recipe import recipe


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (QIGWeightOnlyConfig, {"bits": 0}, "bits=0"), (QIGWeightOnlyConfig, {"group_size": 12}, "group_size=12"),
        (Equalize, {"sensitivity": "attention"}, "sensitivity='attention'"), (Equalize, {"loss": "mape"}, "loss='mape'"), (Equalize, {"grid": 0}, "grid=0"),
        (QIG, {"points": -1}, "points=-1"), (QIG, {"quadrature": "simpson"}, "quadrature='simpson'"), (Equalize, {"search": "fast"}, "search='fast'"),
        (QIGWeightOnlyConfig, {"step": "go"}, "step='go'"), (QIGWeightOnlyConfig, {"modules": "visual"}, "modules='visual'"),
        (QIGWeightOnlyConfig, {"format": 4}, "format=4"), (Equalize, {"fold": False, "pre_scale": False}, "nowhere to put a scale"),
        (Running, {"micro_batch": 0}, "micro_batch=0"),
        (QIG, {"warmup_groups": None}, "warmup_groups=None"), (Running, {"compute_dtype": torch.int8}, "compute_dtype=torch.int8"),
        (QIGWeightOnlyConfig, {"step": "prepare", "calib": []}, "step='prepare'"), (Compensate, {"damping": -1.0}, "damping=-1"),
        (Compensate, {"repair": 2.0}, "repair=2"), (Compensate, {"sweeps": -1}, "sweeps=-1"),
        (
            QIGWeightOnlyConfig, {"steps": [Equalize("qig"), Clip()], "format": IntxWeightOnlyConfig(weight_dtype=torch.int4)},
            r"Clip\(sensitivity=None\) chooses codes, which format=.* chooses itself",
        ),
    ],
)  # fmt: skip
def test_bad_settings(kind: Callable[..., Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


class Broken(Exception):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("at", [1, 3])
def test_failing_call_leaves_the_model_whole(error: type[BaseException], at: int) -> None:
    """Whatever happens in the middle of the calibration, and a second try then works."""
    model, inputs = plain()
    before, tried = copy.deepcopy(model.state_dict()), []

    def loader() -> Any:
        for number in range(4):
            tried.append(number)
            if number == at:
                raise error("stop")
            yield inputs

    with pytest.raises(error):
        quantize_(model, QUICK(calib=loader()))
    assert_whole(model, before)
    quantize_(model, QUICK(calib=[inputs]))
    assert len(packed(model)) == 14


def test_failure_while_packing_leaves_the_model_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = plain()
    before, made = copy.deepcopy(model.state_dict()), []
    original = PackedIntTensor.from_codes.__func__

    def failing(cls: Any, *args: Any) -> Any:
        made.append(1)
        if len(made) == 5:
            raise MemoryError
        return original(cls, *args)

    monkeypatch.setattr(PackedIntTensor, "from_codes", classmethod(failing))
    with pytest.raises(MemoryError):
        quantize_(model, QUICK(calib=[inputs]))
    assert_whole(model, before)


def _nan(model: nn.Module) -> None:
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[0, 0] = torch.nan


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, i: quantize_(m, QUICK(step="convert")), RuntimeError, "nothing was recorded"),
        (lambda m, i: torchao_qig.calibrate(m, [i], QUICK(), lambda m, n: False), ValueError, "nothing to quantize"),
        (lambda m, i: quantize_(m, QUICK(calib=[i]), filter_fn=lambda m, n: n == "head"), ValueError, "modules="),
        (lambda m, i: quantize_(m, QUICK(calib=[i], group_size=48)), ValueError, "group_size=48 does not divide"),
        (lambda m, i: quantize_(m, QUICK(calib=[i], running=Running(model=nn.Linear(2, 2)))), ValueError, "does not contain the modules"),
        (lambda m, i: quantize_(m, QUICK(calib=torchao_qig.calibrate(m, [i], QUICK(bits=4)))), ValueError, "calibrated for"),
        (lambda m, i: quantize_(m, QUICK(calib=Calibration())), ValueError, "covers none"),
        (lambda m, i: quantize_(m, QUICK(calib=i)), TypeError, "one batch goes into a list"),
        (lambda m, i: (_nan(m), quantize_(m, QUICK(calib=[i]))), ValueError, r"blocks\.1\.mlp\.up: the weight contains NaN"),
    ],
)
def test_bad_calls(call: Callable[[nn.Module, Any], Any], error: type[Exception], message: str) -> None:
    model, inputs = plain()
    if "NaN" in message:
        _nan(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        call(model, inputs)
    after = model.state_dict()
    assert all(torch.equal(after[k].nan_to_num(), v.nan_to_num()) for k, v in before.items())


def test_calibration_of_another_model() -> None:
    model, inputs = plain()
    found = torchao_qig.calibrate(model, [inputs], QUICK())
    wider = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attention": nn.ModuleDict({x: nn.Linear(64, 32) for x in "qkv"})})])})
    with pytest.raises(ValueError, match="another model"):
        quantize_(wider, QUICK(calib=found))
    assert not packed(wider)


def test_handler_called_directly() -> None:
    from torchao_qig.workflow import quantize_module

    with pytest.raises(RuntimeError, match=r"torchao_qig\.calibrate"):
        quantize_module(nn.Linear(32, 32), QUICK(calib=[torch.ones(1, 32)]))


def test_two_methods_in_one_call() -> None:
    """One call calibrates in one way: what differs is named, whichever comes first; forms may differ."""
    model, inputs = plain()
    before, loader = copy.deepcopy(model.state_dict()), [inputs]
    scales, integers = QUICK(calib=loader), QUICK(calib=loader, steps=[Compensate()])
    for first, second, *names in ((scales, integers, "equalize", "compensate"), (integers, scales, "compensate", "equalize")):
        with pytest.raises(ValueError, match=rf"steps=\[{{'{names[0]}'.* for blocks\.0\.attention\.q, \[{{'{names[1]}'.* for blocks\.0\.mlp\.gate"):
            quantize_(model, FqnToConfig({r"re:.*attention\.[qkvo]": first, r"re:.*mlp\..*": second}), filter_fn=None)
        assert_whole(model, before)
    with pytest.raises(ValueError, match=r"calib: blocks\.0\.attention\.q and blocks\.0\.mlp\.gate have different ones"):
        quantize_(model, FqnToConfig({r"re:.*attention\.[qkvo]": scales, r"re:.*mlp\..*": QUICK(calib=[inputs])}), filter_fn=None)
    with pytest.raises(ValueError, match="running: "):
        quantize_(model, FqnToConfig({r"re:.*attention\.[qkvo]": scales, r"re:.*mlp\..*": QUICK(calib=loader, running=Running(micro_batch=1))}), filter_fn=None)
    assert_whole(model, before)
    quantize_(model, FqnToConfig({r"re:.*attention\.[qkvo]": QUICK(bits=4), r"re:.*mlp\..*": QUICK(bits=2, calib=loader)}), filter_fn=None)
    assert {w.bits for n, w in packed(model).items() if "attention" in n} == {4}


# Configs as values


def test_what_is_asked_is_stored_what_it_means_is_resolved_on_use() -> None:
    """replace() of a config, and a recipe written out in full, mean what the constructor means."""
    asked = QIGWeightOnlyConfig(method="qig")
    replaced = dataclasses.replace(QIGWeightOnlyConfig(), method="qig")
    assert replaced == asked
    assert replaced.chosen_steps == [Equalize("qig")]
    assert dataclasses.replace(replaced, steps=None) == QIGWeightOnlyConfig()
    assert dataclasses.replace(replaced, steps=None).chosen_steps == [Compensate()]
    settings = recipe({"bits": 3, "model": "m"}).resolved()
    again = recipe(settings, {"steps": [{"equalize": {"sensitivity": "qig"}}]}).config()
    assert again.chosen_steps == [Equalize("qig")]
    assert config_from_dict(json.loads(json.dumps(config_to_dict(replaced)))) == asked


def test_configs_with_loaders_can_be_compared_and_shown() -> None:
    """Data is no part of what a config is."""
    loaders = [[{"input_ids": torch.zeros(8, 100)} for _ in range(100)] for _ in range(2)]
    one, other = (QIGWeightOnlyConfig(calib=loader, running=Running(model=nn.Linear(2, 2))) for loader in loaders)
    assert one == other
    assert one != QIGWeightOnlyConfig(bits=2, calib=loaders[0])
    assert len(repr(one)) < 1000
    assert "tensor" not in repr(one)
