"""The vLLM plugin, without vLLM: stand-ins of the two classes of vLLM that it extends. benchmarks/vllm_check.py runs the real one."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchao.prototype.awq import AWQConfig
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

import torchao_qig.integrations.vllm as plugin
from tests.tiny_models import qwen2
from tests.vllm_stand_in import Config, LinearMethod, Mapper, modules
from torchao_qig import Equalize, PackedIntTensor, PackedIntWeightOnlyConfig, QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig

CONFIG = PackedIntWeightOnlyConfig(bits=3, group_size=64)
INT8 = PackedIntWeightOnlyConfig(bits=4, group_size=-1, symmetric=True, int8_activations=True)


@pytest.fixture
def reload() -> Iterator[Callable[..., dict[str, Any]]]:
    """The plugin as it is where vLLM has these classes."""
    patch = pytest.MonkeyPatch()

    def again(**classes: Any) -> dict[str, Any]:
        made, registered = modules(**classes)
        for name, module in made.items():
            patch.setitem(sys.modules, name, module)
        importlib.reload(plugin)
        return registered

    yield again
    patch.undo()
    importlib.reload(plugin)


@pytest.fixture
def vllm(reload: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return reload(TorchAOConfig=Config, TorchAOLinearMethod=LinearMethod)


# ---- registration ----


def test_entry_point() -> None:
    """What vLLM looks for, in the installed package; calling it without vLLM does nothing, twice."""
    (found,) = entry_points(group="vllm.general_plugins", name="qig")
    assert found.load() is plugin.register
    plugin.register()
    plugin.register()


def test_importing_the_package_leaves_vllm_alone() -> None:
    check = "import sys, torchao_qig; print([m for m in sys.modules if 'vllm' in m.split('.')])"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_register_again_and_again(vllm: dict[str, Any]) -> None:
    plugin.register()
    plugin.register()
    assert list(vllm) == ["torchao"]
    assert set(vllm["torchao"]) == {plugin.PackedConfig}
    assert issubclass(plugin.PackedConfig, Config)


def test_unknown_vllm(reload: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    """A vLLM that moved things: a warning with its version, nothing registered, nothing raised."""
    registered = reload(TorchAOConfig=Config)
    with caplog.at_level(logging.WARNING):
        plugin.register()
    assert registered == {}
    assert "does not know vLLM 9.9" in caplog.text
    assert "TorchAOLinearMethod" in caplog.text


# ---- which linear gets what ----


def method(config: Any, name: str = "model.layers.0.self_attn.qkv_proj", layer: nn.Module | None = None, mapped: bool = False, **kwargs: Any) -> Any:
    made = plugin.PackedConfig(config, **kwargs)
    if mapped:
        made.apply_vllm_mapper(Mapper())
    return made.get_quant_method(nn.Linear(1, 1) if layer is None else layer, name)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("config", [CONFIG, INT8, QIGWeightOnlyConfig(), QIGInt8DynamicActivationConfig(), AWQConfig(CONFIG, step="prepare_for_loading")])
def test_ours(config: Any) -> None:
    found = method(config)
    assert isinstance(found, plugin.PackedLinearMethod)
    assert found.quant_config.torchao_config is config


@pytest.mark.usefixtures("vllm")
def test_others_are_left_to_vllm() -> None:
    assert type(method(Int8WeightOnlyConfig())) is LinearMethod
    assert type(method(CONFIG, is_checkpoint_torchao_serialized=False)) is LinearMethod  # quantized while loading: vLLM's own affair
    assert method(CONFIG, layer=nn.Embedding(1, 1)) is None


@pytest.mark.usefixtures("vllm")
def test_bits_of_single_linears() -> None:
    """bits="auto" names single linears, as transformers does; vLLM has other names and joins some."""
    three, five = PackedIntWeightOnlyConfig(bits=3), PackedIntWeightOnlyConfig(bits=5)
    parent = "model.language_model.layers.0"
    bits = {f"{parent}.self_attn.{name}_proj": three for name in "qkv"} | {f"{parent}.mlp.down_proj": five}
    assert method(FqnToConfig(bits), "language_model.model.layers.0.self_attn.qkv_proj", mapped=True).quant_config.torchao_config == three
    assert method(FqnToConfig(bits), "language_model.model.layers.0.mlp.down_proj", mapped=True).quant_config.torchao_config == five
    assert method(FqnToConfig(bits), "language_model.model.layers.0.mlp.gate_up_proj", mapped=True) == "unquantized"


@pytest.mark.usefixtures("vllm")
def test_pre_scaled_of_single_linears() -> None:
    """What quantize_ with configs by name writes into config.json: a linear with an act_pre_scale is made with one, the others without."""
    model, inputs = qwen2()
    config = QIGWeightOnlyConfig(bits=3, group_size=32, steps=[Equalize("qig", grid=6)], calib=[inputs], verbose=False)
    quantize_(model, FqnToConfig({r"re:model\.layers\..*": config}), filter_fn=None)
    described = model.config.quantization_config.quant_type
    for name in ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"):
        last = "q_proj" if "qkv" in name else "gate_proj" if "gate" in name else name.split(".")[1]
        weight = model.model.layers[1].get_submodule(f"{name.split('.')[0]}.{last}").weight
        made = method(described, f"model.layers.1.{name}").quant_config.torchao_config
        assert made.pre_scaled == (weight.act_pre_scale is not None)


@pytest.mark.usefixtures("vllm")
def test_left_alone() -> None:
    """Names as transformers has them, in what vLLM joins: all parts, or none."""
    parts = [f"model.language_model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj")]
    name = "language_model.model.layers.0.mlp.gate_up_proj"
    assert method(CONFIG, name, mapped=True, skip_modules=parts) == "unquantized"
    assert isinstance(method(CONFIG, name.replace(".0.", ".1."), mapped=True, skip_modules=parts), plugin.PackedLinearMethod)
    with pytest.raises(ValueError, match=r"gate_up_proj: vLLM computes these as one linear.*up_proj: PackedIntWeightOnlyConfig"):
        method(CONFIG, name, mapped=True, skip_modules=parts[:1])


# ---- loading ----


def layer_of(config: Any, rows: list[int], columns: int, load: Callable[..., None] = lambda *a, **k: None, ranks: int = 1) -> nn.Module:
    layer = nn.Module()
    created = plugin.PackedLinearMethod(plugin.PackedConfig(config), "layers.0.some_proj")
    created.create_weights(layer, columns // ranks, rows, columns, sum(rows), torch.float32, weight_loader=load)
    layer.method = created  # type: ignore[assignment]
    return layer


def joining(offsets: dict[Any, int], columns: int, rank: int = 0) -> Callable[..., None]:
    """As vLLM's loaders do: copy rows to where the part begins, and of a row-parallel linear this rank's columns."""

    def load(parameter: Any, loaded: Any, part: Any = None) -> None:
        loaded = loaded.narrow(1, rank * columns, columns)
        parameter.data.narrow(0, offsets[part], loaded.shape[0]).copy_(loaded)

    return load


def packed(rows: int, columns: int, scale: torch.Tensor | None = None, seed: int = 0) -> PackedIntTensor:
    torch.manual_seed(seed)
    made = PackedIntTensor.from_hp(torch.randn(rows, columns), 3, 64)
    made.act_pre_scale = scale
    return made


@pytest.mark.usefixtures("vllm")
def test_parts_become_one_linear() -> None:
    parts = {part: packed(rows, 128, seed=i) for i, (part, rows) in enumerate([("q", 64), ("k", 32), ("v", 32)])}
    layer = layer_of(CONFIG, [64, 32, 32], 128, joining({"q": 0, "k": 64, "v": 96}, 128))
    for part, weight in parts.items():
        layer.weight.weight_loader(layer.weight, weight, part)
    layer.method.process_weights_after_loading(layer)
    x = torch.randn(5, 128)
    assert isinstance(layer.weight, PackedIntTensor)
    assert (layer.weight.input_dim, layer.weight.output_dim) == (1, 0)
    assert torch.equal(F.linear(x, layer.weight), F.linear(x, torch.cat([p.dequantize() for p in parts.values()])))


@pytest.mark.usefixtures("vllm")
def test_memory_as_it_is_found() -> None:
    """Uninitialized memory is full of NaN here, as it may be."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        layer_of(CONFIG, [64], 128)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_shard_of_inputs(rank: int) -> None:
    scale = torch.rand(256) + 0.5
    weight, layer = (
        packed(32, 256, scale),
        layer_of(PackedIntWeightOnlyConfig(bits=3, group_size=64, pre_scaled=True), [32], 256, joining({None: 0}, 128, rank), 2),
    )
    layer.weight.weight_loader(layer.weight, weight)
    layer.method.process_weights_after_loading(layer)
    x, mine = torch.randn(5, 128), slice(128 * rank, 128 * rank + 128)
    torch.testing.assert_close(F.linear(x, layer.weight), F.linear(x * scale[mine], weight.dequantize()[:, mine]))


