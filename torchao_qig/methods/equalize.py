"""`Equalize`: choose a scale for the input channels of every group of linears (AWQ, MBQ, QIG).

Each candidate scale is tried on the block: the group's linears are rounded with it, the inspected module runs, and the error at its output is weighted
by token. Groups are searched on the full-precision block, so that they do not depend on each other; with `propagate_error` they do.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_qig.errors import UserError, check_choice, check_count, check_flag
from torchao_qig.formats import Activations
from torchao_qig.methods import search
from torchao_qig.methods.context import Context
from torchao_qig.methods.draft import Draft
from torchao_qig.methods.fold import Fold
from torchao_qig.methods.group_result import GroupResult
from torchao_qig.methods.nearest import NearestLinears
from torchao_qig.methods.step import BlockSize, Cost, Step
from torchao_qig.methods.token_weights.weighting import TokenWeighting, named
from torchao_qig.methods.weigh import compare_with_output_at_hand, note_tokens, weigh_group
from torchao_qig.watch import ranks
from torchao_qig.watch.block import Block, GroupBatch, GroupState, Needs, some_samples
from torchao_qig.watch.groups import join

LARGE_SHARE, SMALL_SHARE = 0.25, 0.03  # shares of a block's weights: a candidate is expensive to try if the inspected module has more than these
SAMPLE_STRIDE = {LARGE_SHARE: 8, SMALL_SHARE: 2}  # above that share the coarse search looks at every 8th (2nd) sample

FORWARDS = {"coarse": 19, "exhaustive": 100}  # how often a search runs all samples through a block: benchmarks/results/calibration_cpu_2threads.md
TOKENS_AT_ONCE = 2048  # tokens that are computed at once, about


def placed_groups(block: Block, draft: Draft, context: Context, fold: bool, pre_scale: bool) -> list[tuple[GroupState, Fold | None]]:
    """The groups that can get a scale, each with the fold that takes it (None: `act_pre_scale`). Groups with a shared weight get none."""
    groups = [state.group for state in block.groups]
    folds = dict.fromkeys(groups, None) if not fold or context.folds is None else context.folds.find_in(block, draft.root.get_submodule(draft.name))
    tied = {g for g in groups if any(join(draft.name, n) in context.shared for n in g.linears)}
    return [(s, folds[s.group]) for s in block.groups if s.group not in tied and (folds[s.group] is not None or pre_scale)]


def candidate_numbers(size: BlockSize) -> int:
    """How many numbers are held while candidates are tried: the rounded weights, and the graphs of the tokens that are computed at once."""
    return size.parameters + 4 * min(size.tokens, TOKENS_AT_ONCE) * sum(g.rows for g in size.groups)


def check_place(fold: bool, pre_scale: bool) -> None:
    """Raise where a step would have nowhere to put its scales."""
    if not (fold or pre_scale):
        raise UserError("fold=False, pre_scale=False: then there is nowhere to put a scale; set one of them")


@dataclass(frozen=True)
class Equalize(Step):
    """Choose every group's scale by trying candidates.

    Args:
        sensitivity: how much a token's error counts: "qig", "modality" (MBQ), "uniform" (AWQ), or their classes with settings.
        loss: "mae" or "mse", at the output of the module that a group feeds.
        grid: number of candidate scales.
        search: "coarse", or "exhaustive" for every candidate on every sample.
        fold: put a scale into the norm or linear that makes the group's input, where that is exact.
        pre_scale: keep a scale that cannot be folded as `act_pre_scale`; False leaves such groups without a scale.
        propagate_error: try candidates on the inputs that the model quantized so far has, against full-precision outputs.
        paper_rules: follow the published code where it differs: padding counts, and token weights are computed in its way.
    """

    sensitivity: str | TokenWeighting = "qig"
    loss: str = "mae"
    grid: int = 20
    search: str = "coarse"
    fold: bool = True
    pre_scale: bool = True
    propagate_error: bool = False
    paper_rules: bool = False
    decides: ClassVar[str] = "scales"

    def __post_init__(self) -> None:
        named(self.sensitivity)
        check_choice("loss", self.loss, ("mae", "mse"))
        check_choice("search", self.search, tuple(search.SEARCHES))
        check_count("grid", self.grid, 1)
        for name in ("fold", "pre_scale", "propagate_error", "paper_rules"):
            check_flag(name, getattr(self, name))
        check_place(self.fold, self.pre_scale)

    @property
    def weighting(self) -> TokenWeighting:
        return named(self.sensitivity)

    def needs(self, activations: Activations) -> Needs:
        propagated = self.propagate_error
        own = Needs(
            second_stream=propagated and activations.rounds,
            between_blocks=propagated,
            lone_outputs=propagated,
            padding=self.paper_rules,
            sample=self.fold,
            float32=self.paper_rules,
        )
        return own | self.weighting.needs(activations)

    def cost(self, size: BlockSize) -> Cost:
        return Cost(forwards=FORWARDS[self.search], numbers=candidate_numbers(size))

    def run(self, block: Block, draft: Draft, context: Context) -> None:
        nearest = NearestLinears(block, draft)
        for state, fold in placed_groups(block, draft, context, self.fold, self.pre_scale):
            weigh_group(
                block, state, draft, context, self.weighting,
                squared=self.loss == "mse", paper_rules=self.paper_rules, propagate_error=self.propagate_error,
            )  # fmt: skip
            if draft.activations.rounds and not self.propagate_error:
                compare_with_output_at_hand(block, state, draft)
            x_mean = state.mean_magnitude(block.weight(state.group.linears[0]).shape[1], block.device)
            scales = [search.scale_for(x_mean, r) if r else None for r in search.ratios(self.grid)]
            losses = CandidateLosses(block, state, nearest, scales, self, coarse_samples(block, state, context))
            with torch.no_grad():
                winner, found = search.SEARCHES[self.search](losses, self.grid, losses.stride)
            ratio = search.ratios(self.grid)[winner]
            note_tokens(block, state, draft)
            draft.add(group_result(draft, state, fold, x_mean, ratio, winner, found, search.scale_for(x_mean, ratio)))
            for part in state.parts:
                part.rounded_out = None


def group_result(
    draft: Draft, state: GroupState, fold: Fold | None, x_mean: Tensor, ratio: float, winner: int, losses: dict[int, float], scale: Tensor
) -> GroupResult:
    """The result for one group, with names of the whole model."""
    group = state.group
    return GroupResult(
        label=draft.labels[group], block=draft.name, linears=[join(draft.name, n) for n in group.linears], inspected=join(draft.name, group.inspected),
        weighting=state.weighting, fold_kind=fold.kind if fold else "act_pre_scale", fold_into=join(draft.name, fold.producer) if fold else "",
        ratio=ratio, winner=winner, losses=losses, x_mean=x_mean.cpu(), scale=scale.cpu(),
    )  # fmt: skip


def coarse_samples(block: Block, state: GroupState, context: Context) -> dict[int, list[int]]:
    """Number of a micro-batch -> its samples that the coarse search looks at: all where there are few, or where they are cheap to evaluate."""
    pieces, share = block.stream.pieces, block.share(state.group)
    step = next((n for least, n in SAMPLE_STRIDE.items() if share > least), 1)
    step = step if len(context.samples) >= 8 else 1
    chosen = {i: [r for r, row in enumerate(p.rows) if context.samples[p.batch, row] % step == 0] for i, p in enumerate(pieces)}
    return chosen if block.stream.cuttable else {i: list(range(len(pieces[i].rows))) if rows else [] for i, rows in chosen.items()}


class CandidateLosses:
    """The weighted losses of the candidates of one group; each is computed once.

    `stride` is the step between the candidates that a coarse search tries first: 3 where a candidate is expensive, otherwise 2.
    """

    def __init__(
        self, block: Block, state: GroupState, nearest: NearestLinears, scales: list[Tensor | None], settings: Equalize, on_part: dict[int, list[int]]
    ) -> None:
        self.block, self.state, self.nearest, self.scales, self.settings = block, state, nearest, scales, settings
        self.group, self.squared = state.group, settings.loss == "mse"
        self.rounds = nearest.draft.activations.rounds
        self._weights = {n: block.weight(n) for n in self.group.linears}
        self._known: dict[tuple[int, bool], float] = {}
        some = [some_samples(part, on_part.get(part.piece, [])) for part in state.parts]
        self._all_samples = ranks.all_agree(all(s is part for part, s in zip(state.parts, some, strict=True)))
        self._some = [s for s in some if s is not None]
        by_gram = self.squared and self.group.alone and not settings.propagate_error and not self.rounds
        self._gram = self._gram_matrix() if by_gram else None
        self.stride = 2 if self._all_samples or block.share(self.group) < SMALL_SHARE else 3

    def __call__(self, candidates: list[int], on_some: bool) -> list[float]:
        """The losses of these candidates on all samples, or, with `on_some`, on those of the coarse search."""
        on_some = on_some and not self._all_samples and self._gram is None
        new = [k for k in candidates if (k, on_some) not in self._known]
        found = self._sums(new, self._some if on_some else self.state.parts)
        total = 1.0 if self.state.weighting == "modality" else max(float(found[-1]), 1e-8)
        self._known.update({(k, on_some): float(found[i]) / total for i, k in enumerate(new)})
        return [self._known[k, on_some] for k in candidates]

    def _sums(self, candidates: list[int], parts: list[GroupBatch]) -> Tensor:
        """The weighted error of every candidate, and as the last entry the total weight."""
        out = torch.zeros(len(candidates) + 1, dtype=torch.float64)
        out[-1] = sum(float(part.weights.sum()) for part in parts if part.weights is not None)
        for i, k in enumerate(candidates):
            scale = self.scales[k]
            scale = None if scale is None else scale.to(self.block.device)
            if self.rounds:
                linears = {n: self.nearest.linear(n, scale) for n in self.group.linears}
                out[i] = sum(self._weighted(part, self._integer_errors(part, linears)) for part in parts)
                continue
            tried = {n: self.nearest.weight(n, scale) for n in self.group.linears}
            if self._gram is not None:
                name = self.group.linears[0]
                out[i] = search.gram_loss(self._gram, self._weights[name] - tried[name])
            else:
                out[i] = sum(self._weighted(part, self._errors(part, tried, plain=scale is None)) for part in parts)
        return ranks.summed(out)

    def _weighted(self, part: GroupBatch, errors: Tensor) -> float:
        assert part.weights is not None
        return float((errors * part.layout.from_grid(part.weights)).sum(dtype=torch.float64))

    def _errors(self, part: GroupBatch, tried: dict[str, Tensor], plain: bool) -> Tensor:
        """The error of every token with the weights `tried`. `plain`: these are rounded without a scale."""
        block, group, place = self.block, self.group, part.layout
        seen, name = block.ready(part), group.linears[0]
        if group.alone and self.settings.propagate_error:
            out = F.linear(place.view(seen.x), tried[name].to(block.dtype), block.bias(name))
        elif plain and part.rounded_out is not None:
            out = part.rounded_out.to(block.device)
        elif group.alone:
            error = F.linear(place.view(seen.x), (self._weights[name] - tried[name]).to(block.dtype)).float()
            return (error.square() if self.squared else error.abs()).mean(-1)
        else:
            forwards = {n: _linear(w.to(block.dtype), block.bias(n)) for n, w in tried.items()}
            out = block.inspect(group, seen.call, forwards, place)
        return search.token_errors(place.view(seen.out), out, self.squared)

    def _integer_errors(self, part: GroupBatch, linears: dict[str, search.Linear]) -> Tensor:
        """The error of every token with `linears`, which also round their inputs."""
        seen, place = self.block.ready(part), part.layout
        alone = self.group.alone
        out = place.view(linears[self.group.linears[0]](seen.x)) if alone else self.block.inspect(self.group, seen.call, linears, place)
        return search.token_errors(place.view(seen.out), out, self.squared)

    def _gram_matrix(self) -> Tensor | None:
        """The weighted Gram matrix of the group's input; None where computing losses from it would take more work."""
        rows, columns = self._weights[self.group.linears[0]].shape
        tokens = ranks.summed(torch.tensor([sum(p.seen.x.shape[:-1].numel() for p in self.state.parts)], dtype=torch.float64))
        if not search.gram_is_cheaper(int(tokens), rows, columns, len(self.scales)):
            return None
        total = torch.zeros(columns, columns, device=self.block.device)
        for part in self.state.parts:
            assert part.weights is not None
            total += search.gram(part.layout.view(part.seen.x.to(self.block.device)), part.layout.from_grid(part.weights))
        return total


def _linear(weight: Tensor, bias: Tensor | None) -> search.Linear:
    return lambda x: F.linear(x, weight, bias)
