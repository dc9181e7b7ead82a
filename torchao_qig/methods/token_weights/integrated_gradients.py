"""The integrated gradients of one group of linears: `attribution.py` applied to a block that runs.

There are two paths. Where linears do not round their inputs, the path runs from zero to the input (`_from_zero`). Where they do, it runs from the input in
the model as quantized so far, x_q, to the full-precision input, x (`_between_inputs`):

    D(z) = sum over tokens of mean over channels |f(z) - f_q(z)|,   IG = (x - x_q) * integral over a of dD/dz (x_q + a (x - x_q))

Rounding lets no gradient through, so f_q is a constant for the derivative there: the gradient is that of f, with the signs of f - f_q.
These signs jump with every code, so f - f_q is not interpolated between points; a plain sum over Gauss-Legendre points is taken.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_qig.methods.nearest import NearestLinears
from torchao_qig.methods.token_weights import attribution
from torchao_qig.watch.block import Block, GroupBatch, some_samples
from torchao_qig.watch.groups import Group
from torchao_qig.watch.observer import Call, RecordedCall
from torchao_qig.watch.token_layout import Layout


class GroupIntegral:
    """Token weights of one group. `rounds`: whether the linears round their inputs."""

    def __init__(self, block: Block, nearest: NearestLinears, group: Group, paper_rules: bool, rounds: bool) -> None:
        self.block, self.nearest, self.group, self.paper_rules, self.rounds = block, nearest, group, paper_rules, rounds
        self.rounded_outs: list[Tensor] = []  # outputs with the group rounded to nearest: they are computed here anyway, and a search needs them
        self._starts_at_zero = False  # whether f and f_q agree at zero

    def weights(self, part: GroupBatch, rule: attribution.Rule) -> tuple[Tensor, Tensor]:
        """Token weights and completeness errors. Only a quarter of the usual number of tokens is computed at once, since autograd graphs are kept."""
        place, size = part.layout, part.layout.grid.shape[0]
        at_once = max(1, self.block.stream.tokens_at_once // 4 // place.grid.shape[1])
        if size > at_once and self.block.stream.cuttable and not self.group.alone and place.rows is None:
            cuts = [some_samples(part, list(range(low, min(low + at_once, size)))) for low in range(0, size, at_once)]
            found = [self.weights(cut, rule) for cut in cuts if cut is not None and cut is not part]
            if found:
                weights, errors = zip(*found, strict=True)
                return torch.cat(weights), torch.cat(errors)
        raw, error = self._between_inputs(part, rule) if self.rounds else self._from_zero(part, rule)
        return self._shares(place.to_grid(raw), place), error

    def _shares(self, raw: Tensor, place: Layout) -> Tensor:
        """Turn the importance of a grid's tokens into their weights."""
        if self.rounds and self.paper_rules:  # the published code leaves out the clipping here
            return attribution.shares(raw, torch.finfo(torch.float32).tiny)
        return attribution.clipped(raw, place.grid, fallback=not self.paper_rules)

    def _weight(self, name: str) -> Tensor:
        return self.block.weight(name).to(self.block.dtype)

    # From zero

    def _from_zero(self, part: GroupBatch, rule: attribution.Rule) -> tuple[Tensor, Tensor]:
        """The importance of every token, and completeness errors, for the path from zero to the input."""
        seen, place, group = self.block.ready(part), part.layout, self.group
        x, counted = place.view(seen.x), place.counted
        if group.alone:
            with torch.no_grad():
                difference = self._weight(group.linears[0]) - self.nearest.weight(group.linears[0])
                found = attribution.integrate_linear(F.linear(x, difference), rule, counted)
                gradient = found.gradients[0] @ difference
        else:
            found = self._integrate(seen, place, rule)
            weights = [self._weight(n) for n in group.linears] + [self.nearest.weight(n) for n in group.linears]
            with torch.no_grad():
                terms = (place.view(g.to(w.dtype)) @ w for g, w in zip(found.gradients, weights, strict=True))
                gradient = sum(terms, torch.zeros_like(x))
        return attribution.importance(x, gradient), attribution.completeness_error(x, gradient, found, counted)

    def _integrate(self, seen: RecordedCall, place: Layout, rule: attribution.Rule) -> attribution.Attribution:
        """Integrate along the path from zero. f and f_q are functions of the outputs of the group's linears."""
        block, group, nearest = self.block, self.group, self.nearest
        biases = [block.bias(n) for n in group.linears] * 2
        with torch.no_grad():
            ends = list(seen.ys) or [F.linear(seen.x, self._weight(n), block.bias(n)) for n in group.linears]
            ends += [F.linear(seen.x, nearest.weight(n), block.bias(n)) for n in group.linears]
            starts = [None if b is None else b.expand_as(e) for e, b in zip(ends, biases, strict=True)]
            plain = {n: _returning(y) for n, y in zip(group.linears, ends[len(group.linears) :], strict=True)}
            self.rounded_outs.append(block.inspect(group, seen.call, plain, place))
        inner = [n for n in group.inside if n not in group.linears]

        def quantized_at(ys: list[Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
            given = {n: _returning(y) for n, y in zip(group.linears, ys[len(group.linears) :], strict=True)}
            return given | {n: _linear(nearest.weight(n), block.bias(n)) for n in inner}

        def difference(ys: list[Tensor]) -> Tensor:
            f = block.inspect(group, seen.call, {n: _returning(y) for n, y in zip(group.linears, ys, strict=False)}, place)
            return f.float() - block.inspect(group, seen.call, quantized_at(ys), place).float()

        start = torch.zeros_like(place.view(seen.out), dtype=torch.float32) if self._starts_at_zero else None
        end = None
        if block.dtype == block.main_dtype:  # the value of f there has been recorded
            with torch.no_grad():
                end = place.view(seen.out).float() - block.inspect(group, seen.call, quantized_at(ends), place).float()
        found = attribution.integrate(difference, starts, ends, rule, place.counted, start, end)
        if all(b is None for b in biases) and not bool(found.start.any()):
            self._starts_at_zero = True
        return found

    # From the quantized model's input

    def _between_inputs(self, part: GroupBatch, rule: attribution.Rule) -> tuple[Tensor, Tensor]:
        """The importance of every token for the path between the two inputs.

        Completeness errors are NaN: since f_q counts as a constant, there is no total that importance should add up to.
        """
        block, group = self.block, self.group
        seen, place = block.ready(part), part.layout
        start, end = seen.x, part.exact.to(block.device, block.dtype).view(seen.x.shape)
        ends = [(self.nearest.exact(n, start), self.nearest.exact(n, end)) for n in group.linears]
        total = [torch.zeros_like(a) for a, _ in ends]
        for alpha, weight in zip(rule.nodes, rule.weights, strict=True):
            ys = [torch.lerp(a, b, alpha).requires_grad_() for a, b in ends]
            with torch.no_grad():
                rounded = self._rounded_at(torch.lerp(start, end, alpha), seen.call, place)
            with torch.enable_grad():
                f = place.view(ys[0]) if group.alone else block.inspect(group, seen.call, dict(zip(group.linears, map(_returning, ys), strict=True)), place)
                seed = torch.sign(f.detach() - rounded) * (weight * place.counted.unsqueeze(-1) / f.shape[-1])
                for so_far, gradient in zip(total, torch.autograd.grad(f, ys, seed, allow_unused=True), strict=True):
                    if gradient is not None:
                        so_far += gradient
        gradient = sum((place.view(g) @ self._weight(n) for n, g in zip(group.linears, total, strict=True)), torch.zeros(()))
        return attribution.importance(place.view(end - start), gradient), torch.full((place.counted.shape[0],), torch.nan)

    def _rounded_at(self, z: Tensor, call: Call, place: Layout) -> Tensor:
        """f_q(z): the inspected module's output with rounded linears, for the group's input z."""
        group, linear = self.group, self.nearest.linear
        if group.alone:
            return place.view(linear(group.linears[0])(z))
        outer = {n: _returning(linear(n)(z)) for n in group.linears}
        return self.block.inspect(group, call, {n: linear(n) for n in group.inside} | outer, place)


def _returning(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: y


def _linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight, bias)
