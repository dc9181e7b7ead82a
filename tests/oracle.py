"""The published rules in plain lines, one run of weights at a time: what the vectorised code is compared with."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchao_qig import Equalize, QIGWeightOnlyConfig


def paper_mode(kind: type[QIGWeightOnlyConfig], changes: dict[str, Any], **settings: Any) -> QIGWeightOnlyConfig:
    """The paper's config, with these settings of its search changed."""
    config = kind.paper(verbose=False, **settings)
    (step,) = config.chosen_steps
    assert isinstance(step, Equalize)
    config.steps = [replace(step, **changes)]
    return config


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


def integer_linear(layer: nn.Linear, bits: int, s: Tensor | float = 1.0) -> Callable[[Tensor], Tensor]:
    """Specification 1.3 and 7.3: the layer with its weight times s rounded per row, and its input over s per token."""
    weight = official_symmetric(layer.weight.detach() * s, bits, -1)
    return lambda z: nn.functional.linear(official_symmetric((z / s).flatten(0, -2), 8, -1).view(z.shape), weight, layer.bias)


def integer_path_weights(f: Callable[[Tensor], Tensor], f_q: Callable[[Tensor], Tensor], start: Tensor, end: Tensor, points: int = 32) -> Tensor:
    """Specification 7.2: token weights (B, T) along the path from the quantized model's input; f_q is a constant, nothing is clipped."""
    gradient = torch.zeros_like(start)
    for alpha in torch.linspace(0, 1, points):
        z = (start + alpha * (end - start)).requires_grad_()
        (1000 * (f(z) - f_q(z).detach()).abs().mean(-1)).sum().backward()
        gradient += z.grad / points
    imp = ((end - start) * gradient).abs().mean(-1)
    return imp / imp.sum(1, keepdim=True).clamp(min=1.18e-38)


def path_weights(f: Callable[[Tensor], Tensor], f_q: Callable[[Tensor], Tensor], x: Tensor, points: int = 32) -> Tensor:
    """Specification 4.2: token weights (B, T) by the published sum of gradients, clipped at the quartiles."""
    gradient = torch.zeros_like(x)
    for alpha in torch.linspace(0, 1, points):
        z = (alpha * x).requires_grad_()
        (f(z) - f_q(z)).abs().mean(-1).sum().backward()
        gradient += z.grad / points
    imp = (x * gradient).abs().mean(-1)
    imp = imp / imp.sum(1, keepdim=True).clamp(min=1e-8)
    q1, q3 = torch.quantile(imp, 0.25, dim=1, keepdim=True), torch.quantile(imp, 0.75, dim=1, keepdim=True)
    w = torch.minimum(torch.maximum(imp, q1 - 1.5 * (q3 - q1)), q3 + 1.5 * (q3 - q1))
    return w / w.sum(1, keepdim=True).clamp(min=1e-8)


def candidate_scales(x: Tensor, grid: int = 20) -> list[Tensor]:
    """Specification 3."""
    a = x.abs().flatten(0, 1).mean(0)
    scales = [(a ** (k / grid)).clamp(min=1e-4) for k in range(grid)]
    return [s / (s.max() * s.min()).sqrt() for s in scales]


class OfficialGroup:
    """A group of linears of a module, as specification 4 looks at it: everything by calling the module with other weights."""

    def __init__(self, module: nn.Module, layers: list[nn.Linear], x: Tensor, call: Callable[[nn.Module, Tensor], Tensor], bits: int, size: int) -> None:
        self.module, self.layers, self.x, self.call, self.bits, self.size = module, layers, x, call, bits, size

    def _with(self, weights: dict[nn.Linear, Tensor], z: Tensor) -> Tensor:
        before = {layer: layer.weight for layer in weights}
        try:
            for layer, weight in weights.items():
                layer.weight = nn.Parameter(weight, requires_grad=False)
            return self.call(self.module, z)
        finally:
            for layer, weight in before.items():
                layer.weight = weight

    def replaced(self, forwards: dict[nn.Linear, Callable[[Tensor], Tensor]], z: Tensor) -> Tensor:
        """The module's output with these forwards of linears."""
        try:
            for layer, forward in forwards.items():
                layer.forward = forward
            return self.call(self.module, z)
        finally:
            for layer in forwards:
                del layer.forward

    def token_weights(self) -> Tensor:
        inside = [m for m in self.module.modules() if isinstance(m, nn.Linear)]
        quantized = {m: official_asymmetric(m.weight.detach(), self.bits, self.size) for m in inside}
        return path_weights(lambda z: self._with({}, z), lambda z: self._with(quantized, z), self.x)

    def losses(self, token_loss: Callable[[Tensor], Tensor]) -> list[float]:
        """Of all candidates; `token_loss` makes a number of the difference of outputs (B, T, C)."""
        with torch.no_grad():
            reference = self._with({}, self.x)
            found = []
            for s in candidate_scales(self.x):
                weights = {m: official_asymmetric(m.weight.detach() * s, self.bits, self.size) / s for m in self.layers}
                found.append(float(token_loss(reference - self._with(weights, self.x))))
        return found
