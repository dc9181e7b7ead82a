"""Affine quantization of weights: choose a grid, round to it, and convert back. The only file of the project that rounds.

A weight `w` of shape (..., N, K) is cut along K into groups of `group_size` (or one group per row, -1). Every group has a
grid of 2**bits points, `(code - zero) * scale` for code = 0 .. 2**bits - 1, so a weight becomes its nearest grid point.

- asymmetric: the grid spans the group's range, widened to contain 0 so that zero is a grid point and `zero` is an integer
  of the grid. For a group with both signs this is the published QIG rule; for a group of one sign the published rule
  (`paper_rules=True`) clamps `zero` instead and loses most of the range (1.0 .. 1.1 comes back as 0.1).
- symmetric: the grid is -M .. M times scale with M = 2**(bits - 1) - 1, stored with zero = 2**(bits - 1).

All arithmetic is float32 (float64 for float64 weights), whatever the dtype of the weight; `scale` is rounded to its
storage dtype *before* the codes are chosen, so the codes are the best ones for the scale that is stored.
Rounding is half to even. Shapes: w (..., N, K), scale and zero (..., N, K / group_size), codes like w, in uint8.

Activations (`quantize_rows`): every token, a vector along the last dimension, has a symmetric grid of -127 .. 127 times its scale.
"""

import torch
from torch import Tensor

from torchao_qig.errors import UserError

OFFICIAL_FLOOR = 1e-5  # the smallest range of a group in the published code
CHUNK = 2**17  # number of weights that `fake_quantize` processes at a time
ROW_LEVELS = 127  # levels of an activation's grid on each side of zero


def check_grid(bits: int, group_size: int, symmetric: bool = False) -> None:
    """Raise a `UserError` that names the argument, if there is no grid with these settings."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise UserError(f"bits={bits!r}: pass an integer from 1 to 8")
    if symmetric and bits == 1:
        raise UserError("bits=1 with symmetric=True: a symmetric grid needs at least 2 bits; pass symmetric=False or bits=2")
    if isinstance(group_size, bool) or not isinstance(group_size, int) or (group_size != -1 and (group_size < 16 or group_size % 16)):
        raise UserError(f"group_size={group_size!r}: pass a multiple of 16, or -1 for one group per row")


def fits(in_features: int, group_size: int) -> bool:
    """Whether a row of `in_features` weights can be divided into whole groups."""
    return in_features > 0 and (group_size == -1 or in_features % group_size == 0)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def group_width(in_features: int, group_size: int) -> int:
    """The number of weights in a group; with a `group_size` of -1, a whole row."""
    return in_features if group_size == -1 else group_size


def _grouped(w: Tensor, group_size: int) -> Tensor:
    """Divide the rows of a weight into groups: (..., N, K) -> (..., N, G, group)."""
    k = w.shape[-1]
    if not fits(k, group_size):
        raise UserError(f"group_size={group_size}: does not divide the {k} input features; pass a divisor of {k} or -1")
    return w.unflatten(-1, (-1, group_width(k, group_size)))


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` in its storage dtype, kept positive and finite."""
    finfo = torch.finfo(dtype)
    if dtype != torch.float16:
        return scale.clamp(finfo.tiny, finfo.max).to(dtype)
    step = 2.0**-24  # float16 has few normal numbers: use the subnormal ones too, rounded up so that the group's range is kept
    scale = torch.where(scale < finfo.tiny, torch.ceil(scale / step) * step, scale)
    return scale.clamp(step, finfo.max).to(dtype)


