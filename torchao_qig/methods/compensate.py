"""`Compensate` and `Clip`: choose the codes of one block's linears, group after group.

All scales of the block have been chosen before. `Compensate` rounds a group on the inputs that it has in the model as quantized so far, and aims at the
full-precision outputs; this corrects part of the error of what was rounded before. The mathematics of one weight is in `solver.py`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from torchao_qig.errors import check_count, check_flag, check_number
from torchao_qig.formats import Activations
from torchao_qig.formats.base import CodedFormat, Format, LinearForm, Params, row_errors
from torchao_qig.methods.context import Context
from torchao_qig.methods.draft import Draft
from torchao_qig.methods.solver import compensated, target
from torchao_qig.methods.step import BlockSize, Cost, Step
from torchao_qig.methods.token_weights.weighting import TokenWeighting, Uniform, named
from torchao_qig.methods.weigh import note_tokens, weigh_group
from torchao_qig.watch import ranks
from torchao_qig.watch.block import Block, GroupBatch, GroupState, Needs
from torchao_qig.watch.groups import join

SOLVING = 2  # how many times slower factors and triangular systems are than matrix products
GRAMS, WEIGHTS = 8, 7  # copies of a group's Gram matrix and of its weights that are held at once


@dataclass(frozen=True)
class Rounding(Step):
    """What `Compensate` and `Clip` have in common.

    `sensitivity` says how much an error at each token counts; None: as in the step before, or the same for all tokens.
    """

    sensitivity: str | TokenWeighting | None = None
    decides: ClassVar[str] = "codes"

    def __post_init__(self) -> None:
        if self.sensitivity is not None:
            named(self.sensitivity)

    @property
    def weighting(self) -> TokenWeighting | None:
        return None if self.sensitivity is None else named(self.sensitivity)

    @property
    def replays(self) -> bool:
        return self.sensitivity is not None

    def needs(self, activations: Activations) -> Needs:
        return Needs() if self.weighting is None else self.weighting.needs(activations)

    def cost(self, size: BlockSize) -> Cost:
        held = max((GRAMS * g.columns**2 + WEIGHTS * g.rows * g.columns for g in size.groups), default=0)
        return Cost(products=sum(4.0 * size.tokens * g.columns**2 for g in size.groups), floats=held)  # two Gram matrices per group

    def run(self, block: Block, draft: Draft, context: Context) -> None:
        wanted = self.weighting
        for state in block.groups:
            if state.weighed_by is None or (wanted is not None and state.weighed_by != wanted):
                weigh_group(block, state, draft, context, wanted or Uniform())
                if wanted is not None:
                    note_tokens(block, state, draft)
            state.keep_inputs_only()
        draft.made = draft.module(block.exact, block.device, rest="exact")
        for state in block.groups:
            RoundedGroup(self, block, state, draft, context).round()
            state.parts.clear()

    def fit(self, weight: Tensor, wanted: Tensor, gram: Tensor, fmt: CodedFormat, dtype: torch.dtype) -> tuple[Tensor, Params]:
        """Choose the codes and parameters of a weight.

        Args:
            weight: (N, K), with its equalization scales in it.
            wanted: the weight that the rounded one should act like.
            gram: weighted Gram matrix of the inputs.
            fmt: how the weight is stored, with scales in `dtype`.
        """
        raise NotImplementedError

    def aim(self, weight: Tensor, sums: "Grams") -> Tensor:
        """The weight that the rounded one should act like: `weight` itself, or one that also corrects errors of the inputs."""
        return weight


@dataclass(frozen=True)
class Clip(Rounding):
    """Round to nearest on grids whose ranges are chosen for the smallest weighted error of the outputs, instead of spanning all weights."""

    def fit(self, weight: Tensor, wanted: Tensor, gram: Tensor, fmt: CodedFormat, dtype: torch.dtype) -> tuple[Tensor, Params]:
        params = fmt.fit(wanted, dtype, gram)
        return fmt.nearest(wanted, fmt.spread(params, wanted.shape[1], wanted.dtype))[0], params


@dataclass(frozen=True)
class Compensate(Rounding):
    """Choose codes that change outputs least: every column's rounding error is passed on to the columns after it (GPTQ, arXiv 2210.17323).

    Args:
        sensitivity: see `Rounding`.
        damping: what is added to the diagonal of the inputs' Gram matrix, relative to the diagonal's mean.
        repair: how much of the error in a linear's inputs, from what was rounded before it, the linear corrects: 0 to 1 (1: GPTAQ, arXiv 2504.02692).
        sweeps: how often, after that, parameters are fitted and single codes changed where that lowers the error.
        clip: choose ranges as `Clip` does.
    """

    damping: float = 0.03
    repair: float = 1.0
    sweeps: int = 2
    clip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("damping", self.damping, 0)
        check_number("repair", self.repair, 0, 1)
        check_count("sweeps", self.sweeps, 0)
        check_flag("clip", self.clip)

    def needs(self, activations: Activations) -> Needs:
        return super().needs(activations) | Needs(second_stream=True)

    def cost(self, size: BlockSize) -> Cost:
        rounding, columns = super().cost(size), [g.columns * (1 + self.sweeps) for g in size.groups]
        solving = sum(SOLVING * 2.0 * g.columns**3 + 2.0 * g.rows * g.columns**2 * (3 + 4 * self.sweeps) for g in size.groups)
        pairs = sum(n * g.rows for n, g in zip(columns, size.groups, strict=True))
        return replace(rounding, products=rounding.products + solving, columns=sum(columns), column_rows=pairs)

    def fit(self, weight: Tensor, wanted: Tensor, gram: Tensor, fmt: CodedFormat, dtype: torch.dtype) -> tuple[Tensor, Params]:
        params = fmt.fit(wanted, dtype, gram) if self.clip else fmt.fit(weight, dtype)
        return compensated(wanted, gram, fmt, params, self.damping, self.sweeps)

    def aim(self, weight: Tensor, sums: "Grams") -> Tensor:
        return target(weight, sums.x, sums.d, self.damping, self.repair) if self.repair else weight


class Grams(NamedTuple):
    """Weighted sums over tokens: x x^T, and d x^T where x + d is the full-precision input."""

    x: Tensor
    d: Tensor


class RoundedGroup:
    """Chooses the codes of one group of linears."""

    def __init__(self, step: Rounding, block: Block, state: GroupState, draft: Draft, context: Context) -> None:
        self.step, self.block, self.state, self.draft, self.context = step, block, state, draft, context
        self.second = context.second if isinstance(step, Compensate) else None

    def round(self) -> None:
        """Choose the group's codes. Writes the packed weights into the draft, and the squared errors of rounding to nearest and of these weights."""
        linears, draft = self.state.group.linears, self.draft
        sums = self._grams()
        first: dict[int, str] = {}  # id of a weight -> the first linear that holds it: linears of this group may share one, too
        for inner in linears:
            first.setdefault(id(draft.root.get_submodule(join(draft.name, inner)).weight), inner)
        decided = {n: w for n in linears if (w := self._decided_elsewhere(n)) is not None}
        by_form: dict[LinearForm, list[str]] = {}
        for inner in first.values():
            if inner not in decided:
                by_form.setdefault(draft.forms[inner], []).append(inner)
        new: dict[str, Tensor] = {}
        errors = [(0.0, 0.0)]
        for form, names in by_form.items():
            fmt, weights = form.format, [self._scaled(inner) for inner in names]
            assert isinstance(fmt, CodedFormat)
            together, dtype = torch.cat(weights), form.scale_dtype(self.block.model_dtype)
            wanted = self.step.aim(together, sums)
            codes, params = self.step.fit(together, wanted, sums.x, fmt, dtype)
            errors.append(_squared_errors(together, wanted, fmt.dense(codes, params, together.dtype), sums.x, fmt, dtype))
            sizes = [len(w) for w in weights]
            for inner, c, d, *p in zip(names, *(t.split(sizes) for t in (codes, fmt.dense(codes, params, torch.float32), *params)), strict=True):
                self._put(inner, d)
                new[inner] = form.activations.marked(fmt.pack(c, tuple(p))).cpu()
        for inner in linears:
            if inner not in new:
                source = decided[inner] if inner in decided else new[first[id(draft.root.get_submodule(join(draft.name, inner)).weight)]]
                form, weight, dense = draft.forms[inner], self._scaled(inner), source.to(self.block.device).dequantize(torch.float32)
                wanted, dtype = self.step.aim(weight, sums), form.scale_dtype(self.block.model_dtype)
                errors.append(_squared_errors(weight, wanted, dense.to(weight), sums.x, form.format, dtype))
                self._put(inner, dense)
                new[inner] = source
        nearest, final = (sum(both) for both in zip(*errors, strict=True))
        draft.weights |= {join(draft.name, inner): weight for inner, weight in new.items()}
        draft.squared_errors[draft.labels[self.state.group]] = nearest, final

    def _decided_elsewhere(self, inner: str) -> Tensor | None:
        """The packed weight that this linear takes over from one that was rounded before and has the same weight; None if there is none."""
        known = self.context.weights | self.draft.weights
        source = self.context.shared.decided(join(self.draft.name, inner), known)
        return None if source is None else known[source]

    def _put(self, inner: str, dense: Tensor) -> None:
        assert self.draft.made is not None
        self.draft.put(self.draft.made, inner, dense)

    def _scaled(self, inner: str) -> Tensor:
        return self.draft.scaled(inner)[0].to(self.block.device)

    def _grams(self) -> Grams:
        """The weighted sums over the group's tokens, on all ranks. Inputs are scaled and rounded as the group's linears will do it."""
        block, draft, state = self.block, self.draft, self.state
        first = state.group.linears[0]
        columns, before = (None if t is None else t.to(block.device) for t in (draft.scales.columns.get(join(draft.name, first)), draft.before(first)))
        channels = block.weight(first).shape[1]
        total = torch.zeros(2, channels, channels, device=block.device)

        def rows(part: GroupBatch, x: Tensor) -> Tensor:
            return part.layout.view(x.to(block.device)).flatten(0, 1).float()

        assert draft.made is not None
        for part, seen in self.second.watch(block, draft.made, state) if self.second else ((part, None) for part in state.parts):
            assert part.weights is not None
            weights = part.layout.from_grid(part.weights).reshape(-1, 1).to(block.device)
            exact = rows(part, part.exact) if columns is None else rows(part, part.exact) / columns
            now = exact if seen is None else rows(part, seen.x) if before is None else rows(part, seen.x) * before
            now = draft.forms[first].activations.fake(now)
            total += torch.stack([(weights * now).T @ now, (weights * (exact - now)).T @ now])
        return Grams(*ranks.summed(total))


def _squared_errors(weight: Tensor, wanted: Tensor, final: Tensor, gram: Tensor, fmt: Format, dtype: torch.dtype) -> tuple[float, float]:
    """The squared errors, against `wanted`, of rounding a weight to nearest and of the weight that was chosen (`final`)."""
    before, after = (float(row_errors(q - wanted, gram).sum(dtype=torch.float64)) for q in (fmt.rounded(weight, dtype), final))
    return before, after
