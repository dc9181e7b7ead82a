"""Calibrate one block whose linears will multiply integers: weights and activations are both rounded.

What differs from `Block`: a candidate is tried with its input divided by the scale and rounded, token by token; and the integrated
gradients run from the input that the model quantized so far has, x_q, to the one of full precision, x:

    D(z) = sum over tokens of mean over channels |f(z) - f_q(z)|,   IG = (x - x_q) * integral over a of dD/dz (x_q + a (x - x_q))

Rounding lets no gradient through, so f_q is a constant for the derivative: the gradient is that of f, with the signs of f - f_q.
These signs jump with every code, so f - f_q is not interpolated between points; a plain sum over Gauss-Legendre points is taken.
Errors are measured against f(x_q), as the published code does, or against f(x) with `propagate_error`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_qig.calibrate import ranks, search, sensitivity
from torchao_qig.calibrate.block import Block, returning
from torchao_qig.calibrate.groups import Group
from torchao_qig.calibrate.observer import Call
from torchao_qig.calibrate.tokens import Layout
from torchao_qig.calibrate.work import Part, Work
from torchao_qig.formats.base import Product

POINTS = 8  # of the Gauss-Legendre sum: token weights within 1 to 2 % of their mean of those of a fine sum (tests/calibrate/test_int8.py)


def smoothing_scale(work: Work, weights: list[Tensor], alpha: float) -> Tensor:
    """SmoothQuant (arXiv 2211.10438): max |x| ** alpha / max |W| ** (1 - alpha) per channel."""
    widest = torch.stack([w.abs().amax(0) for w in weights]).amax(0).float()
    peaks = [p.to(widest.device) for p in ranks.gathered(None if work.peak is None else work.peak.cpu()) if p is not None]
    peak = torch.stack(peaks).amax(0) if peaks else torch.ones_like(widest)
    return (peak.clamp(min=search.FLOOR) ** alpha / widest.clamp(min=search.FLOOR) ** (1 - alpha)).clamp(min=search.FLOOR)


class Int8Block(Block):
    """A block on the compute device; `products` are by linear what its rounded form does, see `LinearForm.product`."""

    def __init__(self, *args: Any, products: dict[str, Callable[[Tensor, Tensor | None], Product]]) -> None:
        super().__init__(*args)
        self.products = products
        self._plain: dict[str, Product] = {}

    def product(self, name: str) -> Product:
        """A linear plainly rounded, bias and all."""
        if name not in self._plain:
            self._plain[name] = self._with_bias(name, self.products[name](self.weight(name), None))
        return self._plain[name]

    def _with_bias(self, name: str, product: Product) -> Product:
        bias = self.bias(name)
        return product if bias is None else lambda x: product(x) + bias

    def _exact(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weight(name).to(self.dtype), self.bias(name))

    def weigh(self, work: Work, weighting: str, ratio: float, counts: tuple[float, float]) -> None:
        """Also settles what candidates are compared with."""
        for part in work.parts:
            if self.config.equalizes and not self.config.propagate_error and (work.group.alone or part.exact_x is not None):
                part.seen = part.seen._replace(out=self.store.put(self._reference(work.group, part)))
        if weighting == "qig" and all(part.exact_x is None for part in work.parts):
            weighting = "uniform"  # a router's choice of rows: no two inputs to compare, no path between them
        super().weigh(work, weighting, ratio, counts)

    def _reference(self, group: Group, part: Part) -> Tensor:
        """The inspected module's exact output on the input at hand."""
        seen = self.ready(part)
        with torch.no_grad():
            return self._exact(group.linears[0], seen.x) if group.alone else self.inspect(group, seen.call, {}, part.layout)

    # Token weights

    def points(self, work: Work) -> sensitivity.Rule:
        if self.config.quadrature == "riemann":
            return sensitivity.rule("riemann", self.config.steps or sensitivity.RIEMANN)
        return sensitivity.Rule(*sensitivity.legendre(self.config.steps or POINTS), panels=0)

    def importance(self, group: Group, part: Part, points: sensitivity.Rule) -> tuple[Tensor, Tensor]:
        """Token importance; there is nothing that it should add up to, since f_q counts as a constant."""
        seen, place = self.ready(part), part.layout
        start, end = seen.x, part.exact.to(self.device, self.dtype).view(seen.x.shape)
        ends = [(self._exact(n, start), self._exact(n, end)) for n in group.linears]
        total = [torch.zeros_like(a) for a, _ in ends]
        for alpha, weight in zip(points.nodes, points.weights, strict=True):
            ys = [torch.lerp(a, b, alpha).requires_grad_() for a, b in ends]
            with torch.no_grad():
                rounded = self._rounded_at(group, torch.lerp(start, end, alpha), seen.call, place)
            with torch.enable_grad():
                f = place.view(ys[0]) if group.alone else self.inspect(group, seen.call, dict(zip(group.linears, map(returning, ys), strict=True)), place)
                seed = torch.sign(f.detach() - rounded) * (weight * place.counted.unsqueeze(-1) / f.shape[-1])
                for so_far, gradient in zip(total, torch.autograd.grad(f, ys, seed, allow_unused=True), strict=True):
                    if gradient is not None:
                        so_far += gradient
        gradient = sum((place.view(g) @ self.weight(n).to(self.dtype) for n, g in zip(group.linears, total, strict=True)), torch.zeros(()))
        return sensitivity.importance(place.view(end - start), gradient), torch.full((place.counted.shape[0],), torch.nan)

    def _rounded_at(self, group: Group, z: Tensor, call: Call, place: Layout) -> Tensor:
        """f_q(z)."""
        if group.alone:
            return place.view(self.product(group.linears[0])(z))
        outer = {n: returning(self.product(n)(z)) for n in group.linears}
        return self.inspect(group, call, {n: self.product(n) for n in group.inside} | outer, place)

    def shares(self, raw: Tensor, place: Layout) -> Tensor:
        """The published code leaves out the clipping here."""
        if not self.config.official:
            return super().shares(raw, place)
        return sensitivity.shares(raw, torch.finfo(torch.float32).tiny)

    # Scales

    def tried(self, name: str, weight: Tensor, scale: Tensor | None) -> Any:
        """A linear as a candidate makes it: here its product."""
        return self.product(name) if scale is None else self._with_bias(name, self.products[name](weight, scale))

    def error(self, group: Group, part: Part, weights: dict[str, Tensor], tried: dict[str, Any], squared: bool, plain: bool) -> float:
        assert part.weights is not None
        seen, place = self.ready(part), part.layout
        out = place.view(tried[group.linears[0]](seen.x)) if group.alone else self.inspect(group, seen.call, tried, place)
        errors = search.token_errors(place.view(seen.out), out, squared)
        return float((errors * place.from_grid(part.weights)).sum(dtype=torch.float64))

    def grams(self, work: Work) -> None:
        """Inputs are other ones for every candidate."""
