"""The second stream: the same samples, run through the model as quantized so far.

Beside its full-precision hidden state every sample has a second one. It goes through the final form of each block: quantized, or unchanged where nothing in
the block is quantized. Where a list of blocks ends and another begins (a vision tower, a decoder, a head), the model itself runs in between, with the
finished blocks quantized.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchao_qig.watch.block import Block, GroupBatch, GroupState
from torchao_qig.watch.observer import Call, Observer, RecordedCall
from torchao_qig.watch.stream import Stream


def _correspond(part: GroupBatch, x: Tensor) -> bool:
    """Whether the rows of an input belong to the same tokens as at full precision: a router may have chosen others."""
    if part.layout.rows is not None or x.shape != part.exact.shape:
        return False
    if x.dim() > 2:
        return True
    exact = part.exact.to(x.device).float()
    return float((x.float() - exact).square().sum()) < 0.5 * float(exact.square().sum())  # unrelated rows differ by about twice exact's sum


class QuantizedStream:
    """The samples of `stream` on their way through the quantized blocks."""

    def __init__(self, stream: Stream, quantized: Stream | None = None) -> None:
        self.stream = stream
        self.quantized = quantized if quantized is not None else stream.twin()  # nothing has been quantized yet: they begin alike

    @property
    def hidden(self) -> list[Any]:
        """The second hidden states, one per micro-batch."""
        return [piece.hidden for piece in self.quantized.pieces]

    def call(self, block: Block, number: int) -> Call:
        """The call of the block at hand for a micro-batch, with the second hidden state."""
        return block.second_call(self.quantized, number)

    def feed(self, block: Block, quantized_block: nn.Module, state: GroupState) -> None:
        """Give a group the inputs that the quantized model has. Rows that a router chose keep theirs, since the quantized block may route differently."""
        state.forget_sums()
        for part, seen in self.watch(block, quantized_block, state):
            if seen is not None:
                part.exact_x = part.seen.x
                x, call = block.store.put((seen.x, Call((), {}) if state.group.alone else seen.call))
                part.seen = RecordedCall(x, call, part.seen.out)
            state.note(part.layout.view(part.seen.x.to(block.device)), part.layout.counted, block.needs.peaks)

    def watch(self, block: Block, quantized_block: nn.Module, state: GroupState) -> Iterator[tuple[GroupBatch, RecordedCall | None]]:
        """Run a group's micro-batches through the quantized block.

        Yields each of the group's parts with the call recorded there, or with None where the rows do not belong to the same tokens.
        """
        for number in sorted({part.piece for part in state.parts}):
            parts = [part for part in state.parts if part.piece == number]
            call = self.call(block, number)
            with torch.no_grad(), Observer(quantized_block, list(state.group.linears), block.copies) as observed:
                quantized_block(*call.args, **call.kwargs)
            seen = observed.seen(state.group.inspected, state.group.linears)
            same = len(seen) == len(parts) and all(_correspond(part, s.x) for part, s in zip(parts, seen, strict=True))
            yield from zip(parts, seen if same else [None] * len(parts), strict=True)

    def advance(self, block: Block, quantized_block: nn.Module) -> None:
        """Run the samples through the quantized block; its outputs are what the next block will get."""
        for number, piece in enumerate(self.quantized.pieces):
            call = self.call(block, number)
            with torch.no_grad():
                self.quantized.advance(piece, quantized_block(*call.args, **call.kwargs))
