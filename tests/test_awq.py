"""torchao's own algorithms over our format: AWQ and SmoothQuant choose the scales, we pack."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchao.prototype.awq import AWQConfig
from torchao.prototype.smoothquant import SmoothQuantConfig
from torchao.quantization import quantize_

import torchao_qig
from tests.tiny_models import qwen2
from torchao_qig import PackedIntTensor, PackedIntWeightOnlyConfig

BASE = PackedIntWeightOnlyConfig(bits=3, group_size=64)


def toy() -> tuple[nn.Sequential, Tensor]:
    """Two linears and inputs with a few channels 30 times larger."""
    model = nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64))
    x = torch.randn(256, 128)
    x[:, :4] *= 30
    return model.eval(), x


def two_steps(model: nn.Module, x: Tensor, algorithm: type = AWQConfig) -> nn.Module:
    quantize_(model, algorithm(BASE, step="prepare"))
    model(x)
    quantize_(model, algorithm(BASE, step="convert"), filter_fn=lambda m, name: hasattr(m, "act_obs") or hasattr(m, "obs"))
    return model


def test_awq_beats_rounding_to_nearest() -> None:
    """On the data it was calibrated on, with outlier channels."""
    model, x = toy()
    expected, plain = model(x), copy.deepcopy(model)
    quantize_(plain, BASE)
    awq = two_steps(copy.deepcopy(model), x)
    assert all(isinstance(awq[i].weight, PackedIntTensor) and awq[i].weight.act_pre_scale is not None for i in (0, 2))
    assert (awq(x) - expected).square().mean() < 0.8 * (plain(x) - expected).square().mean()


@pytest.mark.parametrize("algorithm", [AWQConfig, SmoothQuantConfig])
def test_converted_model_compiles(algorithm: type) -> None:
    """In one graph, equal to eager."""
    model, x = toy()
    converted = two_steps(model, x, algorithm)
    assert isinstance(converted[0].weight, PackedIntTensor)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(converted, fullgraph=True)(x[:3]), converted(x[:3]), rtol=1e-4, atol=1e-4)


def test_prepare_for_loading() -> None:
    """A model prepared without data takes the calibrated weights by copying."""
    model, x = toy()
    target = copy.deepcopy(model)
    awq = two_steps(model, x)
    quantize_(target, AWQConfig(BASE, step="prepare_for_loading"))
    target.load_state_dict(awq.state_dict())
    assert torch.equal(target(x), awq(x))


def test_awq_checkpoint(tmp_path: Path) -> None:
    """A calibrated transformers model: saved, loaded, bit-identical, pre-scales included."""
    model, inputs = qwen2()
    linears = {m for block in model.model.layers for m in block.modules() if isinstance(m, nn.Linear)}
    quantize_(model, AWQConfig(BASE, step="prepare"), filter_fn=lambda m, name: m in linears)
    model(**inputs)
    quantize_(model, AWQConfig(BASE, step="convert"), filter_fn=lambda m, name: hasattr(m, "act_obs"))
    torchao_qig.save_pretrained(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.model.layers[1].mlp.down_proj.weight.act_pre_scale is not None
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
