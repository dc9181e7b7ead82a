"""Inputs as the quantized model will have them (`propagate_error=True`), next to the full-precision ones.

The samples have a second hidden state that goes through each block as it will be: the scales found so far, and every linear
rounded. A group's candidates are then tried on its input there, against the outputs of full precision.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from torchao_qig.calibrate.apply import changes, commit
from torchao_qig.calibrate.block import Block
from torchao_qig.calibrate.observer import Call, Observer, Seen, replica
from torchao_qig.calibrate.result import Calibration, GroupResult
from torchao_qig.calibrate.search import absolute_sum
from torchao_qig.calibrate.stream import Stream, cast
from torchao_qig.calibrate.work import Work
from torchao_qig.config import QIGWeightOnlyConfig


def quantized_so_far(block: Block, name: str, results: list[GroupResult], configs: dict[str, QIGWeightOnlyConfig]) -> nn.Module:
    """The block with the scales of `results` and all its linears rounded; `configs` by name in the block."""

    def inner(full: str) -> str:
        return full.removeprefix(f"{name}.")

    groups = {r.label: replace(r, linears=[inner(n) for n in r.linears], fold_into=inner(r.fold_into)) for r in results}
    bent = replica(block.exact, block.device)
    commit(changes(bent, Calibration(groups=groups), configs, simulate=True))
    return bent


class Distortion:
    """The second hidden states, one per piece."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.hidden: list[Tensor] = [p.hidden for p in stream.pieces]

    def _call(self, block: Block, number: int) -> Call:
        return cast(self.stream.call(self.stream.pieces[number], hidden=self.hidden[number]), block.device, block.main_dtype, block.model_dtype)

    def feed(self, block: Block, bent: nn.Module, work: Work) -> None:
        """Exchange the inputs of a group's parts. (Routed rows stay: the other block may route otherwise.)"""
        work.total, work.count = None, 0.0
        for number in sorted({part.piece for part in work.parts}):
            call = self._call(block, number)
            with torch.no_grad(), Observer(bent, list(work.group.linears), block.copies) as observed:
                bent(*call.args, **call.kwargs)
            parts = [part for part in work.parts if part.piece == number]
            for part, seen in zip(parts, observed.seen(work.group.inspected, work.group.linears), strict=True):
                if part.layout.rows is None:
                    part.seen = block.store.put(Seen(seen.x, Call((), {}) if work.group.alone else seen.call, part.seen.out))
                total = absolute_sum(part.layout.view(part.seen.x.to(block.device)), part.layout.counted)
                work.total = total if work.total is None else work.total + total
                work.count += float(part.layout.counted.sum())

    def advance(self, block: Block, bent: nn.Module) -> None:
        """Move on to the next block."""
        for number, piece in enumerate(self.stream.pieces):
            call = self._call(block, number)
            with torch.no_grad():
                self.hidden[number] = self.stream.after(piece, bent(*call.args, **call.kwargs), self.hidden[number])
