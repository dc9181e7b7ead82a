"""Rounding that looks at outputs: never worse than to nearest, exact where brute force can be asked, and it never breaks."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import Grid, grids, make_weight
from torchao_qig.formats import Affine
from torchao_qig.formats.affine import group_errors
from torchao_qig.formats.base import row_errors
from torchao_qig.methods import solver
from torchao_qig.methods.solver import compensated, target
from torchao_qig.tensor import affine

COLUMNS = 64
KINDS = ["normal", "outliers", "constant", "zero", "one sign", "tiny", "ties"]


def inputs(kind: str, tokens: int, columns: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=g)
    match kind:
        case "correlated":
            x = x @ torch.randn(columns, columns, generator=g)
        case "low rank":
            x = x[:, :3] @ torch.randn(3, columns, generator=g)
        case "dead channels":
            x = x * (torch.arange(columns) % 3 > 0)
        case "outlier channel":
            x = x * torch.where(torch.arange(columns) == 5, 1e3, 1.0)
        case "nothing":
            x = x * 0
    return x


INPUTS = ["plain", "correlated", "low rank", "dead channels", "outlier channel", "nothing"]
problems = st.tuples(grids(COLUMNS), st.sampled_from(KINDS), st.sampled_from(INPUTS), st.integers(1, 200), st.integers(0, 2**20))


def made(grid: Grid, kind: str, inputs_kind: str, tokens: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A weight, the Gram matrix of some inputs, and the grid to nearest."""
    w = make_weight(kind, 5, COLUMNS, torch.float32, seed)
    x = inputs(inputs_kind, tokens, COLUMNS, seed)
    return w, x.T @ x / tokens, *affine.choose_qparams(w, *grid)