@pytest.mark.usefixtures("vllm")
def test_a_shard_with_int8_activations() -> None:
    """Each part of the input is rounded with scales of its own: a rank computes with its columns alone."""
    x = torch.cat([torch.randn(5, 128), 9 * torch.randn(5, 128)], 1)
    weight, parts = PackedIntTensor.from_hp(torch.randn(32, 256), 4, -1, symmetric=True, int8_activations=True), []
    for rank in range(2):
        layer = layer_of(INT8, [32], 256, joining({None: 0}, 128, rank), 2)
        layer.weight.weight_loader(layer.weight, weight)
        mine = slice(128 * rank, 128 * rank + 128)
        alone = PackedIntTensor.from_codes(*codes_of(weight, mine), 4, -1, int8_activations=True)
        parts.append(F.linear(x[:, mine], layer.weight))
        assert torch.equal(parts[-1], F.linear(x[:, mine], alone))
    assert not torch.allclose(sum(parts), F.linear(x, weight))


@pytest.mark.usefixtures("vllm")
def test_a_shard_inside_a_group() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size=4: layers.0.some_proj has 128 input features, 32 in each part.*multiple of 64"):
        layer_of(CONFIG, [32], 128, ranks=4)
    with pytest.raises(ValueError, match="no multiple of 64"):
        layer_of(AWQConfig(CONFIG, step="prepare_for_loading"), [32], 128, ranks=4)
    layer_of(INT8, [32], 128, ranks=4)  # one scale per row: any 32 columns
    with pytest.raises(ValueError, match="no multiple of 32"):
        layer_of(INT8, [32], 128, ranks=8)


