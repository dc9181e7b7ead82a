"""`Smooth`: SmoothQuant's scales, which need no search (arXiv 2211.10438)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchao_qig.errors import check_flag, check_number
from torchao_qig.formats import Activations
from torchao_qig.methods import search
from torchao_qig.methods.context import Context
from torchao_qig.methods.draft import Draft
from torchao_qig.methods.equalize import CandidateLosses, Equalize, candidate_numbers, check_place, coarse_samples, group_result, placed_groups
from torchao_qig.methods.nearest import NearestLinears
from torchao_qig.methods.step import BlockSize, Cost, Step
from torchao_qig.methods.token_weights.weighting import Uniform
from torchao_qig.methods.weigh import compare_with_output_at_hand, note_tokens, weigh_group
from torchao_qig.watch import ranks
from torchao_qig.watch.block import Block, GroupState, Needs


@dataclass(frozen=True)
class Smooth(Step):
    """Divide the channels of the input by max |x| ** alpha / max |W| ** (1 - alpha), and multiply the weight's columns by it.

    Args:
        alpha: how much of an outlier moves from the activations into the weights, 0 to 1.
        fold, pre_scale, propagate_error: see `Equalize`.
    """

    alpha: float = 0.5
    fold: bool = True
    pre_scale: bool = True
    propagate_error: bool = False
    decides: ClassVar[str] = "scales"

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 0, 1)
        for name in ("fold", "pre_scale", "propagate_error"):
            check_flag(name, getattr(self, name))
        check_place(self.fold, self.pre_scale)

    def needs(self, activations: Activations) -> Needs:
        propagated = self.propagate_error
        return Needs(
            second_stream=propagated and activations.rounds, between_blocks=propagated, lone_outputs=propagated, peaks=True, sample=self.fold,
        )  # fmt: skip

    def cost(self, size: BlockSize) -> Cost:
        return Cost(numbers=candidate_numbers(size))

    def run(self, block: Block, draft: Draft, context: Context) -> None:
        nearest, losses_of = NearestLinears(block, draft), Equalize("uniform", propagate_error=self.propagate_error)
        for state, fold in placed_groups(block, draft, context, self.fold, self.pre_scale):
            weigh_group(block, state, draft, context, Uniform(), propagate_error=self.propagate_error)
            if draft.activations.rounds and not self.propagate_error:
                compare_with_output_at_hand(block, state, draft)
            weights = [block.weight(n) for n in state.group.linears]
            x_mean, scale = state.mean_magnitude(weights[0].shape[1], block.device), smoothing_scale(state, weights, self.alpha)
            losses = CandidateLosses(block, state, nearest, [None, scale], losses_of, coarse_samples(block, state, context))
            with torch.no_grad():
                found = dict(enumerate(losses([0, 1], False)))
            note_tokens(block, state, draft)
            draft.add(group_result(draft, state, fold, x_mean, self.alpha, 1, found, scale))


def smoothing_scale(state: GroupState, weights: list[Tensor], alpha: float) -> Tensor:
    """The scale of a group, from the largest magnitudes of its inputs and weights by channel."""
    widest = torch.stack([w.abs().amax(0) for w in weights]).amax(0).float()
    peaks = [p.to(widest.device) for p in ranks.gathered(None if state.peak is None else state.peak.cpu()) if p is not None]
    peak = torch.stack(peaks).amax(0) if peaks else torch.ones_like(widest)
    return (peak.clamp(min=search.FLOOR) ** alpha / widest.clamp(min=search.FLOOR) ** (1 - alpha)).clamp(min=search.FLOOR)
