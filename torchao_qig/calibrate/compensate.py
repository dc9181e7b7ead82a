"""Round a linear's weight so that its outputs, not its weights, change least: pure functions of the weight and a Gram matrix.

The error of a rounded weight Q is tr((W - Q) H (W - Q)^T) with H = sum over tokens of weight * x x^T, x being the input that the
quantized model really has. Every row of W has an error of its own, so all of this goes row by row in parallel.

- `clipped_qparams`: per group the part of its range whose plain rounding has the smallest error (its own columns' part of H).
- `target`: the weight that gives x the full-precision output best, in the least-squares sense (the aim of GPTAQ, arXiv 2504.02692).
- `compensated`: columns in the order of their importance, each rounded to the grid, its error passed on to the columns that
  follow (GPTQ, arXiv 2210.17323); then scales fitted and single codes changed where that lowers the error (coordinate descent,
  as QuantEase, arXiv 2309.01885). A row for which all this is no better than rounding to nearest is rounded to nearest.
"""

import torch
from torch import Tensor

from torchao_qig.errors import UserError
from torchao_qig.tensor import affine

SHRINKS = tuple(1 - i / 20 for i in range(11))  # 1 first: ties keep the whole range
BLOCK = 128  # columns whose errors are passed on at once


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """(N,): d H d^T of every row."""
    return ((difference @ gram) * difference).sum(-1)


def group_errors(difference: Tensor, gram: Tensor, group_size: int) -> Tensor:
    """(N, G): the same for every group alone, the others being exact."""
    columns = difference.shape[1]
    size = affine.group_width(columns, group_size)
    parts = zip(difference.split(size, 1), range(0, columns, size), strict=True)
    return torch.stack([row_errors(d, gram[i : i + size, i : i + size]) for d, i in parts], 1)


def clipped_qparams(
    w: Tensor, gram: Tensor, bits: int, group_size: int, symmetric: bool = False, official: bool = False, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """As `affine.choose_qparams`, each group's range shrunk to the best of `SHRINKS`."""
    best, scale, zero = (torch.empty(0),) * 3
    for shrink in SHRINKS:
        new_scale, new_zero = affine.choose_qparams(w, bits, group_size, symmetric, official, dtype, shrink)
        loss = group_errors(w - affine.nearest(w, new_scale, new_zero, bits, group_size), gram, group_size)
        if not best.numel():
            best, scale, zero = loss, new_scale, new_zero
        better = loss < best
        best, scale, zero = (torch.where(better, new, old) for new, old in ((loss, best), (new_scale, scale), (new_zero, zero)))
    return scale, zero


def damped(gram: Tensor, damping: float) -> Tensor:
    """The Gram matrix with `damping` times its mean diagonal on the diagonal; 1 for channels that are always 0."""
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    added = torch.where(diagonal > 0, diagonal.new_tensor(damping * mean), 1.0 if mean == 0 else mean)
    return gram + torch.diag(added)


def _cholesky(gram: Tensor, damping: float) -> Tensor:
    """Lower factor of the damped Gram matrix, with as much more damping as that takes."""
    while True:
        factor, info = torch.linalg.cholesky_ex(damped(gram, damping))
        if not int(info) and bool(torch.isfinite(factor).all()):
            return factor
        damping = max(10 * damping, 1e-6)
        if damping > 1e6:
            raise UserError("the Gram matrix of a linear's inputs contains NaN or infinity; look at the calibration batches")


def _inverse_factor(gram: Tensor) -> Tensor:
    """Upper U with U^T U = inverse of the Gram matrix, which itself is not formed."""
    upper = _cholesky(gram.flip(0, 1), 0.0).flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(gram), dtype=gram.dtype, device=gram.device), upper=True)


def target(w: Tensor, gram: Tensor, cross: Tensor, damping: float, share: float = 1.0) -> Tensor:
    """The weight whose outputs on x are nearest to those of `w` on the full-precision input x + d.

    `cross` is the weighted sum of d x^T. Damping pulls to `w`, and so does a `share` of the way below 1.
    """
    factor = _cholesky(gram, damping)
    return w + share * torch.cholesky_solve(cross.T @ w.T, factor).T


