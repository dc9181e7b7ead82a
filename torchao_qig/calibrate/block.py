"""Calibrate one block: watch it run, weigh the tokens of every group, search every group's scale.

Each group is searched on the unscaled full-precision block, so groups do not depend on each other (and no quantization error is
carried on to the next block). Samples only meet in sums: pieces and ranks may be cut in any way.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchao_qig.calibrate import ranks, search, sensitivity
from torchao_qig.calibrate.batches import Tokens
from torchao_qig.calibrate.groups import Group, find_groups
from torchao_qig.calibrate.observer import Call, Observer, Seen, first_tensor, patched, replica
from torchao_qig.calibrate.search import Evaluate
from torchao_qig.calibrate.stream import Piece, Stream, cast, fresh
from torchao_qig.calibrate.tokens import Layout, layout
from torchao_qig.calibrate.work import KEEP, Part, Work, around, known, subset
from torchao_qig.config import QIGWeightOnlyConfig

logger = logging.getLogger(__name__)

AGREE = 2e-3  # mean difference of token weights, relative to their mean, up to which the coarse Gauss rule will do
DEAR, CHEAP = 0.25, 0.03  # shares of a block's weights: the more of them a group's candidates take, the more sparingly they are tried
Rounder = Callable[[Tensor, Tensor | None], Tensor]  # weight, scale -> what the quantized form of their product stands for, over scale


class Block:
    """A block on the compute device, with what it saw."""

    def __init__(
        self, module: nn.Module, linears: dict[str, Rounder], stream: Stream, config: QIGWeightOnlyConfig, dtype: torch.dtype, steps: dict[str, int]
    ) -> None:
        self.stream, self.config, self.rounders, self.dtype = stream, config, linears, dtype
        self.steps = steps  # by group: how many points its Gauss rule takes; blocks of the same make share it
        self._starts_at_zero: set[Group] = set()
        self._outputs_kept = 0
        self._rounded_outs: list[Tensor] = []
        self.device = stream.device
        main = next((p.dtype for p in module.parameters() if p.is_floating_point()), dtype)
        self.model_dtype, wider = main, torch.promote_types(main, dtype) == dtype
        self.main_dtype = dtype if wider else main  # what the samples run in: the wider of the model's and the computation's
        self.exact = replica(module, self.device, self.main_dtype)
        self.quick = self.exact if wider else replica(module, self.device, dtype)
        self.works: list[Work] = []
        self.copies = False
        self.odd: set[str] = set()  # linears that are no plain products
        self.store = stream.store
        self._rounded: dict[str, Tensor] = {}

    def observe(self) -> None:
        """Run all pieces through the block, keep what its groups saw, and move the stream on."""
        for number, piece in enumerate(self.stream.pieces):
            observed, out = self._watch(piece)
            self._find_new_groups(observed)
            for work in self.works:
                for seen in observed.seen(work.group.inspected, work.group.linears):
                    self._take(work, seen, number, piece.tokens, around(observed, work.group))
            self.stream.advance(piece, out)
        mine = {work.group: work for work in self.works}  # other ranks may have seen experts that this one has not
        self.works = [mine.get(group) or Work(group) for group in dict.fromkeys(g for groups in ranks.gathered(list(mine)) for g in groups)]

    def _watch(self, piece: Piece) -> tuple[Observer, object]:
        call = cast(self.stream.call(piece), self.device, self.main_dtype, self.model_dtype)
        with torch.no_grad(), Observer(self.exact, list(self.rounders), self.copies) as observed:
            out = self.exact(*call.args, **call.kwargs)
        if observed.stale:  # the block writes into what it has made: from now on copies are taken
            self.copies = True
            return self._watch(piece)
        return observed, out

    def _find_new_groups(self, observed: Observer) -> None:
        """Groups of linears that have not run before (experts that no earlier token was sent to)."""
        known = {name for work in self.works for name in work.group.linears}
        groups = find_groups(observed)
        self.odd |= set(observed.inputs) - {name for group in groups for name in group.linears}
        self.works += [Work(group) for group in groups if not known & set(group.linears)]

    def _take(self, work: Work, seen: Seen, number: int, tokens: Tokens, around: list[Tensor]) -> None:
        if not seen.x.numel():
            return
        place = layout(seen.x, tokens, around, everything=self.config.official)
        work.note(place.view(seen.x), place.counted, self.config.smoothing is not None)
        kept = sum(y.numel() * y.element_size() for y in seen.ys)
        if work.group.alone:
            seen = Seen(seen.x, Call((), {}), seen.out if self.config.propagate_error else seen.x)
        elif self.dtype != self.main_dtype or self._outputs_kept + kept > KEEP or self.config.int8_activations:
            seen = seen._replace(ys=())
        else:
            self._outputs_kept += kept
        work.parts.append(Part(number, self.store.put(seen), place))

    def weight(self, name: str) -> Tensor:
        """A linear's weight in at least float32."""
        w = self.exact.get_submodule(name).weight
        assert isinstance(w, Tensor)
        return w.to(torch.promote_types(w.dtype, torch.float32))

    def rounded(self, name: str) -> Tensor:
        """Its plainly rounded weight, in the dtype of the computation."""
        if name not in self._rounded:
            self._rounded[name] = self.rounders[name](self.weight(name), None).to(self.dtype)
        return self._rounded[name]

    def ready(self, part: Part) -> Seen:
        return Seen(*cast(tuple(part.seen), self.device, self.dtype, self.main_dtype))

    def inspect(self, group: Group, call: Call, forwards: dict[str, Callable[[Tensor], Tensor]], place: Layout) -> Tensor:
        """The inspected module's output, (B, T, channels), with these forwards for some of its linears."""
        if self.copies:  # nothing of ours is to be written into
            call = fresh(call)
            forwards = {name: _cloning(forward) for name, forward in forwards.items()}
        with patched({self.quick.get_submodule(name): forward for name, forward in forwards.items()}):
            return place.view(first_tensor(self.quick.get_submodule(group.inspected)(*call.args, **call.kwargs)))

    def bias(self, name: str) -> Tensor | None:
        bias = self.quick.get_submodule(name).bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def share(self, group: Group) -> float:
        """The part of the block's weights that the group's inspected module uses."""
        sizes = {n: self.exact.get_submodule(n).weight.numel() for n in self.rounders}
        return sum(sizes[n] for n in group.inside) / sum(sizes.values())

    # Token weights

    def weigh(self, work: Work, weighting: str, ratio: float, counts: tuple[float, float]) -> None:
        """Give every part of a group its token weights."""
        work.weighting = weighting
        points = self.points(work) if weighting == "qig" else None
        for part in work.parts:
            if points is not None:
                self._rounded_outs.clear()
                part.weights, part.completeness = self._qig(work.group, part, points)
                if self._rounded_outs and not self.config.propagate_error:
                    part.rounded_out = self.store.put(torch.cat(self._rounded_outs))
            elif weighting == "modality":
                part.weights = sensitivity.by_modality(
                    *known(self.stream.pieces[part.piece].tokens, part.layout.grid), ratio, counts, self.config.loss == "mse"
                )
            else:
                part.weights = self._uniform(self.stream.pieces[part.piece].tokens, part.layout.grid)

    def _uniform(self, tokens: Tokens, grid: Tensor) -> Tensor:
        """Equal weights. Of the published code, AWQ's count image tokens only, and QIG's first groups image and answer tokens."""
        if not self.config.official or tokens.vision is None:
            return sensitivity.uniform(grid)
        answer, vision = known(tokens, grid)
        return vision.float() if self.config.weighting == "uniform" else sensitivity.uniform(answer | vision)

    def points(self, work: Work) -> sensitivity.Rule:
        """The rule for a group: the coarse Gauss rule where on one sample it gives the same weights as the fine one."""
        if self.config.quadrature == "riemann":
            return sensitivity.rule("riemann", self.config.steps or sensitivity.RIEMANN)
        if self.config.steps is not None or work.group.alone:
            return sensitivity.rule("gauss", self.config.steps or sensitivity.COARSE)
        key = " ".join(work.group.linears)
        if key not in self.steps:
            self.steps[key] = sensitivity.COARSE if ranks.gathered(self._coarse_will_do(work))[0] else sensitivity.FINE
        return sensitivity.rule("gauss", self.steps[key])

    def _coarse_will_do(self, work: Work) -> bool:
        first = subset(work.parts[0], [0]) if work.parts and self.stream.cuttable else next(iter(work.parts), None)
        if first is None:
            return False
        coarse, fine = (self._qig(work.group, first, sensitivity.rule("gauss", n))[0] for n in (sensitivity.COARSE, sensitivity.FINE))
        return float((coarse - fine).abs().mean() / fine.mean()) <= AGREE

    def _qig(self, group: Group, part: Part, points: sensitivity.Rule) -> tuple[Tensor, Tensor]:
        """Token weights and completeness errors; at a quarter of the samples at once, since graphs are kept."""
        place, size = part.layout, part.layout.grid.shape[0]
        at_once = max(1, self.stream.tokens_at_once // 4 // place.grid.shape[1])
        if size > at_once and self.stream.cuttable and not group.alone and place.rows is None:
            cuts = [subset(part, list(range(low, min(low + at_once, size)))) for low in range(0, size, at_once)]
            found = [self._qig(group, cut, points) for cut in cuts if cut is not None and cut is not part]
            if found:
                weights, errors = zip(*found, strict=True)
                return torch.cat(weights), torch.cat(errors)
        raw, error = self.importance(group, part, points)
        return self.shares(place.to_grid(raw), place), error

    def shares(self, raw: Tensor, place: Layout) -> Tensor:
        """Importance of a grid's tokens as their weights."""
        return sensitivity.clipped(raw, place.grid, fallback=not self.config.official)

    def importance(self, group: Group, part: Part, points: sensitivity.Rule) -> tuple[Tensor, Tensor]:
        seen, place = self.ready(part), part.layout
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
        biases = [self.bias(n) for n in group.linears] * 2
        with torch.no_grad():
            ends = list(seen.ys) or [F.linear(seen.x, self.weight(n).to(self.dtype), self.bias(n)) for n in group.linears]
            ends += [F.linear(seen.x, self.rounded(n), self.bias(n)) for n in group.linears]
            starts = [None if b is None else b.expand_as(e) for e, b in zip(ends, biases, strict=True)]
            plain = {n: returning(y) for n, y in zip(group.linears, ends[len(group.linears) :], strict=True)}
            self._rounded_outs.append(self.inspect(group, seen.call, plain, place))  # the search wants it, and it is cheap here
        inner = [n for n in group.inside if n not in group.linears]

        def quantized_at(ys: list[Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
            given = {n: returning(y) for n, y in zip(group.linears, ys[len(group.linears) :], strict=True)}
            return given | {n: _linear(self.rounded(n), self.bias(n)) for n in inner}

        def difference(ys: list[Tensor]) -> Tensor:
            f = self.inspect(group, seen.call, {n: returning(y) for n, y in zip(group.linears, ys, strict=False)}, place)
            return f.float() - self.inspect(group, seen.call, quantized_at(ys), place).float()

        start = torch.zeros_like(place.view(seen.out), dtype=torch.float32) if group in self._starts_at_zero else None
        end = None
        if self.dtype == self.main_dtype:  # f there has been seen
            with torch.no_grad():
                end = place.view(seen.out).float() - self.inspect(group, seen.call, quantized_at(ends), place).float()
        found = sensitivity.integrate(difference, starts, ends, points, place.counted, start, end)
        if all(b is None for b in biases) and not bool(found.start.any()):
            self._starts_at_zero.add(group)
        return found

    # Scales

    def search(self, work: Work, x_mean: Tensor, on_part: dict[int, list[int]]) -> tuple[int, dict[int, float]]:
        """The winning candidate of a group and the losses; `on_part`: the samples of each piece that stand for all."""
        evaluate, stride = self.evaluator(work, [search.scale_for(x_mean, r) if r else None for r in search.ratios(self.config.grid)], on_part)
        with torch.no_grad():
            return search.SEARCHES[self.config.search](evaluate, self.config.grid, stride)

    def evaluator(self, work: Work, scales: list[Tensor | None], on_part: dict[int, list[int]]) -> tuple[Evaluate, int]:
        """A function that gives the losses of these candidates (None: plain rounding), and how sparingly to use it."""
        squared = self.config.loss == "mse"
        weights = {n: self.weight(n) for n in work.group.linears}
        known: dict[tuple[int, bool], float] = {}
        some = {id(part): subset(part, on_part.get(part.piece, [])) for part in work.parts}
        no_less = ranks.all_agree(all(s is part for part, s in zip(work.parts, some.values(), strict=True)))
        grams = self.grams(work) if squared and work.group.alone and not self.config.propagate_error else None

        def sums(candidates: list[int], parts: list[Part]) -> Tensor:
            """Per candidate the weighted error, and the total weight."""
            out = torch.zeros(len(candidates) + 1, dtype=torch.float64)
            out[-1] = sum(float(part.weights.sum()) for part in parts if part.weights is not None)
            for i, k in enumerate(candidates):
                scale = scales[k]
                tried = {n: self.tried(n, w, None if scale is None else scale.to(self.device)) for n, w in weights.items()}
                if grams is not None:
                    name = work.group.linears[0]
                    out[i] = search.gram_loss(grams, weights[name] - tried[name])
                else:
                    out[i] = sum(self.error(work.group, part, weights, tried, squared, plain=scale is None) for part in parts)
            return ranks.summed(out)

        def evaluate(candidates: list[int], on_some: bool) -> list[float]:
            on_some = on_some and not no_less and grams is None
            new = [k for k in candidates if (k, on_some) not in known]
            parts = [p for p in some.values() if p is not None] if on_some else work.parts
            found = sums(new, parts)
            total = 1.0 if work.weighting == "modality" else max(float(found[-1]), 1e-8)
            known.update({(k, on_some): float(found[i]) / total for i, k in enumerate(new)})
            return [known[k, on_some] for k in candidates]

        return evaluate, 2 if no_less or self.share(work.group) < CHEAP else 3

    def tried(self, name: str, weight: Tensor, scale: Tensor | None) -> Any:
        """A linear as a candidate makes it: here its weight."""
        return self.rounded(name) if scale is None else self.rounders[name](weight, scale)

    def error(self, group: Group, part: Part, weights: dict[str, Tensor], tried: dict[str, Any], squared: bool, plain: bool) -> float:
        """A part's share of a candidate's loss, weighted."""
        assert part.weights is not None
        seen, place = self.ready(part), part.layout
        name = group.linears[0]
        if group.alone and self.config.propagate_error:
            e = search.token_errors(place.view(seen.out), F.linear(place.view(seen.x), tried[name].to(self.dtype), self.bias(name)), squared)
        elif plain and part.rounded_out is not None:
            e = search.token_errors(place.view(seen.out), part.rounded_out.to(self.device), squared)
        elif group.alone:
            error = F.linear(place.view(seen.x), (weights[name] - tried[name]).to(self.dtype)).float()
            e = (error.square() if squared else error.abs()).mean(-1)
        else:
            forwards = {n: _linear(w.to(self.dtype), self.bias(n)) for n, w in tried.items()}
            e = search.token_errors(place.view(seen.out), self.inspect(group, seen.call, forwards, place), squared)
        return float((e * place.from_grid(part.weights)).sum(dtype=torch.float64))

    def grams(self, work: Work) -> Tensor | None:
        """The weighted Gram matrix of the group's input where that saves work."""
        rows, columns = self.weight(work.group.linears[0]).shape
        tokens = ranks.summed(torch.tensor([sum(p.seen.x.shape[:-1].numel() for p in work.parts)], dtype=torch.float64))
        if not search.gram_is_cheaper(int(tokens), rows, columns, self.config.grid):
            return None
        total = torch.zeros(columns, columns, device=self.device)
        for part in work.parts:
            assert part.weights is not None
            total += search.gram(part.layout.view(part.seen.x.to(self.device)), part.layout.from_grid(part.weights))
        return total


def _cloning(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: forward(x).clone()


def returning(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: y


def _linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: F.linear(x, weight, bias)
