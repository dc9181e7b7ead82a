"""The settings of token weights, one class per method. `weigh` gives every part of a group its weights, (B, T).

Under our rules the weights of `Uniform` and `QIG` sum to 1 for every sample; those of `Modality` are relative to the number of tokens of all samples.
With `paper_rules` weights are as in the published code (padding counts, other shares); the step that asks for the weights passes this on.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from torchao_qig.errors import UserError, check_choice, check_count, check_number
from torchao_qig.formats import Activations
from torchao_qig.methods.context import Context
from torchao_qig.methods.draft import Draft
from torchao_qig.methods.nearest import NearestLinears
from torchao_qig.methods.token_weights import attribution
from torchao_qig.methods.token_weights.integrated_gradients import GroupIntegral
from torchao_qig.watch import ranks
from torchao_qig.watch.block import Block, GroupState, Needs, known_masks, some_samples
from torchao_qig.watch.groups import join

AGREE = 2e-3  # mean difference of token weights, relative to their mean, up to which the coarse Gauss rule will do
ROUNDED_INPUT_POINTS = 8  # points with rounded inputs: weights differ from those of a fine sum by 1 to 2 % of their mean (tests/calibration/test_int8.py)


class TokenWeighting(ABC):
    """A way to weigh tokens. A subclass is a frozen dataclass of its settings."""

    name: ClassVar[str]

    def needs(self, activations: Activations) -> Needs:
        """What has to be recorded for these weights."""
        return Needs()

    def on_quantized_inputs(self, activations: Activations) -> bool:
        """Whether the group needs the inputs that the model quantized so far has."""
        return False

    @abstractmethod
    def weigh(self, block: Block, state: GroupState, draft: Draft, context: Context, *, squared: bool, paper_rules: bool) -> None:
        """Give every part of a group its weights. `squared`: for a squared error."""


def _fill_uniform(block: Block, state: GroupState, *, vision_only: bool, paper_rules: bool) -> None:
    """Give all tokens the same weight.

    In the published code only image tokens count for AWQ (`vision_only`), and only image and answer tokens for the first groups of QIG.
    """
    state.weighting = "uniform"
    for part in state.parts:
        tokens, grid = block.stream.pieces[part.piece].tokens, part.layout.grid
        if paper_rules and tokens.vision is not None:
            answer, vision = known_masks(tokens, grid)
            part.weights = vision.float() if vision_only else attribution.uniform(answer | vision)
        else:
            part.weights = attribution.uniform(grid)


@dataclass(frozen=True)
class Uniform(TokenWeighting):
    """Every token counts the same (AWQ)."""

    name: ClassVar[str] = "uniform"

    def weigh(self, block: Block, state: GroupState, draft: Draft, context: Context, *, squared: bool, paper_rules: bool) -> None:
        _fill_uniform(block, state, vision_only=True, paper_rules=paper_rules)


@dataclass(frozen=True)
class Modality(TokenWeighting):
    """An answer token counts 1 and a vision token `ratio` (MBQ, arXiv 2412.19509).

    `ratio` is one number, a dict from parts of modules' names to numbers, or None to measure it.
    """

    name: ClassVar[str] = "modality"
    ratio: float | dict[str, float] | None = None

    def __post_init__(self) -> None:
        for part, value in self.ratio.items() if isinstance(self.ratio, dict) else [("", self.ratio)]:
            if value is not None:
                check_number(f"ratio[{part!r}]" if part else "ratio", value, 0)

    def weigh(self, block: Block, state: GroupState, draft: Draft, context: Context, *, squared: bool, paper_rules: bool) -> None:
        state.weighting = self.name
        ratio = context.ratios.of(join(draft.name, state.group.inspected))
        for part in state.parts:
            masks = known_masks(block.stream.pieces[part.piece].tokens, part.layout.grid)
            part.weights = attribution.by_modality(*masks, ratio, context.ratios.counts, squared)


@dataclass(frozen=True)
class QIG(TokenWeighting):
    """A token counts as much as its integrated gradient says (QIG, arXiv 2603.17809).

    Args:
        quadrature: "gauss" (4 points, or 6 where those do not agree) or "riemann" (the paper's 32).
        points: number of points, instead of these.
        warmup_groups: number of groups, from the first on, that get uniform weights.
    """

    name: ClassVar[str] = "qig"
    quadrature: str = "gauss"
    points: int | None = None
    warmup_groups: int = 0

    def __post_init__(self) -> None:
        check_choice("quadrature", self.quadrature, ("gauss", "riemann"))
        check_count("points", self.points, 1, optional=True)
        check_count("warmup_groups", self.warmup_groups, 0)

    def needs(self, activations: Activations) -> Needs:
        own = Needs(second_stream=True) if activations.rounds else Needs(linear_outputs=True)
        return own | Needs(float32=self.quadrature == "riemann")

    def on_quantized_inputs(self, activations: Activations) -> bool:
        return activations.rounds

    def weigh(self, block: Block, state: GroupState, draft: Draft, context: Context, *, squared: bool, paper_rules: bool) -> None:
        rounds = draft.activations.rounds
        if context.weighed < self.warmup_groups or (rounds and all(part.exact_x is None for part in state.parts)):
            # with rounded inputs, and rows that a router chose, there are no two inputs of the same tokens, and so no path between them
            _fill_uniform(block, state, vision_only=False, paper_rules=paper_rules)
            return
        state.weighting = self.name
        integral = GroupIntegral(block, NearestLinears(block, draft), state.group, paper_rules, rounds)
        rule = self._rule(block, state, integral, context)
        for part in state.parts:
            integral.rounded_outs.clear()
            part.weights, part.completeness = integral.weights(part, rule)
            if integral.rounded_outs and part.exact_x is None:
                part.rounded_out = block.store.put(torch.cat(integral.rounded_outs))

    def _rule(self, block: Block, state: GroupState, integral: GroupIntegral, context: Context) -> attribution.Rule:
        """The quadrature rule of a group. Without `points`, it is the coarse Gauss rule if that agrees with the fine one on one sample."""
        if self.quadrature == "riemann":
            return attribution.rule("riemann", self.points or attribution.RIEMANN)
        if integral.rounds:
            return attribution.Rule(*attribution.legendre(self.points or ROUNDED_INPUT_POINTS), panels=0)
        if self.points is not None or state.group.alone:
            return attribution.rule("gauss", self.points or attribution.COARSE)
        key = " ".join(state.group.linears)
        if key not in context.points:
            agree = ranks.gathered(self._coarse_agrees(block, state, integral))[0]
            context.points[key] = attribution.COARSE if agree else attribution.FINE
        return attribution.rule("gauss", context.points[key])

    def _coarse_agrees(self, block: Block, state: GroupState, integral: GroupIntegral) -> bool:
        first = some_samples(state.parts[0], [0]) if state.parts and block.stream.cuttable else next(iter(state.parts), None)
        if first is None:
            return False
        coarse, fine = (integral.weights(first, attribution.rule("gauss", n))[0] for n in (attribution.COARSE, attribution.FINE))
        return float((coarse - fine).abs().mean() / fine.mean()) <= AGREE


WEIGHTINGS: dict[str, type[TokenWeighting]] = {c.name: c for c in (QIG, Modality, Uniform)}


def named(sensitivity: "str | TokenWeighting") -> TokenWeighting:
    """The weighting of this name with its default settings; a weighting object is returned as it is."""
    if isinstance(sensitivity, TokenWeighting):
        return sensitivity
    if not isinstance(sensitivity, str) or sensitivity not in WEIGHTINGS:
        raise UserError(f"sensitivity={sensitivity!r}: pass one of {', '.join(map(repr, WEIGHTINGS))}, or QIG(...), Modality(...), Uniform()")
    return WEIGHTINGS[sensitivity]()
