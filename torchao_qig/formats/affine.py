"""Integers of 1 to 8 bits with a scale and a zero point per group of columns: value = (code - zero) * scale.

The grid itself, its rounding and its packed tensor are in `torchao_qig.tensor` (`affine.py`, `packed.py`), since loading a checkpoint needs them, too.
This file says how calibration uses them. Codes are floating-point numbers here, and become uint8 when they are packed.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchao_qig.formats.base import CodedFormat, Params, row_errors
from torchao_qig.tensor import PackedIntTensor, affine

UNQUANTIZED_BITS = 16  # stands for a weight that is not quantized
SHRINKS = tuple(1 - i / 20 for i in range(11))  # parts of a group's range that are tried; 1 first: ties keep the whole range


@dataclass(frozen=True)
class Affine(CodedFormat):
    """Packed integers.

    Args:
        bits: 1 to 8.
        group_size: weights per scale along the input features: a multiple of 16, or -1 for one scale per row.
        symmetric: a grid centred on zero instead of one that spans each group's range.
        paper_rules: the published QIG code's rule, with its clamped zero point.
    """

    bits: int = 3
    group_size: int = 128
    symmetric: bool = False
    paper_rules: bool = False

    def describe(self) -> list[Any]:
        return [self.bits, self.group_size, self.symmetric]

    def misfit(self, rows: int, columns: int) -> str | None:
        return None if affine.fits(columns, self.group_size) else f"group_size={self.group_size} does not divide the input features"

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        groups = max(columns // affine.group_width(columns, self.group_size), 1)  # 1: where the size does not fit
        return rows * columns * self.bits // 8 + rows * groups * (dtype.itemsize + 1)

    def rounded(self, weight: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        return affine.fake_quantize(weight, self.bits, self.group_size, self.symmetric, self.paper_rules, dtype, scale)

    def stored(self, weight: Tensor, dtype: torch.dtype) -> PackedIntTensor:
        return PackedIntTensor.from_hp(weight, self.bits, self.group_size, self.symmetric, dtype, self.paper_rules)

    def fit(self, weight: Tensor, dtype: torch.dtype, gram: Tensor | None = None) -> Params:
        """Grids that span each group's range. With `gram` a grid spans the part of the range, out of `SHRINKS`, that gives the smallest error."""

        def grid(shrink: float) -> Params:
            return affine.choose_qparams(weight, self.bits, self.group_size, self.symmetric, self.paper_rules, dtype, shrink)

        def loss(params: Params, gram: Tensor) -> Tensor:
            values = self.nearest(weight, self.spread(params, weight.shape[1], weight.dtype))[1]
            return group_errors(weight - values, gram, self.group_size)

        params = grid(SHRINKS[0])
        if gram is None:
            return params
        best = loss(params, gram)
        for shrink in SHRINKS[1:]:
            tried = grid(shrink)
            error = loss(tried, gram)
            better = error < best
            best = torch.where(better, error, best)
            params = tuple(torch.where(better, new, old) for new, old in zip(tried, params, strict=True))
        return params

    def spread(self, params: Params, columns: int, dtype: torch.dtype) -> Params:
        width = affine.group_width(columns, self.group_size)
        return tuple(p.to(dtype).repeat_interleave(width, 1) for p in params)

    def nearest(self, target: Tensor, spread: Params) -> tuple[Tensor, Tensor]:
        scale, zero = spread
        codes = torch.div(target, scale).round_().add_(zero).clamp_(0, 2**self.bits - 1)
        return codes, torch.sub(codes, zero).mul_(scale)

    def refit(self, weight: Tensor, codes: Tensor, params: Params, gram: Tensor) -> Params:
        """Fit the scales to the codes, one group after another; a scale changes only where that lowers the error. Zero points stay."""
        scale, zero = params
        width = affine.group_width(weight.shape[1], self.group_size)
        wide_scale, wide_zero = self.spread(params, weight.shape[1], weight.dtype)
        steps = codes - wide_zero
        slope = (steps * wide_scale - weight) @ gram
        own, new = scale.to(weight.dtype), scale.clone()
        for group, start in enumerate(range(0, weight.shape[1], width)):
            part = steps[:, start : start + width]
            curve = row_errors(part, gram[start : start + width, start : start + width])
            tilt = (part * slope[:, start : start + width]).sum(1)
            fitted = affine.stored_scale(own[:, group] - tilt / curve.clamp(min=torch.finfo(weight.dtype).tiny), scale.dtype)
            change = fitted.to(weight.dtype) - own[:, group]
            better = (change * (2 * tilt + change * curve) < 0) & (fitted > own[:, group] / 4)
            change = change * better
            new[:, group] = torch.where(better, fitted, scale[:, group])
            slope += (change.unsqueeze(1) * part) @ gram[start : start + width]
        return new, zero

    def dense(self, codes: Tensor, params: Params, dtype: torch.dtype) -> Tensor:
        scale, zero = params
        return affine.dequantize(codes, scale, zero, self.group_size, dtype)

    def pack(self, codes: Tensor, params: Params) -> PackedIntTensor:
        scale, zero = params
        return PackedIntTensor.from_codes(codes.to(torch.uint8), scale, zero, self.bits, self.group_size)


def group_errors(difference: Tensor, gram: Tensor, group_size: int) -> Tensor:
    """(N, G): the squared error of every row's outputs if only one group were rounded, for each group."""
    columns = difference.shape[1]
    width = affine.group_width(columns, group_size)
    parts = zip(difference.split(width, 1), range(0, columns, width), strict=True)
    return torch.stack([row_errors(d, gram[i : i + width, i : i + width]) for d, i in parts], 1)
