"""How much a quantization error at each token matters: the token weights of a group of linears.

A group's linears receive the same input x (B samples, T tokens, C channels) inside an inspected module f; f_q is f with
quantized linears. `qig` weighs a token by the integrated gradient of the difference, along the straight path from a
baseline (zero) to x (QIG, arXiv 2603.17809; integrated gradients, arXiv 1703.01365):

    D(z) = sum over tokens of mean over channels |f(z) - f_q(z)|,   IG = x * integral over a in [0, 1] of dD/dz (a x)

- "riemann": the published sum, `steps` points from 0 to 1 with both ends, equal weights.
- "gauss": D's gradient is J(a)^T sign(f - f_q), a smooth Jacobian times signs that jump; the jumps are why the published sum
  needs many points. So the two are treated apart (product integration): f - f_q is interpolated between the points, which
  says where along the path each of its channels changes sign, and J is interpolated by a polynomial through the
  Gauss-Legendre points of a panel; the integral of polynomial times sign is then known. The path has 3 panels of 2 points, or 1
  of 4 where that agrees; both come closer to 512 Riemann points than 32 Riemann points do (tests/calibration/test_sensitivity.py).
- Where f is one linear, f - f_q is linear in z and the integral is known: `integrate_linear`.

The linears that start f are linear on the path too, so they are evaluated at its two ends only (`starts`, `ends` below)
and their transposes once, on the summed gradients.

A batch's weights have shape (B, T); `counted` (B, T) is False on padding, which then counts in nothing.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

COARSE, FINE = 4, 6  # points of the Gauss rules: one panel of 4, three panels of 2
RIEMANN = 32  # points of the published sum
SIGNS = 32  # number of places along the path where signs are taken


class Rule(NamedTuple):
    """Points on [0, 1]. `panels` > 0: product integration in so many panels; 0: a plain sum with `weights`."""

    nodes: list[float]
    weights: list[float]
    panels: int


class Attribution(NamedTuple):
    """Integrated gradients with respect to the outputs of the linears, and D per sample at both ends of the path."""

    gradients: list[Tensor]
    start: Tensor
    end: Tensor


def legendre(points: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of the Gauss-Legendre rule on [0, 1]."""
    nodes, weights = (a.tolist() for a in np.polynomial.legendre.leggauss(points))
    return [(x + 1) / 2 for x in nodes], [w / 2 for w in weights]