def nearest(w: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    return affine.dequantize(affine.quantize(w, scale, zero, grid.bits, grid.group_size), scale, zero, grid.group_size)


@settings(max_examples=150)
@given(problems, st.sampled_from([0.0, 0.01, 0.3]), st.integers(0, 3))
def test_never_worse_than_nearest(problem: tuple[Grid, str, str, int, int], damping: float, sweeps: int) -> None:
    """Row by row on the same grid, whatever the inputs; codes lie on the grid and scales stay positive."""
    grid = problem[0]
    w, gram, scale, zero = made(*problem)
    codes, (fitted, kept) = compensated(w, gram, Affine(*grid), (scale, zero), damping, sweeps)
    assert torch.equal(kept, zero)
    assert torch.equal(codes, codes.round())
    assert int(codes.min()) >= 0
    assert int(codes.max()) < 2**grid.bits
    assert (fitted > 0).all()
    assert fitted.dtype == scale.dtype
    before = row_errors(nearest(w, scale, zero, grid) - w, gram)
    after = row_errors(affine.dequantize(codes, fitted, zero, grid.group_size) - w, gram)
    assert torch.isfinite(after).all()
    assert (after <= before * (1 + 1e-4) + 1e-6 * w.square().sum(1) * gram.diagonal().max()).all()


@settings(max_examples=30)
@given(st.integers(0, 2**20), st.sampled_from([1, 2]), st.booleans())
def test_between_brute_force_and_nearest(seed: int, bits: int, correlated: bool) -> None:
    """Five columns on a full-rank problem: no better than the best of all codes, no worse than rounding; scales are kept."""
    w, x = make_weight("normal", 3, 5, torch.float32, seed), inputs("correlated" if correlated else "plain", 40, 5, seed)
    gram, (scale, zero) = x.T @ x / 40, affine.choose_qparams(w, bits, -1)
    codes, (fitted, _) = compensated(w, gram, Affine(bits, -1), (scale, zero), damping=0.0, sweeps=0)
    assert torch.equal(fitted, scale)
    every = torch.tensor(list(itertools.product(range(2**bits), repeat=5)))
    errors = torch.stack([row_errors((every - zero[n].float()) * scale[n] - w[n], gram) for n in range(3)])
    found = row_errors(affine.dequantize(codes, scale, zero, -1) - w, gram)
    assert (found >= errors.amin(1) * (1 - 1e-4) - 1e-6).all()
    assert (found <= row_errors(nearest(w, scale, zero, Grid(bits, -1, False)) - w, gram) * (1 + 1e-4) + 1e-7).all()


def test_sweeps_reach_the_best_code_of_each_column() -> None:
    """After enough sweeps no single code can be changed for the better."""
    w, x = make_weight("normal", 4, 48, torch.float32, 3).double(), inputs("correlated", 200, 48, 3).double()
    gram = x.T @ x / 200
    scale, zero = affine.choose_qparams(w, 2, 16)
    codes, (fitted, _) = compensated(w, gram, Affine(2, 16), (scale, zero), damping=0.0, sweeps=60)
    best = row_errors(affine.dequantize(codes, fitted, zero, 16) - w, gram)
    for column, change in itertools.product(range(48), (-1, 1)):
        other = codes.clone().int()
        other[:, column] = (other[:, column] + change).clamp(0, 3)
        assert (row_errors(affine.dequantize(other.to(torch.uint8), fitted, zero, 16) - w, gram) >= best * (1 - 1e-9)).all()


def test_better_on_correlated_inputs() -> None:
    """What it is for: a fraction of the error of rounding to nearest, and sweeps and clipping add to it."""
    w, x = make_weight("normal", 32, 256, torch.float32, 0), inputs("plain", 2000, 64, 0) @ inputs("plain", 64, 256, 1) + 0.3 * inputs("plain", 2000, 256, 2)
    gram, (scale, zero) = x.T @ x / 2000, affine.choose_qparams(w, 3, 64)

    def error(sweeps: int, scale: Tensor, zero: Tensor) -> float:
        codes, (fitted, _) = compensated(w, gram, Affine(3, 64), (scale, zero), sweeps=sweeps)
        return float(row_errors(affine.dequantize(codes, fitted, zero, 64) - w, gram).sum())

    plain = float(row_errors(nearest(w, scale, zero, Grid(3, 64, False)) - w, gram).sum())
    passed_on = error(0, scale, zero)
    swept = error(2, scale, zero)
    clipped = error(2, *Affine(3, 64).fit(w, w.dtype, gram))
    assert passed_on < 0.3 * plain
    assert swept < 0.9 * passed_on
    assert clipped < 0.95 * swept


@settings(max_examples=60)
@given(problems)
def test_clipping(problem: tuple[Grid, str, str, int, int]) -> None:
    """No group's error grows, and one that nothing can improve keeps its whole range."""
    grid = problem[0]
    w, gram, scale, zero = made(*problem)
    clipped_scale, clipped_zero = Affine(*grid).fit(w, w.dtype, gram)
    before = group_errors(nearest(w, scale, zero, grid) - w, gram, grid.group_size)
    after = group_errors(nearest(w, clipped_scale, clipped_zero, grid) - w, gram, grid.group_size)
    assert (after <= before).all()
    assert (clipped_scale[after == before] == scale[after == before]).all()


@settings(max_examples=40)
@given(grids(COLUMNS), st.integers(0, 2**20))
def test_weights_on_the_grid_stay(grid: Grid, seed: int) -> None:
    """Nothing to lose: a weight that its grid holds exactly comes back as it is."""
    w, gram, scale, zero = made(grid, "normal", "correlated", 300, seed)
    exact = nearest(w, scale, zero, grid)
    codes, (fitted, _) = compensated(exact, gram, Affine(*grid), (scale, zero))
    torch.testing.assert_close(affine.dequantize(codes, fitted, zero, grid.group_size), exact, rtol=1e-5, atol=1e-6)


@settings(max_examples=40)
@given(st.integers(0, 2**20), st.sampled_from([2.0**-20, 0.5, 2.0**20]))
def test_units_of_the_weights_do_not_matter(seed: int, factor: float) -> None:
    """Token weights times a power of two: the same codes."""
    w, gram, scale, zero = made(Grid(3, 16, False), "outliers", "correlated", 300, seed)
    (codes, params), (others, fitted) = (compensated(w, g, Affine(3, 16), (scale, zero)) for g in (gram, gram * factor))
    assert torch.equal(codes, others)
    assert torch.equal(params[0], fitted[0])


@settings(max_examples=40)
@given(st.integers(0, 2**20), st.integers(80, 200))
def test_target(seed: int, tokens: int) -> None:
    """Least squares: on these inputs no weight comes nearer to the full-precision outputs; a share goes part of the way."""
    w, x, d = (inputs("plain", n, COLUMNS, seed + i).double() for i, n in enumerate((6, tokens, tokens)))
    d = 0.2 * d
    t = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram, cross = (t * x).T @ x, (t * d).T @ x
    found = target(w, gram, cross, 0.0)
    expected = torch.linalg.lstsq(x * t.sqrt(), ((x + d) @ w.T) * t.sqrt()).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(target(w, gram, cross, 0.0, 0.25), w + 0.25 * (expected - w), rtol=1e-6, atol=1e-8)
    assert float((target(w, gram, cross, 1e6) - w).abs().max()) < 1e-4  # all damping: nothing is repaired


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_inputs_are_named(value: float) -> None:
    gram = torch.eye(32)
    gram[3, 3] = value
    w = make_weight("normal", 2, 32, torch.float32, 0)
    with pytest.raises(ValueError, match="calibration batches"):
        compensated(w, gram, Affine(3, 32), affine.choose_qparams(w, 3, 32))


def test_cholesky_of_a_matrix_that_is_barely_one() -> None:
    """Damping grows until it works."""
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-3]])
    assert torch.isfinite(solver._cholesky(gram, 0.0)).all()
