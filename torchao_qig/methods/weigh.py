"""Give a group its token weights, and the inputs that candidates are tried on."""

import torch

from torchao_qig.methods.context import Context
from torchao_qig.methods.draft import Draft
from torchao_qig.methods.nearest import NearestLinears
from torchao_qig.methods.per_sample import token_weights
from torchao_qig.methods.token_weights.weighting import TokenWeighting
from torchao_qig.watch.block import Block, GroupState


def weigh_group(
    block: Block,
    state: GroupState,
    draft: Draft,
    context: Context,
    weighting: TokenWeighting,
    *,
    squared: bool = False,
    paper_rules: bool = False,
    propagate_error: bool = False,
) -> None:
    """Give a group its token weights and, where that is asked for, replace its inputs by those that the quantized model has.

    Token weights are computed on the full-precision inputs, before these are replaced. Where activations are rounded, they are computed after
    that, since they then compare the two.

    Args:
        squared: weigh for a squared error.
        paper_rules: weigh as the published code does.
        propagate_error: replace the group's inputs; with rounded activations some weightings do so anyway.
    """
    rounds = draft.activations.rounds
    routed = all(part.layout.rows is not None for part in state.parts)
    feeds = context.second is not None and not routed and (propagate_error or weighting.on_quantized_inputs(draft.activations))
    for act in ("feed", "weigh") if rounds else ("weigh", "feed"):
        if act == "weigh":
            weighting.weigh(block, state, draft, context, squared=squared, paper_rules=paper_rules)
        elif feeds and context.second is not None:
            context.second.feed(block, draft.module(block.exact, block.device), state)
            for part in state.parts:
                part.rounded_out = None  # it belongs to the former input
    context.weighed += 1
    state.weighed_by = weighting


def compare_with_output_at_hand(block: Block, state: GroupState, draft: Draft) -> None:
    """Replace the recorded outputs by those of the unrounded linears on the group's present inputs.

    With rounded activations, errors are measured against these, as in the published code.
    """
    nearest = NearestLinears(block, draft)
    for part in state.parts:
        if state.group.alone or part.exact_x is not None:
            seen = block.ready(part)
            with torch.no_grad():
                out = nearest.exact(state.group.linears[0], seen.x) if state.group.alone else block.inspect(state.group, seen.call, {}, part.layout)
            part.seen = part.seen._replace(out=block.store.put(out))


def note_tokens(block: Block, state: GroupState, draft: Draft) -> None:
    """Keep the group's token weights, sample by sample, for the report."""
    found = token_weights(state, block.stream.pieces)
    if found is not None:
        draft.tokens[draft.labels[state.group]], draft.completeness[draft.labels[state.group]] = found