def rule(quadrature: str, steps: int) -> Rule:
    """The points of "riemann" or "gauss"."""
    if quadrature == "riemann":
        return Rule([j / (steps - 1) for j in range(steps)] if steps > 1 else [1.0], [1 / steps] * steps, 0)
    panels = steps // 2 if steps >= FINE and steps % 2 == 0 else 1
    points, weights = legendre(steps // panels)
    nodes = [(p + x) / panels for p in range(panels) for x in points]
    return Rule(nodes, [w / panels for _ in range(panels) for w in weights], panels)


def _lagrange(nodes: list[float], at: float) -> list[float]:
    """Values at `at` of the polynomials that are 1 at one node and 0 at the others."""
    return [math.prod((at - other) / (node - other) for other in nodes if other != node) for node in nodes]


def _sign_matrices(points: Rule) -> tuple[Tensor, Tensor]:
    """Two matrices: one interpolates f - f_q from the ends and nodes to the places where signs are taken; the other gives from the signs there
    a factor for every node."""
    known = [0.0, *points.nodes, 1.0]
    per_panel = -(-SIGNS // points.panels)
    in_panel = len(points.nodes) // points.panels
    interpolate, integrate = torch.zeros(points.panels * per_panel, len(known)), torch.zeros(len(points.nodes), points.panels * per_panel)
    for m in range(points.panels * per_panel):
        at = (m + 0.5) / (points.panels * per_panel)
        near = sorted(range(len(known)), key=lambda i: (abs(known[i] - at), i))[:6]  # local: a far node says little
        interpolate[m, near] = torch.tensor(_lagrange([known[i] for i in near], at))
        first = m // per_panel * in_panel
        integrate[first : first + in_panel, m] = torch.tensor(_lagrange(points.nodes[first : first + in_panel], at)) / (points.panels * per_panel)
    return interpolate, integrate


def _distance(u: Tensor, counted: Tensor) -> Tensor:
    """D of every sample, from u = f - f_q."""
    return (u.abs().mean(-1) * counted).sum(1)


def _sign_factors(u: list[Tensor], points: Rule) -> list[Tensor]:
    """For every node the integral of its polynomial times the sign of f - f_q; `u`: values at both ends and the nodes."""
    interpolate, integrate = (m.to(u[0].device) for m in _sign_matrices(points))
    flat = torch.stack([v.flatten() for v in u])
    factors = torch.empty(len(points.nodes), flat.shape[1], device=flat.device)
    for part, out in zip(flat.split(2**14, 1), factors.split(2**14, 1), strict=True):  # stays in the processor's cache
        torch.mm(integrate, torch.mm(interpolate, part).sign_(), out=out)
    return [f.view(u[0].shape) for f in factors]


def integrate(
    difference: Callable[[list[Tensor]], Tensor],
    starts: list[Tensor | None],
    ends: list[Tensor],
    points: Rule,
    counted: Tensor,
    at_start: Tensor | None = None,
    at_end: Tensor | None = None,
) -> Attribution:
    """Integrate dD/dy over the path of `ys` from `starts` (None: zero) to `ends`.

    `difference(ys)` is u = f - f_q in float32, (B, T, channels); `at_start` and `at_end` are its values there, if known.
    """

    def at(alpha: float) -> list[Tensor]:
        return [e * alpha if s is None else torch.lerp(s, e, alpha) for s, e in zip(starts, ends, strict=True)]

    total: dict[int, Tensor] = {}

    def add(ys: list[Tensor], u: Tensor, factor: Tensor) -> None:
        seed = factor * (counted.unsqueeze(-1) / u.shape[-1])
        for i, g in enumerate(torch.autograd.grad(u, ys, seed, allow_unused=True)):
            if g is not None:
                total[i] = total[i].add_(g) if i in total else g.float()

    with torch.no_grad():
        first = difference(at(0.0)) if at_start is None else at_start
        last = difference(at(1.0)) if at_end is None else at_end
    graphs = []
    with torch.enable_grad():
        for alpha, weight in zip(points.nodes, points.weights, strict=True):
            ys = [y.requires_grad_() for y in at(alpha)]
            u = difference(ys)
            if points.panels:
                graphs.append((ys, u))
            else:
                add(ys, u, torch.sign(u.detach()) * weight)
    if graphs:
        for factor in _sign_factors([first, *(u.detach() for _, u in graphs), last], points):
            add(*graphs.pop(0), factor)  # frees what its backward pass kept
    gradients = [total[i] if i in total else torch.zeros_like(e) for i, e in enumerate(ends)]
    return Attribution(gradients, _distance(first, counted), _distance(last, counted))


def integrate_linear(u: Tensor, points: Rule, counted: Tensor) -> Attribution:
    """Like `integrate`, where f is one linear: u = x (W - W_q)^T. The gradient is with respect to u."""
    covered = sum(w for a, w in zip(points.nodes, points.weights, strict=True) if a > 0)  # the point 0 adds nothing, since sign(0) = 0
    gradient = torch.sign(u) * (counted.unsqueeze(-1) * (covered / u.shape[-1]))
    return Attribution([gradient.to(u.dtype)], torch.zeros_like(counted[:, 0], dtype=torch.float32), _distance(u.float(), counted))


def importance(path: Tensor, gradient: Tensor) -> Tensor:
    """|IG| of every token: the mean over input channels; `path` is x minus the baseline."""
    return (path * gradient).abs().mean(-1).float()


def completeness_error(path: Tensor, gradient: Tensor, found: Attribution, counted: Tensor) -> Tensor:
    """Per sample: by how much the sum of the attributions misses D(x) - D(baseline), relative to it."""
    attributed = ((path * gradient).float().sum(-1) * counted).sum(1)
    change = found.end - found.start
    return (attributed - change).abs() / change.abs().clamp(min=torch.finfo(torch.float32).tiny)


def shares(x: Tensor, floor: float) -> Tensor:
    """Each sample's values over their sum."""
    return x / x.sum(1, keepdim=True).clamp(min=floor)


def uniform(counted: Tensor) -> Tensor:
    """The same weight for every counted token; a sample's weights sum to 1."""
    return shares(counted.float(), 1e-8)


def clipped(raw: Tensor, counted: Tensor, fallback: bool = True) -> Tensor:
    """Turn importance into weights: shares of the sample's sum, clipped at 1.5 interquartile ranges beyond the quartiles, and made shares again.

    A sample whose importance is zero everywhere gets uniform weights (`fallback`; the published code leaves zeros).
    """
    imp = shares(raw.float() * counted, 1e-8)
    quantile = torch.quantile if bool(counted.all()) else torch.nanquantile
    known = imp if bool(counted.all()) else imp.masked_fill(~counted, torch.nan)
    q1, q3 = (quantile(known, q, dim=1, keepdim=True).nan_to_num() for q in (0.25, 0.75))
    low, high = q1 - 1.5 * (q3 - q1), q3 + 1.5 * (q3 - q1)
    weights = shares(torch.minimum(torch.maximum(imp, low), high) * counted, 1e-8)
    return torch.where((raw * counted).sum(1, keepdim=True) > 0, weights, uniform(counted)) if fallback else weights


def by_modality(answer: Tensor, vision: Tensor, ratio: float, counts: tuple[float, float], squared: bool) -> Tensor:
    """MBQ: answer tokens weigh 1 and vision tokens `ratio`; `counts` are their numbers over all samples.

    The published code divides each modality by its own count for squared errors and both by their sum for absolute ones.
    """
    n_answer, n_vision = (max(c, 1.0) for c in counts) if squared else (max(sum(counts), 1.0),) * 2
    return answer.float() / n_answer + ratio * vision.float() / n_vision
