"""Round a linear's weight so that its outputs, not its weights, change least: pure functions of the weight and a Gram matrix.

The error of a rounded weight Q is tr((W - Q) H (W - Q)^T) with H = sum over tokens of weight * x x^T, x being the input that the
quantized model really has. Every row of W has an error of its own, so all of this goes row by row in parallel.

- `target`: the weight that gives x the full-precision output best, in the least-squares sense (the aim of GPTAQ, arXiv 2504.02692).
- `compensated`: columns in the order of their importance, each rounded to the nearest value that its format can store, its error passed on to the
  columns that follow (GPTQ, arXiv 2210.17323); then parameters fitted and single codes changed where that lowers the error (coordinate descent,
  as QuantEase, arXiv 2309.01885). Rows that do not improve fall back to rounding to nearest.
"""

import torch
from torch import Tensor

from torchao_qig.errors import UserError
from torchao_qig.formats.base import CodedFormat, Params, row_errors

BLOCK = 128  # columns whose errors are passed on at once


def damped(gram: Tensor, damping: float) -> Tensor:
    """The Gram matrix with `damping` times its mean diagonal on the diagonal; 1 for channels that are always 0."""
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    added = torch.where(diagonal > 0, diagonal.new_tensor(damping * mean), 1.0 if mean == 0 else mean)
    return gram + torch.diag(added)


def _cholesky(gram: Tensor, damping: float) -> Tensor:
    """Lower factor of the damped Gram matrix. Damping is raised until the matrix has one."""
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

    `cross` is the weighted sum of d x^T. `share` says how far to go from `w` to that weight, 0 to 1; damping keeps it nearer to `w`, too.
    """
    factor = _cholesky(gram, damping)
    return w + share * torch.cholesky_solve(cross.T @ w.T, factor).T


def _column(params: Params, column: int) -> Params:
    return tuple(p[:, column : column + 1] for p in params)


def _passed_on(w: Tensor, factor: Tensor, fmt: CodedFormat, spread: Params) -> tuple[Tensor, Tensor]:
    """GPTQ: round the columns in the given order, and pass the error of each on to those that follow.

    `spread` has the parameters in the same order. Returns codes and values.
    """
    w, codes, values = w.clone(), torch.empty_like(w), torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        part, errors = w[:, start:end], torch.empty_like(w[:, start:end])
        for i in range(end - start):
            column = start + i
            code, value = fmt.nearest(part[:, i : i + 1], _column(spread, column))
            codes[:, column], values[:, column] = code[:, 0], value[:, 0]
            errors[:, i] = (part[:, i] - value[:, 0]) / factor[column, column]
            part[:, i + 1 :].addr_(errors[:, i], factor[column, column + 1 : end], alpha=-1)
        w[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    return codes, values


def descend(w: Tensor, codes: Tensor, values: Tensor, gram: Tensor, fmt: CodedFormat, spread: Params) -> tuple[Tensor, Tensor]:
    """One sweep over the columns: each code becomes the best one while all others stay. Returns `codes` and `values`, changed in place."""
    diagonal = gram.diagonal().clamp(min=torch.finfo(gram.dtype).tiny)
    slope = (values - w) @ gram
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        inner, moved = gram[start:end, start:end], torch.zeros_like(w[:, start:end])
        here = slope[:, start:end].clone()
        for i in range(end - start):
            column = start + i
            before = values[:, column].clone()
            code, value = fmt.nearest((before - here[:, i] / diagonal[column]).unsqueeze(1), _column(spread, column))
            codes[:, column], values[:, column] = code[:, 0], value[:, 0]
            moved[:, i] = value[:, 0] - before
            here[:, i + 1 :].addr_(moved[:, i], inner[i, i + 1 :])
        slope[:, end:].addmm_(moved, gram[start:end, end:])
    return codes, values


def compensated(w: Tensor, gram: Tensor, fmt: CodedFormat, params: Params, damping: float = 0.01, sweeps: int = 2) -> tuple[Tensor, Params]:
    """Choose codes (N, K) and parameters for a weight by compensated rounding.

    Args:
        w: (N, K), at least float32: what the rounded weight should act like.
        gram: (K, K), weighted inputs.
        fmt: how the weight is stored.
        params: what `fmt.fit` chose beforehand.
        damping: what is added to the diagonal of `gram`, relative to the diagonal's mean.
        sweeps: rounds of fitting parameters and descending after errors have been passed on.
    """
    raw, gram, columns = gram, damped(gram, damping), w.shape[1]
    first = fmt.spread(params, columns, w.dtype)
    order = gram.diagonal().argsort(descending=True, stable=True)
    back = order.argsort()
    found = _passed_on(w[:, order], _inverse_factor(gram[order][:, order]), fmt, tuple(p[:, order] for p in first))
    codes, values = (t[:, back].contiguous() for t in found)
    fitted = params
    for _ in range(sweeps):
        fitted = fmt.refit(w, codes, fitted, gram)
        codes, values = descend(w, codes, fmt.dense(codes, fitted, w.dtype), gram, fmt, fmt.spread(fitted, columns, w.dtype))
    plain, plain_values = fmt.nearest(w, first)
    better = row_errors(values - w, raw) < row_errors(plain_values - w, raw)
    return _by_row(better, codes, plain), tuple(_by_row(better, new, old) for new, old in zip(fitted, params, strict=True))


def _by_row(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The chosen rows of `a`, the others of `b`."""
    return torch.where(chosen.view(-1, *[1] * (a.dim() - 1)), a, b)
