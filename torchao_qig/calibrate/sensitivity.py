"""How much a quantization error at each token matters: the token weights of a group of linears.

A group's linears receive the same input x (B samples, T tokens, C channels) inside an inspected module f; f_q is f with
quantized linears. `qig` weighs a token by the integrated gradient of the difference, along the straight path from a
baseline (zero) to x (QIG, arXiv 2603.17809; integrated gradients, arXiv 1703.01365):

    D(z) = sum over tokens of mean over channels |f(z) - f_q(z)|,   IG = x * integral over a in [0, 1] of dD/dz (a x)

- Riemann: the published sum, `steps` points from 0 to 1 with both ends, equal weights.
- Gauss: a one-point Gauss rule in each of `steps` equal cells. D's gradient jumps wherever a channel of f - f_q changes
  sign, which is what makes the published sum need many points; so each cell uses the *average* sign over the cell, with
  f - f_q taken as linear between neighbouring points. 6 such points come closer to 512 Riemann points than 32 Riemann
  points do (tests/calibrate/test_sensitivity.py).
- Where f is one linear, f - f_q is linear in z and the integral is known: `integrate_linear`.

The linears that start f are linear on the path too, so they are evaluated at its two ends only (`starts`, `ends` below)
and their transposes once, on the summed gradients.

A batch's weights have shape (B, T); `counted` (B, T) is False on padding, which then counts in nothing.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

STEPS = {"gauss": 6, "riemann": 32}  # default number of points of each rule


class Rule(NamedTuple):
    """A quadrature on [0, 1]."""

    nodes: list[float]
    weights: list[float]
    averages_signs: bool


class Attribution(NamedTuple):
    """Integrated gradients with respect to the outputs of the linears, and D per sample at both ends of the path."""

    gradients: list[Tensor]
    start: Tensor
    end: Tensor


def rule(quadrature: str, steps: int | None = None) -> Rule:
    """The points of "riemann" or "gauss"."""
    n = steps or STEPS[quadrature]
    if quadrature == "gauss":
        return Rule([(j + 0.5) / n for j in range(n)], [1 / n] * n, True)
    return Rule([j / max(n - 1, 1) for j in range(n)] if n > 1 else [1.0], [1 / n] * n, False)


def _distance(u: Tensor, counted: Tensor) -> Tensor:
    """D of every sample, from u = f - f_q."""
    return (u.abs().mean(-1) * counted).sum(1)


def _average_sign(a: Tensor, b: Tensor) -> Tensor:
    """Mean sign of a function that goes linearly from a to b."""
    return torch.where(a * b < 0, (a + b) / (a.abs() + b.abs()), torch.sign(a + b))


def _cell_signs(u: list[Tensor], nodes: list[float]) -> list[Tensor]:
    """Mean sign over the cell around every inner node, from values at the nodes and at both ends of the path."""
    at = [0.0, *nodes, 1.0]
    signs = []
    for j in range(1, len(at) - 1):
        low, high = (j - 1) / len(nodes), j / len(nodes)
        left = torch.lerp(u[j], u[j - 1], (at[j] - low) / (at[j] - at[j - 1]))
        right = torch.lerp(u[j], u[j + 1], (high - at[j]) / (at[j + 1] - at[j]))
        signs.append((_average_sign(left, u[j]) + _average_sign(u[j], right)) / 2)
    return signs


def integrate(difference: Callable[[list[Tensor]], Tensor], starts: list[Tensor], ends: list[Tensor], points: Rule, counted: Tensor) -> Attribution:
    """Integrate dD/dy over the path of `ys` from `starts` to `ends`; `difference(ys)` is u = f - f_q, (B, T, channels)."""

    def at(alpha: float) -> list[Tensor]:
        return [torch.lerp(s, e, alpha) for s, e in zip(starts, ends, strict=True)]

    total = [torch.zeros_like(e) for e in ends]

    def add(ys: list[Tensor], u: Tensor, sign: Tensor, weight: float) -> None:
        seed = sign * (counted.unsqueeze(-1) * (weight / u.shape[-1]))
        for t, g in zip(total, torch.autograd.grad(u, ys, seed.to(u.dtype), allow_unused=True), strict=True):
            if g is not None:
                t += g

    with torch.no_grad():
        first, last = difference(at(0.0)), difference(at(1.0))
    with torch.enable_grad():
        graphs = []
        for alpha, weight in zip(points.nodes, points.weights, strict=True):
            ys = [y.requires_grad_() for y in at(alpha)]
            u = difference(ys)
            if points.averages_signs:
                graphs.append((ys, u, weight))
            else:
                add(ys, u, torch.sign(u.detach()), weight)
    if graphs:
        signs = _cell_signs([first, *(u.detach() for _, u, _ in graphs), last], points.nodes)
        for sign in signs:
            add(*graphs[0][:2], sign, graphs[0][2])
            del graphs[0]  # frees what its backward pass kept
    return Attribution(total, _distance(first, counted), _distance(last, counted))


def integrate_linear(u: Tensor, points: Rule, counted: Tensor) -> Attribution:
    """The same where f is one linear: u = x (W - W_q)^T; the gradient is with respect to u."""
    covered = sum(w for a, w in zip(points.nodes, points.weights, strict=True) if a > 0)  # sign(0) = 0
    gradient = torch.sign(u) * (counted.unsqueeze(-1) * (covered / u.shape[-1]))
    return Attribution([gradient.to(u.dtype)], torch.zeros_like(counted[:, 0], dtype=torch.float32), _distance(u.float(), counted))


def importance(path: Tensor, gradient: Tensor) -> Tensor:
    """|IG| of every token: the mean over input channels; `path` is x minus the baseline."""
    return (path * gradient).abs().mean(-1).float()


def completeness_error(path: Tensor, gradient: Tensor, found: Attribution, counted: Tensor) -> Tensor:
    """Per sample: by how much the attributions miss D(x) - D(baseline), relative to it."""
    attributed = ((path * gradient).float().sum(-1) * counted).sum(1)
    change = found.end - found.start
    return (attributed - change).abs() / change.abs().clamp(min=torch.finfo(torch.float32).tiny)


def _shares(x: Tensor, floor: float) -> Tensor:
    return x / x.sum(1, keepdim=True).clamp(min=floor)


def uniform(counted: Tensor) -> Tensor:
    """The same weight for every counted token; a sample's weights sum to 1."""
    return _shares(counted.float(), 1e-8)


