"""Calibration that chooses the integers: on every shape of model, resumable, saved, and better than rounding to nearest."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import quantize_

import torchao_qig
from tests.calibration.test_resume import continued
from tests.calibration.test_run import assert_same, assert_untouched, build, state_of
from tests.plain_models import Block, CrossBlock, Decoder, Experts, InPlaceBlock, ParallelBlock, tokens
from tests.test_qig import FAMILIES, packed, run
from torchao_qig import Calibration, Clip, Compensate, Equalize, PackedIntTensor, QIGWeightOnlyConfig, Running
from torchao_qig.methods import Step
from torchao_qig.tensor import affine

SCALES, CODES = partial(Equalize, grid=4), partial(Compensate, clip=True)
QUICK = partial(QIGWeightOnlyConfig, bits=2, group_size=16, steps=[SCALES("qig"), CODES("qig")], verbose=False)


def quantized(model: nn.Module, batches: list[Any], **settings: Any) -> nn.Module:
    model = copy.deepcopy(model)
    quantize_(model, QUICK(calib=batches, **settings))
    return model


def divergence(model: nn.Module, reference: nn.Module, batches: list[Any]) -> float:
    with torch.no_grad():
        pairs = [(reference(b).log_softmax(-1), model(b).log_softmax(-1)) for b in batches]
    return sum(float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs)


def test_each_piece_helps() -> None:
    """On the model's own batches: clipping, passing errors on, and repairing what came before each lower the divergence."""
    model, batches = build(3), [tokens(8, 16, seed) for seed in range(4)]
    steps: dict[str, list[Step]] = {"search": [], "clip": [Clip("qig")], "both": [CODES("qig", repair=0.0)], "repair": [CODES("qig", repair=1.0)]}
    kl = {name: divergence(quantized(model, batches, steps=[SCALES("qig"), *codes]), model, batches) for name, codes in steps.items()}
    assert kl["clip"] < kl["search"]
    assert kl["both"] < 0.7 * kl["clip"]
    assert kl["repair"] < kl["both"]


@pytest.mark.parametrize("sensitivity", ["qig", "uniform", None])
def test_chosen_weights_are_what_the_model_gets(sensitivity: str | None, tmp_path: Path) -> None:
    """In memory, through a file, and in steps; squared errors are lower than those of rounding to nearest."""
    model, batches = build(2), [tokens(6, 12)]
    before = state_of(model)
    steps: list[Step] = [SCALES(sensitivity), CODES(sensitivity)] if sensitivity else [CODES()]
    found = torchao_qig.calibrate(model, batches, QUICK(steps=steps))
    assert_untouched(model, before)
    names = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "blocks" in n}
    assert found.weights.keys() == names == found.grids.keys()
    assert bool(found.groups) == (sensitivity is not None)
    assert all(0 < after < before for before, after in found.squared_errors.values())
    assert "left" in found.summary()
    assert all(label in found.summary() for label in found.squared_errors)
    assert set(found.groups) == (set(found.squared_errors) if sensitivity else set())
    found.save(tmp_path)
    loaded = Calibration.load(tmp_path)
    at_once, from_file = quantized(model, batches, steps=steps), copy.deepcopy(model)
    quantize_(from_file, QUICK(steps=steps, calib=loaded))
    for name, weight in packed(at_once).items():
        assert torch.equal(weight.dequantize(), found.weights[name].dequantize())
    assert torch.equal(run(from_file, {"input_ids": batches[0]}), run(at_once, {"input_ids": batches[0]}))
    assert all(w.act_pre_scale is None for w in loaded.weights.values())  # applying it has not changed it


@pytest.mark.parametrize("block", [Block, partial(Block, kv_heads=2), ParallelBlock, InPlaceBlock, CrossBlock, partial(Block, mlp=Experts)])
@pytest.mark.parametrize("fold", [True, False])
def test_every_shape_of_block(block: Any, fold: bool) -> None:
    """Biases, shared inputs, writes in place, routed rows: the model comes nearer than by rounding to nearest."""
    torch.manual_seed(0)
    model = Decoder(block, layers=2)
    batches = [tokens(6, 12, seed) for seed in range(3)]
    found = quantized(model, batches, steps=[SCALES("qig", fold=fold), CODES("qig")])
    rounded = quantized(model, batches, steps=[])
    assert packed(found).keys() == {n for n in packed(rounded) if "odd" not in n}
    assert divergence(found, model, batches) < 0.8 * divergence(rounded, model, batches)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "smolvlm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Saved and loaded by transformers with the same logits."""
    model, inputs = FAMILIES[family](dtype)
    quantize_(model, QUICK(bits=3, group_size=32, calib=[inputs]))
    logits = run(model, inputs)
    assert torch.isfinite(logits).all()
    torchao_qig.save_pretrained(model, tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path), inputs), logits)