def _passed_on(w: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """GPTQ in the given order of columns; scale and zero are (N, K). Returns the distances from zero in steps."""
    w, steps = w.clone(), torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        part, errors = w[:, start:end], torch.empty_like(w[:, start:end])
        for i in range(end - start):
            column = start + i
            own = part[:, i : i + 1]
            steps[:, column : column + 1] = affine.nearest_steps(own, scale[:, column], zero[:, column], bits)
            errors[:, i] = (own[:, 0] - steps[:, column] * scale[:, column]) / factor[column, column]
            part[:, i + 1 :].addr_(errors[:, i], factor[column, column + 1 : end], alpha=-1)
        w[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return steps


def descend(w: Tensor, steps: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """One sweep over the columns: each code becomes the best one, the others given."""
    diagonal = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny)
    slope = (steps * scale - w) @ gram
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        inner, moved = gram[start:end, start:end], torch.zeros_like(w[:, start:end])
        here = slope[:, start:end].clone()
        for i in range(end - start):
            column = start + i
            before = steps[:, column] * scale[:, column]
            best = affine.nearest_steps((before - here[:, i] / diagonal[column]).unsqueeze(1), scale[:, column], zero[:, column], bits)[:, 0]
            moved[:, i] = best * scale[:, column] - before
            steps[:, column] = best
            here[:, i + 1 :].addr_(moved[:, i], inner[i, i + 1 :])
        slope[:, end:].addmm_(moved, gram[start:end, end:])
    return steps


def _fitted_scales(w: Tensor, steps: Tensor, gram: Tensor, scale: Tensor, group_size: int) -> Tensor:
    """(N, G): per group in turn the scale that fits its codes best, in its own dtype, where that is better."""
    size = affine.group_width(w.shape[1], group_size)
    wide = scale.to(w.dtype)
    slope = (steps * wide.repeat_interleave(size, 1) - w) @ gram
    new = scale.clone()
    for group, start in enumerate(range(0, w.shape[1], size)):
        part = steps[:, start : start + size]
        curve = row_errors(part, gram[start : start + size, start : start + size])
        tilt = (part * slope[:, start : start + size]).sum(1)
        fitted = affine.stored_scale(wide[:, group] - tilt / curve.clamp(min=torch.finfo(w.dtype).tiny), scale.dtype)
        change = fitted.to(w.dtype) - wide[:, group]
        better = (change * (2 * tilt + change * curve) < 0) & (fitted > wide[:, group] / 4)
        change = change * better
        new[:, group] = torch.where(better, fitted, scale[:, group])
        slope += (change.unsqueeze(1) * part) @ gram[start : start + size]
    return new


def compensated(
    w: Tensor, gram: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, damping: float = 0.01, sweeps: int = 2
) -> tuple[Tensor, Tensor]:
    """Codes (N, K) and scale (N, G) for a weight; `zero` stays.

    Args:
        w: (N, K), at least float32: what the rounded weight should act like.
        gram: (K, K), weighted inputs.
        scale, zero: (N, G), the grid, chosen beforehand.
        damping: part of the mean diagonal that is added to the diagonal.
        sweeps: rounds of fitting scales and descending after error has been passed on.
    """
    size = affine.group_width(w.shape[1], group_size)
    raw, gram = gram, damped(gram, damping)

    def wide(t: Tensor) -> Tensor:
        return t.to(w.dtype).repeat_interleave(size, 1)

    order = gram.diagonal().argsort(descending=True, stable=True)
    back = order.argsort()
    steps = _passed_on(w[:, order], _inverse_factor(gram[order][:, order]), wide(scale)[:, order], wide(zero)[:, order], bits)[:, back].contiguous()
    fitted = scale
    for _ in range(sweeps):
        fitted = _fitted_scales(w, steps, gram, fitted, group_size)
        steps = descend(w, steps, gram, wide(fitted), wide(zero), bits)
    plain = affine.nearest_steps(w.unflatten(1, (-1, size)), scale, zero, bits).flatten(1)
    better = row_errors(steps * wide(fitted) - w, raw) < row_errors(plain * wide(scale) - w, raw)
    codes = torch.where(better.unsqueeze(1), steps, plain) + wide(zero)
    return codes.to(torch.uint8), torch.where(better.unsqueeze(1), fitted, scale)