def choose_qparams(
    w: Tensor, bits: int, group_size: int, symmetric: bool = False, paper_rules: bool = False, dtype: torch.dtype | None = None, shrink: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Scale (in `dtype`, by default w's) and zero (uint8) of every group, both (..., N, G).

    Args:
        w: floating-point weight, (..., N, K).
        bits: 1 to 8 (symmetric: 2 to 8).
        group_size: weights per group along K, or -1 for a whole row.
        symmetric: a grid centred on zero instead of one that spans the range.
        paper_rules: the published QIG rule, with its clamped zero and its floor of 1e-5 under the range.
        dtype: storage dtype of the scale.
        shrink: the part of each group's range that the grid spans; weights beyond it are clipped.
    """
    dtype = dtype or w.dtype
    v = _grouped(w, group_size).to(_compute_dtype(w.dtype))
    if symmetric:
        levels = 2 ** (bits - 1) - 1
        span = v.abs().amax(-1) * shrink
        low = torch.zeros_like(span)
    else:
        levels = 2**bits - 1
        low, high = v.amin(-1) * shrink, v.amax(-1) * shrink  # torch.aminmax is not vectorised on the CPU
        if not paper_rules:
            low, high = low.clamp(max=0), high.clamp(min=0)
        span = high - low
    if paper_rules:
        span = span.clamp(min=OFFICIAL_FLOOR)
    scale = span / levels
    if not symmetric:  # high - low overflows where the weights fill the whole float range
        scale = torch.where(scale.isinf(), high / levels - low / levels, scale)
    scale = stored_scale(scale, dtype)
    if symmetric:
        return scale, torch.full(scale.shape, levels + 1, dtype=torch.uint8, device=w.device)
    zero = (-torch.round(low / scale.to(low.dtype))).clamp(0, levels)
    return scale, zero.to(torch.uint8)


def nearest_steps(v: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """For every value of `v` (..., G, group), the nearest grid point: its signed distance from `zero`, in steps of `scale`.

    The result is a new tensor in the dtype of `v`.
    """
    zero = zero.to(v.dtype).unsqueeze(-1)
    return torch.div(v, scale.to(v.dtype).unsqueeze(-1)).round_().add_(zero).clamp_(0, 2**bits - 1).sub_(zero)


def quantize(w: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    """The code (uint8, 0 .. 2**bits - 1) of the grid point nearest to every weight."""
    v = _grouped(w, group_size).to(_compute_dtype(w.dtype))
    return nearest_steps(v, scale, zero, bits).add_(zero.unsqueeze(-1)).to(torch.uint8).flatten(-2)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype | None = None) -> Tensor:
    """The grid points that the codes stand for, in `dtype` (by default the scale's)."""
    compute = _compute_dtype(scale.dtype)
    steps = _grouped(codes, group_size).to(compute) - zero.to(compute).unsqueeze(-1)
    return (steps * scale.to(compute).unsqueeze(-1)).flatten(-2).to(dtype or scale.dtype)


def nearest(w: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    """The grid point nearest to every weight, in w's dtype."""
    return dequantize(quantize(w, scale, zero, bits, group_size), scale, zero, group_size, w.dtype)


def quantize_rows(x: Tensor, paper_rules: bool = False) -> tuple[Tensor, Tensor]:
    """The int8 codes of activations, and the scale (..., 1) of every token in at least float32.

    A token that holds NaN or infinity gets codes of 0 and a scale that is infinite or NaN, so it dequantizes to NaN.
    """
    v = x.to(_compute_dtype(x.dtype))
    floor = OFFICIAL_FLOOR if paper_rules else ROW_LEVELS * torch.finfo(v.dtype).tiny
    scale = v.abs().amax(-1, keepdim=True).clamp(min=floor) / ROW_LEVELS
    codes = torch.round(v / scale)
    return torch.where(scale.isfinite(), codes, 0.0).to(torch.int8), scale


def fake_quantize_rows(x: Tensor, columns: Tensor | None = None, paper_rules: bool = False) -> Tensor:
    """Activations rounded to int8 and converted back to their own dtype.

    With `columns` (K,), the activations are divided by `columns` before rounding and multiplied by it afterwards.
    """
    codes, scale = quantize_rows(x if columns is None else x / columns, paper_rules)
    values = codes.to(scale.dtype) * scale
    return (values if columns is None else values * columns).to(x.dtype)


def fake_quantize(
    w: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    paper_rules: bool = False,
    dtype: torch.dtype | None = None,
    columns: Tensor | None = None,
) -> Tensor:
    """`w` rounded and converted back to its own dtype, equal to a dequantized packed tensor with scales in `dtype` (by default w's).

    With `columns` (K,), the weight is multiplied by `columns` before rounding and divided by it afterwards.
    """
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    compute = _compute_dtype(w.dtype)
    rows = max(1, CHUNK // max(1, w.shape[-1]))  # few enough rows to stay in the processor's cache
    for part, dense in zip(w.flatten(0, -2).split(rows), out.flatten(0, -2).split(rows), strict=True):
        part = part.to(compute) if columns is None else part.to(compute) * columns
        scale, zero = choose_qparams(part, bits, group_size, symmetric, paper_rules, dtype or w.dtype)
        values = nearest_steps(_grouped(part, group_size), scale, zero, bits).mul_(scale.to(compute).unsqueeze(-1)).flatten(-2)
        if columns is None:
            dense.copy_(values)
        else:
            torch.div(values, columns, out=dense) if dense.dtype == compute else dense.copy_(values.div_(columns))
    return out
