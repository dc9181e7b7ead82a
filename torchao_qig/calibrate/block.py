"""Calibrate one block: watch it run, weigh the tokens of every group, search every group's scale.

Each group is searched on the unscaled full-precision block, so groups do not depend on each other (and no quantization error is
carried on to the next block). Samples only meet in sums: pieces and ranks may be cut in any way.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchao_qig.calibrate import ranks, search, sensitivity
from torchao_qig.calibrate.batches import Tokens
from torchao_qig.calibrate.groups import Group, find_groups
from torchao_qig.calibrate.observer import Call, Observer, Seen, first_tensor, patched, replica
from torchao_qig.calibrate.store import Store
from torchao_qig.calibrate.stream import Piece, Stream, cast, cut
from torchao_qig.calibrate.tokens import Layout, layout
from torchao_qig.config import QIGWeightOnlyConfig

logger = logging.getLogger(__name__)

Rounder = Callable[[Tensor], Tensor]  # weight -> the weight that its quantized form stands for


@dataclass
class Part:
    """What one piece contributes to a group."""

    piece: int
    seen: Seen
    layout: Layout
    weights: Tensor | None = None  # (B, T) of the layout's grid
    completeness: Tensor | None = None


@dataclass
class Work:
    """One group under calibration."""

    group: Group
    parts: list[Part] = field(default_factory=list)
    total: Tensor | None = None
    count: float = 0.0
    weighting: str = "none"

    def x_mean(self) -> Tensor:
        assert self.total is not None
        sums = ranks.summed(torch.cat([self.total, self.total.new_tensor([self.count])]))
        return search.x_mean(sums[:-1], float(sums[-1]))


class Block:
    """A block on the compute device, with what it saw."""

    def __init__(self, module: nn.Module, linears: dict[str, Rounder], stream: Stream, config: QIGWeightOnlyConfig, dtype: torch.dtype) -> None:
        self.stream, self.config, self.rounders, self.dtype = stream, config, linears, dtype
        self.device = stream.device
        self.exact = replica(module, self.device)
        main = next((p.dtype for p in module.parameters() if p.is_floating_point()), dtype)
        self.quick = self.exact if main == dtype else replica(module, self.device, dtype)
        self.main_dtype = main
        self.works: list[Work] = []
        self.store = Store(stream.store.limit)
        self._rounded: dict[str, Tensor] = {}

    def observe(self) -> None:
        """Run all pieces through the block, keep what its groups saw, and move the stream on."""
        for number, piece in enumerate(self.stream.pieces):
            call = self.stream.call(piece)
            with torch.no_grad(), Observer(self.exact, list(self.rounders)) as observed:
                out = self.exact(*call.args, **call.kwargs)
            self._find_new_groups(observed)
            for work in self.works:
                for seen in observed.seen(work.group.inspected, work.group.linears[0]):
                    self._take(work, seen, number, piece.tokens, _around(observed, work.group))
            self.stream.advance(piece, out)

    def _find_new_groups(self, observed: Observer) -> None:
        """Groups of linears that have not run before (experts that no earlier token was sent to)."""
        known = {name for work in self.works for name in work.group.linears}
        for group in find_groups(observed):
            if not known & set(group.linears):
                self.works.append(Work(group))

    def _take(self, work: Work, seen: Seen, number: int, tokens: Tokens, around: list[Tensor]) -> None:
        if not seen.x.numel():
            return
        place = layout(seen.x, tokens, around, everything=self.config.official)
        counted = place.counted
        total = search.absolute_sum(place.view(seen.x).float(), counted)
        work.total = total if work.total is None else work.total + total
        work.count += float(counted.sum())
        if work.group.alone:
            seen = Seen(seen.x, Call((), {}), seen.x)
        work.parts.append(Part(number, self.store.put(seen), place))

    def weight(self, name: str) -> Tensor:
        """A linear's weight in at least float32."""
        w = self.exact.get_submodule(name).weight
        assert isinstance(w, Tensor)
        return w.to(torch.promote_types(w.dtype, torch.float32))

    def rounded(self, name: str) -> Tensor:
        """Its plainly rounded weight, in the dtype of the computation."""
        if name not in self._rounded:
            self._rounded[name] = self.rounders[name](self.weight(name)).to(self.dtype)
        return self._rounded[name]

    def _ready(self, part: Part) -> Seen:
        return Seen(*cast(tuple(part.seen), self.device, self.dtype, self.main_dtype))

    def _inspect(self, group: Group, call: Call, forwards: dict[str, Callable[[Tensor], Tensor]], place: Layout) -> Tensor:
        """The inspected module's output, (B, T, channels), with these forwards for some of its linears."""
        with patched({self.quick.get_submodule(name): forward for name, forward in forwards.items()}):
            return place.view(first_tensor(self.quick.get_submodule(group.inspected)(*call.args, **call.kwargs)))

    def _bias(self, name: str) -> Tensor | None:
        bias = self.quick.get_submodule(name).bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    # Token weights

    def weigh(self, work: Work, masks: dict[int, Tokens], sensitivity_name: str, ratio: float, counts: tuple[float, float]) -> None:
        """Give every part of a group its token weights."""
        work.weighting = sensitivity_name
        for part in work.parts:
            if sensitivity_name == "qig":
                raw, part.completeness = self._importance(work.group, part)
                part.weights = sensitivity.clipped(part.layout.to_grid(raw), part.layout.grid, fallback=not self.config.official)
            else:
                answer, vision = _known(masks[part.piece], part.layout.grid)
                if sensitivity_name == "uniform":
                    told = answer | vision if self.config.official and masks[part.piece].answer is not None else part.layout.grid
                    part.weights = sensitivity.uniform(told & part.layout.grid)
                else:
                    part.weights = sensitivity.by_modality(answer, vision, ratio, counts, self.config.loss == "mse")

    def _importance(self, group: Group, part: Part) -> tuple[Tensor, Tensor]:
        points = sensitivity.rule(self.config.quadrature, self.config.steps)
        seen, place = self._ready(part), part.layout
        x, counted = place.view(seen.x), place.counted
        if group.alone:
            with torch.no_grad():
                difference = self.weight(group.linears[0]).to(self.dtype) - self.rounded(group.linears[0])
                found = sensitivity.integrate_linear(F.linear(x, difference), points, counted)
                gradient = found.gradients[0] @ difference
        else:
            found = self._integrate(group, seen, place, points)
            weights = [self.weight(n).to(self.dtype) for n in group.linears] + [self.rounded(n) for n in group.linears]
            with torch.no_grad():
                terms = (place.view(g.to(w.dtype)) @ w for g, w in zip(found.gradients, weights, strict=True))
                gradient = sum(terms, torch.zeros_like(x))
        return sensitivity.importance(x, gradient), sensitivity.completeness_error(x, gradient, found, counted)

    def _integrate(self, group: Group, seen: Seen, place: Layout, points: sensitivity.Rule) -> sensitivity.Attribution:
        """f and f_q along the path, as functions of what the group's linears put out."""
        biases = [self._bias(n) for n in group.linears] * 2
        with torch.no_grad():
            ends = [F.linear(seen.x, self.weight(n).to(self.dtype), self._bias(n)) for n in group.linears]
            ends += [F.linear(seen.x, self.rounded(n), self._bias(n)) for n in group.linears]
            starts = [torch.zeros_like(e) if b is None else b.expand_as(e) for e, b in zip(ends, biases, strict=True)]
        inner = [n for n in group.inside if n not in group.linears]

        def difference(ys: list[Tensor]) -> Tensor:
            given = {n: _returning(y) for n, y in zip(group.linears, ys, strict=False)}
            quantized = {n: _returning(y) for n, y in zip(group.linears, ys[len(given) :], strict=True)}
            quantized |= {n: _linear(self.rounded(n), self._bias(n)) for n in inner}
            f = self._inspect(group, seen.call, given, place)
            return f.float() - self._inspect(group, seen.call, quantized, place).float()

        return sensitivity.integrate(difference, starts, ends, points, place.counted)

    # Scales

    def search(self, work: Work, x_mean: Tensor, on_part: dict[int, list[int]]) -> tuple[int, dict[int, float]]:
        """The winning candidate of a group and the losses; `on_part`: the samples of each piece that stand for all."""
        squared = self.config.loss == "mse"
        scales = [search.scale_for(x_mean, r) for r in search.ratios(self.config.grid)]
        weights = {n: self.weight(n) for n in work.group.linears}
        known: dict[tuple[int, bool], float] = {}
        some = {id(part): _subset(part, on_part.get(part.piece, [])) for part in work.parts}
        no_less = all(s is part for part, s in zip(work.parts, some.values(), strict=True))
        grams = self._grams(work) if squared and work.group.alone else None

        def sums(candidates: list[int], parts: list[Part]) -> Tensor:
            """Per candidate the weighted error, and the total weight."""
            out = torch.zeros(len(candidates) + 1, dtype=torch.float64)
            out[-1] = sum(float(part.weights.sum()) for part in parts if part.weights is not None)
            for i, k in enumerate(candidates):
                s = scales[k].to(self.device)
                tried = {n: (self.rounders[n](w * s) / s) for n, w in weights.items()}
                if grams is not None:
                    name = work.group.linears[0]
                    out[i] = search.gram_loss(grams, weights[name] - tried[name])
                else:
                    out[i] = sum(self._error(work.group, part, weights, tried, squared) for part in parts)
            return ranks.summed(out)

        def evaluate(candidates: list[int], on_some: bool) -> list[float]:
            on_some = on_some and not no_less and grams is None
            new = [k for k in candidates if (k, on_some) not in known]
            parts = [p for p in some.values() if p is not None] if on_some else work.parts
            found = sums(new, parts)
            total = 1.0 if work.weighting == "modality" else max(float(found[-1]), 1e-8)
            known.update({(k, on_some): float(found[i]) / total for i, k in enumerate(new)})
            return [known[k, on_some] for k in candidates]

        with torch.no_grad():
            return search.SEARCHES[self.config.search](evaluate, self.config.grid)

    def _error(self, group: Group, part: Part, weights: dict[str, Tensor], tried: dict[str, Tensor], squared: bool) -> float:
        assert part.weights is not None
        seen, place = self._ready(part), part.layout
        if group.alone:
            name = group.linears[0]
            error = F.linear(place.view(seen.x), (weights[name] - tried[name]).to(self.dtype)).float()
            e = (error.square() if squared else error.abs()).mean(-1)
        else:
            forwards = {n: _linear(w.to(self.dtype), self._bias(n)) for n, w in tried.items()}
            e = search.token_errors(place.view(seen.out), self._inspect(group, seen.call, forwards, place), squared)
        return float((e * place.from_grid(part.weights)).sum(dtype=torch.float64))

    def _grams(self, work: Work) -> Tensor | None:
        """The weighted Gram matrix of the group's input where that saves work."""
        rows, columns = self.weight(work.group.linears[0]).shape
        if not search.gram_is_cheaper(sum(p.seen.x.shape[:-1].numel() for p in work.parts), rows, columns, self.config.grid):
            return None
        total = torch.zeros(columns, columns, device=self.device)
        for part in work.parts:
            assert part.weights is not None
            total += search.gram(part.layout.view(part.seen.x.to(self.device)), part.layout.from_grid(part.weights))
        return total