@pytest.mark.usefixtures("vllm")
def test_a_shard_of_rows_inside_a_tile() -> None:
    """The tensor's own error, with the linear's name."""
    layer = layer_of(CONFIG, [40], 128, joining({None: 8}, 128))
    with pytest.raises(ValueError, match=r"layers.0.some_proj: slice .* multiples of 16"):
        layer.weight.weight_loader(layer.weight, packed(32, 128))


def codes_of(weight: PackedIntTensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some columns' codes, with scale and zero point per row."""
    scale, zero = (t[0, : weight.rows, None] for t in (weight.scale, weight.zero_point))
    return (weight.dequantize()[:, columns] / scale + zero).round().to(torch.uint8), scale, zero


PRE_SCALED = PackedIntWeightOnlyConfig(bits=3, group_size=64, pre_scaled=True)


@pytest.mark.usefixtures("vllm")
def test_scales_that_were_folded() -> None:
    """The config says that some weight has an act_pre_scale; this one's went into the norm before."""
    weight, layer = packed(32, 128), layer_of(PRE_SCALED, [32], 128, joining({None: 0}, 128))
    layer.weight.weight_loader(layer.weight, weight)
    x = torch.randn(5, 128)
    assert torch.equal(F.linear(x, layer.weight), F.linear(x, weight.dequantize()))


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("second", [None, torch.full((128,), 3.0)])
def test_parts_with_different_scales(second: torch.Tensor | None) -> None:
    """In one parameter the last would win, without a word."""
    layer = layer_of(PRE_SCALED, [32, 32], 128, joining({0: 0, 1: 32}, 128))
    layer.weight.weight_loader(layer.weight, packed(32, 128, torch.full((128,), 2.0)), 0)
    with pytest.raises(ValueError, match=r"some_proj: vLLM multiplies its parts' input by one act_pre_scale"):
        layer.weight.weight_loader(layer.weight, packed(32, 128, second), 1)


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("part, complete", [((), True), ((None,), True), (((0, 1),), True), ((0,), False)])
def test_nothing_found(part: tuple[Any, ...], complete: bool) -> None:
    layer = layer_of(CONFIG, [32, 32], 128)
    with pytest.raises(ValueError, match=r"some_proj: vLLM found tensors for 0 of its 2 parts.*save_pretrained"):
        layer.method.process_weights_after_loading(layer)
    layer.weight.weight_loader(layer.weight, packed(64, 128), *part)
    if complete:
        layer.method.process_weights_after_loading(layer)
    else:
        with pytest.raises(ValueError, match="1 of its 2 parts"):
            layer.method.process_weights_after_loading(layer)
        layer.weight.weight_loader(layer.weight, packed(64, 128), loaded_shard_id=1)
        layer.method.process_weights_after_loading(layer)


@pytest.mark.usefixtures("vllm")
def test_a_float_weight_for_a_packed_one() -> None:
    layer = layer_of(CONFIG, [32], 128, joining({None: 0}, 128))
    with pytest.raises(ValueError, match="some_proj: copy_: cannot copy a float tensor"):
        layer.weight.weight_loader(layer.weight, torch.randn(32, 128))
