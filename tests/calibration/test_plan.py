"""The plan against what then happens."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import torchao_qig
from tests import tiny_models
from tests.plain_models import MLP, Decoder, OuterResidual, RMSNorm, tokens
from torchao_qig import Clip, PackedIntTensor, PackedIntWeightOnlyConfig, QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig

GRID: dict[str, Any] = dict(group_size=64, verbose=False)
FAMILIES = [*tiny_models.VLMS, "gemma3", "qwen2", "llama"]


def packed(model: nn.Module) -> dict[str, PackedIntTensor]:
    return {n.removesuffix(".weight"): p.data for n, p in model.named_parameters() if isinstance(p, PackedIntTensor)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_is_what_happens(family: str) -> None:
    """With a batch to watch, from the lists alone, and without weights: the same linears and bytes, which quantize_ then makes."""
    model, batch = getattr(tiny_models, family)()
    config = QIGWeightOnlyConfig(bits=3, calib=[batch], **GRID)
    before = {n: p.clone() for n, p in model.named_parameters()}
    seen = torchao_qig.plan(model, config)
    listed = torchao_qig.plan(model, QIGWeightOnlyConfig(bits=3, **GRID))
    shapes = torchao_qig.plan(model.to("meta"), config)
    assert seen.linears == listed.linears == shapes.linears
    assert seen.bytes_after == listed.bytes_after == shapes.bytes_after
    assert seen.left == listed.left == shapes.left
    assert seen.need is not None
    assert (seen.need.samples, seen.need.tokens) == (1, batch["input_ids"].numel())

    model, batch = getattr(tiny_models, family)()
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    quantize_(model, config)
    made = packed(model)
    assert set(made) == seen.linears
    assert sum(w.nbytes_packed() for w in made.values()) == seen.bytes_after
    total = sum(p.nbytes_packed() if isinstance(p, PackedIntTensor) else p.numel() * p.element_size() for p in model.parameters())
    assert total == seen.model_bytes - seen.bytes_before + seen.bytes_after


def test_plain_rounding_takes_all_that_the_filter_matches() -> None:
    model, _ = tiny_models.qwen2(tied=True)
    config = PackedIntWeightOnlyConfig(bits=4, group_size=64)
    found = torchao_qig.plan(model, config)
    assert found.need is None
    assert any("shared" in why and names == ["lm_head"] for why, names in found.left.items())
    quantize_(model, config)
    assert set(packed(model)) == found.linears


def test_filter_bits_by_name_and_modules() -> None:
    model, batch = tiny_models.llava_onevision()
    every = torchao_qig.plan(model, QIGWeightOnlyConfig(calib=[batch], **GRID)).linears
    some = torchao_qig.plan(model, QIGWeightOnlyConfig(calib=[batch], **GRID), filter_fn=lambda m, name: "mlp" in name and isinstance(m, nn.Linear))
    assert some.linears == {n for n in every if "mlp" in n}
    bits = dict.fromkeys(sorted(every), 4) | {min(every): 16}
    mixed = torchao_qig.plan(model, QIGWeightOnlyConfig(bits=bits, calib=[batch], **GRID))
    assert mixed.linears == every - {min(every)}
    tower = torchao_qig.plan(model, QIGWeightOnlyConfig(calib=[batch], modules=["vision_tower"], **GRID))
    assert tower.linears
    assert all("vision_tower" in n for n in tower.linears)


@pytest.mark.parametrize("limit", [{"budget": 3.25}, {"max_bytes": 100_000}])
def test_bits_under_a_budget(limit: dict[str, Any]) -> None:
    model, batch = tiny_models.qwen2()
    config = QIGWeightOnlyConfig(bits="auto", calib=[batch], **limit, **GRID)
    found = torchao_qig.plan(model, config)
    quantize_(model, config)
    made = sum(w.nbytes_packed() for w in packed(model).values())
    assert 0.7 * found.bytes_after <= made <= found.bytes_after * 1.001


def test_a_generator_is_left_alone() -> None:
    """It can be read only once: the plan assumes samples instead."""
    model, batch = tiny_models.qwen2()
    loader = iter([batch, batch])
    found = torchao_qig.plan(model, QIGWeightOnlyConfig(calib=loader, **GRID))
    assert len(list(loader)) == 2
    assert found.need is not None
    assert found.need.samples == 128


def test_a_calibration_needs_nothing_more() -> None:
    model, batch = tiny_models.qwen2()
    calibration = torchao_qig.calibrate(model, [batch], QIGWeightOnlyConfig(**GRID))
    assert torchao_qig.plan(model, QIGWeightOnlyConfig(calib=calibration, **GRID)).need is None


def test_more_tokens_take_more() -> None:
    """Memory and time grow with samples, with compensation, with an exhaustive search."""
    model, batch = tiny_models.qwen2()
    one, many = (torchao_qig.plan(model, QIGWeightOnlyConfig(calib=[batch] * n, **GRID)).need for n in (1, 50))
    assert one is not None
    assert many is not None
    assert many.host_bytes > one.host_bytes
    assert many.device_bytes == one.device_bytes
    plain = torchao_qig.plan(model, QIGWeightOnlyConfig(calib=[batch] * 50, steps=[Clip()], **GRID)).need
    assert plain is not None
    assert plain.device_bytes < many.device_bytes
    int8 = torchao_qig.plan(model, QIGInt8DynamicActivationConfig(calib=[batch] * 50, verbose=False)).need
    assert int8 is not None


@pytest.mark.parametrize("make", [Decoder, OuterResidual, lambda: Decoder(lambda: nn.Sequential(RMSNorm(), MLP()))])
def test_plain_torch_models(make: Callable[[], nn.Module]) -> None:
    model = make()
    config = QIGWeightOnlyConfig(bits=3, group_size=16, calib=[tokens()], verbose=False)
    assert torchao_qig.plan(model, config).linears == set(torchao_qig.calibrate(model, [tokens()], config).grids)


def test_errors() -> None:
    model, _ = tiny_models.qwen2()
    with pytest.raises(TypeError, match="config=Int8WeightOnlyConfig"):
        torchao_qig.plan(model, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="nothing to quantize in ReLU"):
        torchao_qig.plan(nn.ReLU(), QIGWeightOnlyConfig(**GRID))
    with pytest.raises(ValueError, match="has no module 'visual'"):
        torchao_qig.plan(model, QIGWeightOnlyConfig(modules=["visual"], **GRID))
    with pytest.raises(ValueError, match="group_size=48 does not divide"):
        torchao_qig.plan(model, QIGWeightOnlyConfig(group_size=48))


def test_the_text_says_it_all() -> None:
    model, batch = tiny_models.llava_onevision()
    text = str(torchao_qig.plan(model, QIGWeightOnlyConfig(calib=[batch], **GRID)))
    assert "14 linears in model.language_model.layers.0 .. model.language_model.layers.1" in text
    assert "outside the decoder's blocks" in text
    assert "lm_head" in text or "more" in text
    assert "1 samples, 22 tokens" in text
