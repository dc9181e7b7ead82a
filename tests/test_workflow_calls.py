"""What a call of quantize_ may assume about torchao, what it refuses, and what it leaves behind."""

import copy
import gc
import json
import multiprocessing
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig, quant_api, quantize_

from tests.test_workflow import cfg, mlp, packed_names
from torchao_qig import PackedIntTensor, PackedIntWeightOnlyConfig, QIGWeightOnlyConfig


class Deferring(dict):
    """A table of handlers whose look-up lies in another function, as in a torchao that checks or defers it."""

    def __getitem__(self, key: type) -> Callable[..., nn.Module]:
        return dict.__getitem__(self, key)


def test_handlers_may_be_looked_up_by_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant_api, "_QUANTIZE_CONFIG_HANDLER", Deferring(quant_api._QUANTIZE_CONFIG_HANDLER))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    quantize_(model, QIGWeightOnlyConfig(bits=3, group_size=32, calib=[torch.randn(8, 64)], verbose=False))
    assert packed_names(model) == {"0", "2"}


def test_a_module_that_is_not_done_is_an_error() -> None:
    """Whatever undoes what the first handler has done does not go by in silence."""
    model = mlp(64, 64, 64)

    def meddling(module: nn.Module, name: str) -> bool:
        if name == "1" and isinstance(model[0].weight, PackedIntTensor):
            model[1].weight = nn.Parameter(torch.randn(64, 64))
        return isinstance(module, nn.Linear)

    with pytest.raises(RuntimeError, match="is not any more"):
        quantize_(model, cfg(), filter_fn=meddling)


def test_calls_do_not_know_of_each_other() -> None:
    """From the same line, with the same config and model: the second finds new work; nothing keeps the model afterwards."""
    config, model = cfg(), mlp(64, 64, 64)
    for chosen in ("0", "1"):
        quantize_(model, config, filter_fn=lambda m, name, chosen=chosen: name == chosen)
    assert packed_names(model) == {"0", "1"}
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_time_grows_with_the_number_of_linears() -> None:
    """In calls of functions, of a transformers model, which is described for its save_pretrained: four times the linears, four times the calls."""
    import cProfile

    import transformers

    def calls(layers: int) -> int:
        sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, vocab_size=32)
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(num_hidden_layers=layers, **sizes)).eval()
        profile = cProfile.Profile()
        profile.enable()
        quantize_(model, cfg())
        profile.disable()
        return sum(entry.callcount for entry in profile.getstats())

    few, many = calls(8), calls(32)
    assert many < 4.5 * few


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("by_name", [False, True])
def test_bad_weight_is_named_and_nothing_is_changed(bad: float, by_name: bool) -> None:
    """Even though it is the last layer."""
    model = nn.Sequential(mlp(64, 64, 64))
    with torch.no_grad():
        model[0][1].weight[3, 3] = bad
    with pytest.raises(ValueError, match=r"0\.1: the weight contains NaN or infinity"):
        quantize_(model, FqnToConfig({r"re:.*": cfg()}) if by_name else cfg(), filter_fn=None)
    assert packed_names(model) == set()


def test_bad_weight_in_an_excluded_layer_does_not_matter() -> None:
    """Only what would be quantized is looked at."""
    model = mlp(64, 64, 64)
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    quantize_(model, FqnToConfig({"1": None, r"re:\d": cfg()}), filter_fn=None)
    assert packed_names(model) == {"0"}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "bits=9"),
        ({"bits": "3"}, "bits='3'"),
        ({"group_size": 100}, "group_size=100"),
        ({"group_size": 0}, "group_size=0"),
        ({"bits": 1, "symmetric": True}, "symmetric"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
    ],
)
def test_config_refuses_bad_values(kwargs: dict, words: str) -> None:
    """At construction, naming argument and value."""
    with pytest.raises(ValueError, match=words):
        PackedIntWeightOnlyConfig(**kwargs)


def test_config_survives_json() -> None:
    """As torchao and transformers store it."""
    config = cfg(bits=5, symmetric=True, dtype=torch.bfloat16)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_single_linear_as_root() -> None:
    """How transformers quantizes while loading: misfits warn and stay, since the caller walks the model."""
    linear = nn.Linear(64, 8)
    quantize_(linear, cfg())
    assert isinstance(linear.weight, PackedIntTensor)
    misfit = nn.Linear(50, 8)
    with pytest.warns(UserWarning, match="left unquantized"):
        quantize_(misfit, cfg())
    assert type(misfit.weight) is nn.Parameter


def test_quantized_module_survives_pickle_and_deepcopy() -> None:
    """torchao's own way of describing a linear does not."""
    model = mlp(64, 96)
    quantize_(model, cfg())
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other[0].weight, model[0].weight)
        assert repr(other) == repr(model)
        assert other[0].weight.qdata.data_ptr() != model[0].weight.qdata.data_ptr()


def test_meta_model_gets_the_right_shapes() -> None:
    """Skeletons are quantized before they have values."""
    with torch.device("meta"):
        model = mlp(64, 96)
    quantize_(model, cfg())
    assert model[0].weight.qdata.is_meta
    assert model[0].weight.shape == (96, 64)


def _living_bytes() -> int:
    gc.collect()
    plain = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter) and o.device.type == "cpu" and o.layout == torch.strided]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in plain}.values())


def _dense_and_packed_bytes() -> tuple[int, int]:
    start = _living_bytes()
    model = mlp(1024, 1024, 1024).bfloat16()
    dense = _living_bytes() - start
    quantize_(model, cfg(group_size=128))
    return dense, _living_bytes() - start


def test_no_float_copy_stays_alive() -> None:
    """The bytes of all living tensors of a fresh process: the float weights are gone, the packed ones take what they say."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        dense, packed = process.apply(_dense_and_packed_bytes)
    weights, biases = 2 * 1024 * 1024, 2 * 1024 * 2
    assert dense == weights * 2 + biases
    assert packed == weights * (3 + 24 / 128) / 8 + biases
    assert packed <= weights * (3 + 32 / 128) / 8 + biases
