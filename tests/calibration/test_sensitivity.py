"""Token weights as pure functions: quadrature, closed form, clipping, modalities."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import torchao_qig
from tests.calibration.test_golden import build
from torchao_qig import QIG, Equalize, QIGWeightOnlyConfig, Running
from torchao_qig.methods.token_weights import attribution as s

GOLDEN = Path(__file__).parents[1] / "golden" / "qig"
SEEDS = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, Tensor]]:
    """On the recorded model, per rule and group: distance of every token's weight from 512 Riemann points, over the mean weight."""
    from safetensors.torch import load_file

    model, inputs = build(GOLDEN, "qwen2_mha_s11"), load_file(GOLDEN / "inputs" / "in_s101.safetensors")
    batch = {k: inputs[k] for k in ("inputs_embeds", "attention_mask")}

    def weights(rule: QIG) -> dict[str, Tensor]:
        config = QIGWeightOnlyConfig(bits=3, group_size=32, steps=[Equalize(rule, grid=1)], verbose=False, running=Running(compute_dtype=torch.float32))
        found = torchao_qig.calibrate(model, [batch], config)
        return {label: torch.stack(w) for label, w in found.tokens.items()}

    reference = weights(QIG("riemann", points=512))
    rules = {"default": QIG(), "paper": QIG("riemann"), "coarse": QIG(points=s.COARSE), "fine": QIG(points=s.FINE)}
    found = {name: weights(rule) for name, rule in rules.items()}
    return {name: {label: (w[label] - reference[label]).abs() / reference[label].mean() for label in w} for name, w in found.items()}


@pytest.mark.parametrize("rule", ["default", "coarse", "fine"])
def test_few_points_come_closer_than_the_papers_32(errors: dict[str, dict[str, Tensor]], rule: str) -> None:
    """In the mean over tokens, for every attention and every mlp. (One linear alone is exact either way.)"""
    compared = 0
    for label, error in errors[rule].items():
        if label.endswith(("self_attn", "mlp")):
            assert error.mean() < errors["paper"][label].mean()
            compared += 1
        else:
            assert error.max() < 1e-4
    assert compared == 6


@given(st.sampled_from(["gauss", "riemann"]), st.integers(1, 40))
def test_rules_integrate_constants(quadrature: str, steps: int) -> None:
    rule = s.rule(quadrature, steps)
    assert len(rule.nodes) == len(rule.weights) == steps
    assert sum(rule.weights) == pytest.approx(1)
    assert all(0 <= a <= 1 for a in rule.nodes)
    if quadrature == "gauss":
        assert sum(a * w for a, w in zip(rule.nodes, rule.weights, strict=True)) == pytest.approx(0.5)


@given(st.floats(0.05, 0.95), st.sampled_from([3, 4, 5, 6, 8]))
def test_a_jump_between_points_is_seen(root: float, steps: int) -> None:
    """u(a) = a (a - root), path in one number: the integral of |u|' is |u(1)|, which a plain sum over few points misses."""
    counted = torch.ones(1, 1, dtype=torch.bool)

    def difference(ys: list[Tensor]) -> Tensor:
        return ys[0] * (ys[0] - root)

    found = s.integrate(difference, [None], [torch.ones(1, 1, 1)], s.rule("gauss", steps), counted)
    torch.testing.assert_close(found.gradients[0].item(), 1 - root, rtol=0, atol=0.05)
    torch.testing.assert_close(found.end - found.start, torch.tensor([1 - root]))


