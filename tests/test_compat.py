"""What we rely on in the installed torchao."""

import functools
import random
import threading

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, quant_api, quantize_

from torchao_qig import PackedIntWeightOnlyConfig, _compat


class Heard(list):
    """The calls that a stand-in handler found itself in."""


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    """Our config's handler replaced by one that only looks around."""
    calls = Heard()

    def look(module: nn.Module, config: PackedIntWeightOnlyConfig, *, parameter_name: str = "weight") -> nn.Module:
        calls.append((_compat.find_quantize_call(), module, parameter_name, config))
        return module

    monkeypatch.setitem(quant_api._QUANTIZE_CONFIG_HANDLER, PackedIntWeightOnlyConfig, look)
    return calls


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 128), nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 128)))


CONFIG = PackedIntWeightOnlyConfig(bits=3)


@pytest.mark.parametrize("wrap", [lambda f: f, torch.no_grad(), lambda f: functools.wraps(f)(lambda *a, **k: f(*a, **k))])
@pytest.mark.parametrize("filter_fn", [None, lambda m, name: name in ("0", "1.2")])
def test_call_is_found(heard: Heard, wrap, filter_fn) -> None:
    """The model, the config and every module that will come, however quantize_ is wrapped."""
    m = model()
    wrap(quantize_)(m, CONFIG, filter_fn=filter_fn)
    call = heard[0][0]
    assert (call.model, call.config) == (m, CONFIG)
    assert [a.module for a in call.assignments()] == [h[1] for h in heard]
    assert [a.fqn for a in call.assignments()] == (["0", "1.2"] if filter_fn else ["0", "1.0", "1.2"])


def test_call_is_found_in_a_thread(heard: Heard) -> None:
    """Frames belong to threads."""
    m = model()
    thread = threading.Thread(target=quantize_, args=(m, CONFIG))
    thread.start()
    thread.join()
    assert heard[0][0].model is m


def test_no_call_no_finding() -> None:
    """A handler called directly."""
    assert _compat.find_quantize_call() is None


def test_assignments_are_torchaos_own(heard: Heard) -> None:
    """Over random FqnToConfigs: the same modules, parameters and configs in the same order as torchao hands them over."""
    rng = random.Random(0)
    keys = ["0", "1", "1.0", "1.2", "0.weight", "1.0.weight", "1.0.bias", "re:.*", r"re:1\..*", r"re:.*weight", "re:0", "_default"]
    compared = 0
    for _ in range(300):
        configs = [PackedIntWeightOnlyConfig(bits=b) for b in (2, 3, 4)]
        chosen = {key: rng.choice([None, *configs]) for key in rng.sample(keys, rng.randint(1, 5))}
        m, config = model(), FqnToConfig(chosen)
        heard.clear()
        try:
            quantize_(m, config, filter_fn=None)
        except IndexError:  # torchao 0.18: two parameters of one module set to None
            continue
        compared += 1
        call = _compat.QuantizeCall(m, config, None)
        assert [(a.module, a.parameter, a.config) for a in call.assignments()] == [h[1:] for h in heard]
    assert compared > 250


def test_registration_is_idempotent() -> None:
    """Once in each table, however often the package is imported."""
    from torchao_qig import PackedIntTensor

    _compat.register(PackedIntTensor)
    assert _compat.SAFETENSORS_NAMES.count("PackedIntTensor") == 1
    assert _compat.SAFETENSORS_CLASSES["PackedIntTensor"] is PackedIntTensor