def _returning(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: y


def _linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight, bias)


def _around(observed: Observer, group: Group) -> list[Tensor]:
    """Inputs of the modules around a group, nearest first."""
    parts = group.linears[0].split(".")
    names = [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]
    calls = [observed.calls[n][0][0] for n in names if observed.calls.get(n)]
    return [t for c in calls for t in [*c.args, *c.kwargs.values()] if isinstance(t, Tensor) and t.is_floating_point() and t.dim() >= 2]


def _known(tokens: Tokens, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Answer and vision masks of a grid; what is not known to be vision counts as answer."""
    fits = tokens.counted is not None and tokens.counted.shape == grid.shape
    vision = tokens.vision.to(grid.device) & grid if fits and tokens.vision is not None else torch.zeros_like(grid)
    answer = tokens.answer.to(grid.device) & grid if fits and tokens.answer is not None else grid & ~vision
    return answer, vision


def _subset(part: Part, rows: list[int]) -> Part | None:
    """The part with some of its samples only; all of it where it cannot be cut."""
    size = part.layout.grid.shape[0]
    if not rows:
        return None
    if part.layout.rows is not None or len(rows) == size or part.weights is None:
        return part
    place = Layout(part.layout.grid[rows], (len(rows), part.layout.shape[1]))
    flat = part.seen.x.dim() == 2
    if flat:
        return part
    return Part(part.piece, Seen(*cut(tuple(part.seen), rows, size)), place, part.weights[rows])


__all__ = ["Block", "Part", "Piece", "Rounder", "Work"]