@given(SEEDS, st.integers(1, 3), st.integers(1, 5), st.sampled_from(["gauss", "riemann"]), st.sampled_from([4, 6, 32]))
def test_closed_form_of_a_linear(seed: int, batch: int, length: int, quadrature: str, steps: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(batch, length, 7, generator=g), torch.randn(5, 7, generator=g)
    counted = torch.rand(batch, length, generator=g) < 0.8
    rule = s.rule(quadrature, steps)
    known = s.integrate_linear(x @ w.T, rule, counted)
    summed = s.integrate(lambda ys: ys[0], [None], [x @ w.T], rule, counted)
    torch.testing.assert_close(known.gradients, summed.gradients, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(known.end, summed.end)
    error = s.completeness_error(x, known.gradients[0] @ w, known, counted)
    missed = 1 / steps if quadrature == "riemann" else 0.0
    some = counted.any(1)
    torch.testing.assert_close(error[some], torch.full((int(some.sum()),), missed), rtol=1e-3, atol=1e-4)


@given(SEEDS, st.sampled_from([4, 6, 8, 12]))
def test_completeness_of_a_smooth_module(seed: int, steps: int) -> None:
    """Attributions of a gated mlp, from a baseline other than zero, add up to the change of D."""
    g = torch.Generator().manual_seed(seed)
    gate, up, down, gate_q, up_q, down_q = (torch.randn(*shape, generator=g) / 4 for shape in [(24, 12), (24, 12), (12, 24)] * 2)
    x, base = torch.randn(2, 6, 12, generator=g), torch.randn(2, 6, 12, generator=g) / 4

    def difference(ys: list[Tensor]) -> Tensor:
        return (torch.nn.functional.silu(ys[0]) * ys[1]) @ down.T - (torch.nn.functional.silu(ys[2]) * ys[3]) @ down_q.T

    matrices = [gate, up, gate_q, up_q]
    counted = torch.ones(2, 6, dtype=torch.bool)
    found = s.integrate(difference, [base @ m.T for m in matrices], [x @ m.T for m in matrices], s.rule("gauss", steps), counted)
    gradient = sum(a @ m for a, m in zip(found.gradients, matrices, strict=True))
    attributed = ((x - base) * gradient).sum((1, 2))
    assert (attributed - (found.end - found.start)).abs().max() < 0.02 * found.end.max()


@given(SEEDS, st.integers(1, 4), st.integers(1, 30), st.booleans())
def test_clipped_weights(seed: int, batch: int, length: int, padded: bool) -> None:
    """Shares of the counted tokens, blind to scale, to other samples and to what padding holds; spikes are cut."""
    g = torch.Generator().manual_seed(seed)
    raw = torch.randn(batch, length, generator=g).exp()
    counted = torch.rand(batch, length, generator=g) < 0.7 if padded else torch.ones(batch, length, dtype=torch.bool)
    weights = s.clipped(raw, counted)
    some = counted.any(1)
    torch.testing.assert_close(weights.sum(1)[some], torch.ones(int(some.sum())))
    assert not weights[~counted].any()
    torch.testing.assert_close(s.clipped(raw * 37, counted), weights)
    torch.testing.assert_close(s.clipped(torch.where(counted, raw, 1e9), counted), weights)
    torch.testing.assert_close(s.clipped(raw.flip(0), counted.flip(0)), weights.flip(0))
    torch.testing.assert_close(torch.cat([s.clipped(r[None], c[None]) for r, c in zip(raw, counted, strict=True)]), weights)
    assert torch.equal(s.clipped(torch.zeros_like(raw), counted), s.uniform(counted))
    assert not s.clipped(torch.zeros_like(raw), counted, fallback=False).any()


def test_a_spike_is_cut() -> None:
    raw = torch.ones(1, 40) + torch.arange(40) * 0.01
    raw[0, 7] = 1000
    weights = s.clipped(raw, torch.ones(1, 40, dtype=torch.bool))
    assert weights[0, 7] == weights.max()
    assert weights.max() < 2 * weights.median()


@given(SEEDS, st.floats(0, 5), st.booleans())
def test_modality_weights(seed: int, ratio: float, squared: bool) -> None:
    """Ratio 0 leaves answers alone; the weight of all vision tokens grows with the ratio."""
    g = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 3, (3, 8), generator=g)
    answer, vision = kind == 1, kind == 2
    counts = float(answer.sum()), float(vision.sum())
    weights = s.by_modality(answer, vision, ratio, counts, squared)
    assert not weights[kind == 0].any()
    expected = ratio * (math.copysign(1, counts[1]) if counts[1] and squared else counts[1] / max(sum(counts), 1))
    torch.testing.assert_close(weights[vision].sum().item(), expected if counts[1] else 0.0, rtol=1e-4, atol=1e-6)
