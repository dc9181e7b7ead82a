"""The grids: what a weight comes back as."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests import oracle
from tests.strategies import DTYPES, Case, cases
from torchao_qig.tensor import affine

UNITS = load_file("tests/golden/units.safetensors")
UNIT_NAMES = sorted(k for k in UNITS if k.startswith("pq."))


def roundtrip(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    w, grid = case
    scale, zero = affine.choose_qparams(w, grid.bits, grid.group_size, grid.symmetric)
    codes = affine.quantize(w, scale, zero, grid.bits, grid.group_size)
    return codes, scale, zero, affine.dequantize(codes, scale, zero, grid.group_size, torch.float64)


def per_weight(values: torch.Tensor, columns: int) -> torch.Tensor:
    return values.double().repeat_interleave(columns // values.shape[-1], -1)


@given(cases())
def test_error_is_at_most_half_a_step_inside_the_range(case: Case) -> None:
    """|w - back| <= scale / 2 wherever the grid reaches."""
    w, grid = case
    _, scale, zero, back = roundtrip(case)
    step, z = per_weight(scale, w.shape[1]), per_weight(zero, w.shape[1])
    low, high = -z * step, (2**grid.bits - 1 - z) * step
    inside = (w.double() >= low) & (w.double() <= high)
    slack = 1e-6 * (w.double().abs() + step)  # float32 division
    assert ((w.double() - back).abs() <= step / 2 + slack)[inside].all()


@given(cases(kinds=["normal", "outliers", "constant", "zero", "one sign", "tiny", "ties"]))
def test_grid_reaches_every_weight(case: Case) -> None:
    """Outside the grid a weight lies only by the rounding of scale and zero: less than one step and a bit."""
    w, _ = case
    _, scale, _, back = roundtrip(case)
    assert ((w.double() - back).abs() <= 1.02 * per_weight(scale, w.shape[1])).all()


@given(cases())
def test_codes_survive_another_round(case: Case) -> None:
    """quantize(dequantize(codes)) gives the codes back."""
    w, grid = case
    codes, scale, zero, back = roundtrip(case)
    again = affine.quantize(back.to(torch.float64), scale, zero, grid.bits, grid.group_size)
    assert torch.equal(again, codes)
    assert int(codes.max()) < 2**grid.bits
    assert w.shape == codes.shape


@given(cases())
def test_scales_are_positive_and_finite(case: Case) -> None:
    """Whatever the weights: zeros, constants, the ends of the float range."""
    codes, scale, zero, back = roundtrip(case)
    assert (scale > 0).all()
    assert scale.isfinite().all()
    assert back.isfinite().all()
    assert int(zero.max()) < 2**case.grid.bits
    assert codes.dtype == zero.dtype == torch.uint8


@given(cases(dtypes=[torch.float32], kinds=["normal", "outliers", "one sign", "ties"]))
def test_symmetric_grids_are_symmetric(case: Case) -> None:
    """quantizing -w gives the negative of quantizing w."""
    w, grid = case
    bits = max(grid.bits, 2)

    def back(v: torch.Tensor) -> torch.Tensor:
        return affine.fake_quantize(v, bits, grid.group_size, symmetric=True)

    assert torch.equal(back(-w), -back(w))


@given(cases(dtypes=[torch.float32], kinds=["normal", "outliers", "constant", "one sign"]), st.floats(1.0, 100.0))
def test_scales_grow_with_the_weights(case: Case, factor: float) -> None:
    """c >= 1: the scales of c * w are at least those of w."""
    w, grid = case
    small, _ = affine.choose_qparams(w, *grid)
    large, _ = affine.choose_qparams(w * factor, *grid)
    assert (large >= small).all()


@given(cases(kinds=["constant"], dtypes=[torch.float32]))
def test_constant_rows_come_back(case: Case) -> None:
    """A constant group spans 0 .. c: c is the end of the grid."""
    *_, back = roundtrip(case)
    torch.testing.assert_close(back, case.weight.double(), rtol=1e-6, atol=0)


@given(cases(dtypes=[torch.float32], kinds=["normal", "outliers", "ties"]))
def test_widened_rule_is_the_official_one_where_a_group_has_both_signs(case: Case) -> None:
    """Design decision 13."""
    w, (bits, group, _) = case
    grouped = w.unflatten(-1, (-1, w.shape[1] if group == -1 else group))
    both = (grouped.amin(-1) < 0) & (grouped.amax(-1) > 0) & (grouped.amax(-1) - grouped.amin(-1) > 1e-5)
    ours, official = (affine.choose_qparams(w, bits, group, paper_rules=rule) for rule in (False, True))
    assert torch.equal(ours[0][both], official[0][both])
    assert torch.equal(ours[1][both], official[1][both])


@given(cases(dtypes=[torch.float32], kinds=["normal", "outliers", "constant", "zero", "one sign", "tiny", "ties"]))
def test_official_rule_is_the_specification(case: Case) -> None:
    """Bit for bit the plain-line oracle, clamped zero point included."""
    w, (bits, group, symmetric) = case
    rule = oracle.official_symmetric if symmetric else oracle.official_asymmetric
    assert torch.equal(affine.fake_quantize(w, bits, group, symmetric, paper_rules=True), rule(w, bits, group))


@pytest.mark.parametrize("name", [n for n in UNIT_NAMES if "per_tensor" not in n])
def test_golden_units(name: str) -> None:
    """The recorded outputs of the official quantizers, exactly."""
    _, weight, bits, group, kind = name.split(".")
    w = UNITS[weight]
    back = affine.fake_quantize(w, int(bits[1:]), int(group[1:]), symmetric=kind == "sym", paper_rules=True)
    assert torch.equal(back, UNITS[name])


def test_golden_units_are_there() -> None:
    """The parametrised test above covers both weights, both rules, several bits."""
    assert len([n for n in UNIT_NAMES if "per_tensor" not in n]) >= 16


def test_one_sign_group_is_kept_where_the_official_rule_loses_it() -> None:
    """The reason for widening: 1.0 .. 1.1 comes back as 0.1 under the official rule."""
    w = torch.linspace(1.0, 1.1, 32)[None]
    assert affine.fake_quantize(w, 3, 32, paper_rules=True).max() < 0.2
    assert (affine.fake_quantize(w, 3, 32) - w).abs().max() < 0.1


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_takes_the_asked_dtype(dtype: torch.dtype) -> None:
    """And the codes are chosen for the rounded scale."""
    w = torch.randn(8, 64)
    scale, zero = affine.choose_qparams(w, 4, 32, dtype=dtype)
    codes = affine.quantize(w, scale, zero, 4, 32)
    assert scale.dtype == dtype
    assert (affine.dequantize(codes, scale, zero, 32, torch.float32) - w).abs().max() <= 0.53 * scale.float().max()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 128), "bits=0"),
        ((9, 128), "bits=9"),
        ((True, 128), "bits=True"),
        ((2.5, 128), "bits=2.5"),
        ((3, 24), "group_size=24"),
        ((3, 0), "group_size=0"),
        ((1, 128, True), "symmetric"),
    ],
)
def test_impossible_grids_are_named(arguments: tuple, words: str) -> None:
    """The message holds the argument and its value."""
    with pytest.raises(ValueError, match=words):
        affine.check_grid(*arguments)


def test_group_that_does_not_divide_is_named() -> None:
    """With the number of features and what to pass."""
    with pytest.raises(ValueError, match=r"group_size=64.*100"):
        affine.choose_qparams(torch.randn(4, 100), 3, 64)