def test_whole_model_and_other_parts() -> None:
    """A model without repeated blocks is one block; modules= names parts outside the decoder."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), torch.randn(64, 32)
    found = torchao_qig.calibrate(model, [x], QUICK())
    assert found.weights.keys() == {"0", "2"}
    best, plain = quantized(model, [x]), quantized(model, [x], steps=[])
    assert (best(x) - model(x)).square().sum() < 0.6 * (plain(x) - model(x)).square().sum()


@pytest.mark.parametrize("settings", [{}, {"steps": [SCALES("qig", propagate_error=True), CODES("qig")]}])
def test_interrupted_and_continued(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = build(3), [tokens(3, 9), tokens(2, 6)]
    expected = torchao_qig.calibrate(model, batches, QUICK(**settings))
    found = continued(model, lambda: torchao_qig.calibrate(model, batches, QUICK(checkpoint_dir=tmp_path, **settings)), monkeypatch)
    assert_same(found, expected, exactly=True)
    assert all(torch.equal(found.weights[n].dequantize(), w.dequantize()) for n, w in expected.weights.items())


def test_pieces_do_not_matter() -> None:
    """Samples meet in sums only: few codes differ by float summation."""
    model, batches = build(2), [tokens(6, 12)]
    a, b = (torchao_qig.calibrate(model, batches, QUICK(running=Running(micro_batch=n))).weights for n in (1, 6))
    same = [torch.isclose(a[n].dequantize(), w.dequantize(), rtol=1e-3, atol=1e-5).float().mean() for n, w in b.items()]
    assert min(same) > 0.9


@pytest.mark.parametrize(
    ("bits", "steps"),
    [(2, [SCALES("qig"), Clip("qig")]), (2, [SCALES("qig", fold=False), Clip("qig")]), (3, [SCALES("uniform"), Clip("uniform")])],
    ids=["folded", "not folded", "uniform"],
)
def test_squared_errors_recomputed(bits: int, steps: list[Step]) -> None:
    """From the inputs that hooks see, the scales and the token weights: what rounding to nearest and what the chosen integers lose."""
    model, ids = build(2), tokens(6, 12)
    config = QUICK(bits=bits, steps=steps)
    found = torchao_qig.calibrate(model, [ids], config)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].detach()}))
    model(ids)
    rows = {g.fold_into: g.scale for g in found.groups.values() if g.fold_kind == "linear"}
    for label, group in found.groups.items():
        expected = [0.0, 0.0]
        for name in group.linears:
            w = model.get_submodule(name).weight.detach() * group.scale
            if name in rows:
                w = w / torch.cat([torch.ones(len(w) - len(rows[name])), rows[name]])[:, None]
            plain = affine.fake_quantize(w, config.bits, config.group_size)
            for i, rounded in enumerate((plain, found.weights[name].dequantize())):
                out = (inputs[name] / group.scale) @ (w - rounded).T
                expected[i] += float((out.square().sum(-1) * torch.stack(found.tokens[label])).sum())
        assert found.squared_errors[label] == pytest.approx(expected, rel=1e-3)


def test_mixed_bits() -> None:
    from torchao.quantization import FqnToConfig

    model, batches = build(2), [tokens(6, 12)]
    one = QUICK(calib=batches)
    quantize_(model, FqnToConfig({r"re:.*mlp.*": one, r"re:.*attention.*": QUICK(bits=4, calib=batches)}), filter_fn=None)
    bits = {n: w.bits for n, w in packed(model).items()}
    assert {b for n, b in bits.items() if "mlp" in n} == {2}
    assert {b for n, b in bits.items() if "attention" in n} == {4}


@pytest.mark.parametrize("part", ["blocks.0.mlp.down", "blocks.0.attention.q"])
def test_part_of_what_was_rounded_together(part: str) -> None:
    """Integers hold for the scales that were chosen with them; a part without the rest is refused, the model whole."""
    model, batches = build(2), [tokens(6, 12)]
    found = torchao_qig.calibrate(model, batches, QUICK())
    before = state_of(model)
    with pytest.raises(ValueError, match="rounded together with"):
        quantize_(model, QUICK(calib=found), filter_fn=lambda m, name: name == part)
    assert_untouched(model, before)


def test_another_dtype_is_refused() -> None:
    model, batches = build(2), [tokens(6, 12)]
    found = torchao_qig.calibrate(model, batches, QUICK())
    model.bfloat16()
    with pytest.raises(ValueError, match=r"in torch\.float32, it is .* in torch\.bfloat16; calibrate again"):
        quantize_(model, QUICK(calib=found))
    assert not any(isinstance(p, PackedIntTensor) for p in model.parameters())
