"""Every hypothesis strategy of the suite: grids, shapes, and weights of the kinds that break quantizers."""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "outliers", "constant", "zero", "one sign", "huge", "tiny", "ties"]


class Grid(NamedTuple):
    bits: int
    group_size: int
    symmetric: bool


class Case(NamedTuple):
    weight: Tensor
    grid: Grid


def make_weight(kind: str, rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A weight of one of KINDS, the same for the same arguments."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=g)
    match kind:
        case "outliers":
            w = w * torch.where(torch.rand(rows, columns, generator=g) < 0.02, 50.0, 1.0)
        case "constant":
            w = w[:, :1].expand(rows, columns).clone()
        case "zero":
            w = w * (torch.rand(rows, 1, generator=g) < 0.5)
        case "one sign":
            w = (w.abs() + 0.5) * torch.where(torch.rand(rows, 1, generator=g) < 0.5, -1.0, 1.0)
        case "huge":
            w = w * (torch.finfo(dtype).max / 8)
        case "tiny":
            w = w * (1e-6 if dtype == torch.float16 else 1e-30)
        case "ties":
            w = torch.round(w * 4) / 2
    return w.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


@st.composite
def grids(draw: st.DrawFn, columns: int | None = None) -> Grid:
    """A grid; with `columns`, one that fits them."""
    symmetric = draw(st.booleans())
    sizes = [-1, 16, 32, 48, 64, 80, 128]
    fitting = [g for g in sizes if columns is None or g == -1 or columns % g == 0]
    return Grid(draw(st.integers(2 if symmetric else 1, 8)), draw(st.sampled_from(fitting)), symmetric)


@st.composite
def cases(draw: st.DrawFn, kinds: list[str] = KINDS, dtypes: list[torch.dtype] = DTYPES) -> Case:
    """A weight with a grid that fits it, often with rows and columns that do not fill tiles and units."""
    rows = draw(st.sampled_from([1, 5, 16, 17, 32, 40, 64]))
    columns = draw(st.sampled_from([1, 16, 31, 48, 64, 80, 96, 128, 160, 256]))
    weight = make_weight(draw(st.sampled_from(kinds)), rows, columns, draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**31)))
    return Case(weight, draw(grids(columns)))


@st.composite
def codes(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Codes of any shape, batch dimensions included, and their bits."""
    bits = draw(st.integers(1, 8))
    batch = draw(st.sampled_from([(), (2,), (2, 3)]))
    shape = (*batch, draw(st.integers(1, 70)), draw(st.integers(1, 140)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=g), bits
