"""The published rules in plain lines, one run of weights at a time: what the vectorised code is compared with."""

import torch
from torch import Tensor


def runs_of(w: Tensor, size: int) -> list[tuple[int, slice]]:
    size = w.shape[1] if size == -1 else size
    return [(row, slice(start, start + size)) for row in range(w.shape[0]) for start in range(0, w.shape[1], size)]


def official_asymmetric(w: Tensor, bits: int, size: int) -> Tensor:
    """Specification 1.1: range of the run, zero clamped into the grid."""
    out, top = torch.empty_like(w), 2**bits - 1
    for row, run in runs_of(w, size):
        v = w[row, run]
        step = torch.clamp(v.max() - v.min(), min=1e-5) / top
        zero = torch.clamp(-torch.round(v.min() / step), 0, top)
        out[row, run] = (torch.clamp(torch.round(v / step) + zero, 0, top) - zero) * step
    return out


def official_symmetric(w: Tensor, bits: int, size: int) -> Tensor:
    """Specification 1.2: largest magnitude of the run."""
    out, top = torch.empty_like(w), 2 ** (bits - 1) - 1
    for row, run in runs_of(w, size):
        v = w[row, run]
        step = torch.clamp(v.abs().max(), min=1e-5) / top
        out[row, run] = torch.clamp(torch.round(v / step), -top - 1, top) * step
    return out