def clipped(raw: Tensor, counted: Tensor, fallback: bool = True) -> Tensor:
    """Importance -> weights: shares of the sample, clipped at 1.5 interquartile ranges beyond the quartiles, shares again.

    A sample whose importance is zero everywhere gets uniform weights (`fallback`; the published code leaves zeros).
    """
    imp = _shares(raw.float() * counted, 1e-8)
    quantile = torch.quantile if bool(counted.all()) else torch.nanquantile
    known = imp if bool(counted.all()) else imp.masked_fill(~counted, torch.nan)
    q1, q3 = (quantile(known, q, dim=1, keepdim=True).nan_to_num() for q in (0.25, 0.75))
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    weights = _shares(torch.minimum(torch.maximum(imp, low), high) * counted, 1e-8)
    return torch.where((raw * counted).sum(1, keepdim=True) > 0, weights, uniform(counted)) if fallback else weights


def by_modality(answer: Tensor, vision: Tensor, ratio: float, counts: tuple[float, float], squared: bool) -> Tensor:
    """MBQ: answer tokens weigh 1 and vision tokens `ratio`; `counts` are their numbers over all samples.

    The published code divides each modality by its own count for squared errors and both by their sum for absolute ones.
    """
    n_answer, n_vision = (max(c, 1.0) for c in counts) if squared else (max(sum(counts), 1.0),) * 2
    return answer.float() / n_answer + ratio * vision.float() / n_vision
