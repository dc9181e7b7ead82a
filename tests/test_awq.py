"""torchao's own algorithms over our format: AWQ and SmoothQuant choose the scales, we pack."""

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.prototype.awq import AWQConfig
from torchao.prototype.smoothquant import SmoothQuantConfig
from torchao.quantization import quantize_

import torchao_qig
from tests.tiny_models import VLMS, qwen2
from torchao_qig import PackedIntTensor, PackedIntWeightOnlyConfig

BASE = PackedIntWeightOnlyConfig(bits=3, group_size=64)
gentle_smoothing = partial(SmoothQuantConfig, alpha=0.25)  # 0.5, the default, is meant for 8-bit activations


def toy() -> tuple[nn.Sequential, Tensor]:
    """Two linears and inputs with a few channels 30 times larger."""
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    x = torch.randn(256, 128)
    x[:, :4] *= 30
    return model.eval(), x


def two_steps(model: nn.Module, run: Callable[[], Any], algorithm: Callable[..., Any] = AWQConfig, **kwargs: Any) -> None:
    """torchao's flow: observe the linears of `model` while `run()` runs it, then convert them."""
    quantize_(model, algorithm(BASE, step="prepare"), **kwargs)
    observed = [m for m in model.modules() if _is_observed(m)]
    assert observed
    run()
    quantize_(model, algorithm(BASE, step="convert"), filter_fn=lambda m, name: _is_observed(m))
    assert not any(_is_observed(m) for m in model.modules())


def _is_observed(module: nn.Module) -> bool:
    return hasattr(module, "act_obs") or hasattr(module, "obs")


def in_blocks(module: nn.Module, name: str) -> bool:
    """For filter_fn: the linears inside decoder layers."""
    return isinstance(module, nn.Linear) and ".layers." in f".{name}"


@pytest.mark.parametrize(("algorithm", "share"), [(AWQConfig, 0.85), (gentle_smoothing, 0.95)])
def test_calibration_beats_rounding_to_nearest(algorithm: Callable[..., Any], share: float) -> None:
    """The squared error of outputs on the calibration data, with outlier channels, for each of four random models."""
    for seed in range(4):
        torch.manual_seed(seed)
        model, x = toy()
        expected, plain, calibrated = model(x), copy.deepcopy(model), copy.deepcopy(model)
        quantize_(plain, BASE)
        two_steps(calibrated, lambda calibrated=calibrated, x=x: calibrated(x), algorithm)
        assert all(isinstance(calibrated[i].weight, PackedIntTensor) for i in (0, 2))
        assert all(calibrated[i].weight.bits == 3 and calibrated[i].weight.act_pre_scale is not None for i in (0, 2))
        assert (calibrated(x) - expected).square().mean() < share * (plain(x) - expected).square().mean()


@pytest.mark.parametrize("algorithm", [AWQConfig, SmoothQuantConfig])
@pytest.mark.parametrize("rows", [1, 100])
def test_converted_model_compiles(algorithm: type, rows: int) -> None:
    """In one graph, equal to eager, for few rows (decode) and many (prefill)."""
    model, x = toy()
    two_steps(model, lambda: model(x), algorithm)
    assert model[0].weight.act_pre_scale is not None
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x[:rows]), model(x[:rows]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("algorithm", [AWQConfig, SmoothQuantConfig])
def test_prepare_for_loading(algorithm: type) -> None:
    """A model prepared without data takes the calibrated weights by copying."""
    model, x = toy()
    target = copy.deepcopy(model)
    two_steps(model, lambda: model(x), algorithm)
    quantize_(target, algorithm(BASE, step="prepare_for_loading"))
    assert not torch.equal(target(x), model(x))
    target.load_state_dict(model.state_dict())
    assert torch.equal(target(x), model(x))


def assert_same_logits(loaded: nn.Module, model: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_awq_checkpoint(dtype: torch.dtype, tmp_path: Path) -> None:
    """A calibrated transformers model: saved, loaded, saved again, bit-identical, pre-scales included."""
    model, inputs = qwen2(dtype)
    two_steps(model, lambda: model(**inputs), filter_fn=in_blocks)
    torchao_qig.save_pretrained(model, tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a")
    scale = model.model.layers[1].mlp.down_proj.weight.act_pre_scale
    assert scale.unique().numel() > 1
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.weight.act_pre_scale, scale)
    assert_same_logits(loaded, model, inputs)
    described = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["quant_type"]["default"]
    assert (described["_type"], described["_data"]["step"]) == ("AWQConfig", "prepare_for_loading")
    assert described["_data"]["base_config"]["_data"]["bits"] == 3
    assert type(loaded.lm_head.weight) is nn.Parameter
    torchao_qig.save_pretrained(loaded, tmp_path / "b")
    assert_same_logits(type(model).from_pretrained(tmp_path / "b"), model, inputs)


def test_awq_checkpoint_of_a_language_model_in_a_vlm(tmp_path: Path) -> None:
    """Prepared and converted as a part, calibrated through the whole model with its image."""
    model, inputs = VLMS["llava_onevision"]()
    two_steps(model.model.language_model, lambda: model(**inputs))
    torchao_qig.save_pretrained(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.model.language_model.layers[0].mlp.up_proj.weight.act_pre_scale is not None
    assert_same_logits(loaded, model, inputs)
