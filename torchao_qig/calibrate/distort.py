"""Inputs as the quantized model will have them (`propagate_error`, `compensate`, int8 activations), next to the full-precision ones.

The samples have a second hidden state that goes through each block as it will be: the scales found so far, and every linear
rounded. A group's candidates are then tried on its input there.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from torchao_qig.calibrate.apply import changes, commit
from torchao_qig.calibrate.block import Block
from torchao_qig.calibrate.observer import Call, Observer, Seen, replica
from torchao_qig.calibrate.result import Calibration, GroupResult
from torchao_qig.calibrate.stream import Stream, cast
from torchao_qig.calibrate.work import Part, Work
from torchao_qig.config import QIGWeightOnlyConfig


def quantized_so_far(block: Block, name: str, results: list[GroupResult], configs: dict[str, QIGWeightOnlyConfig]) -> nn.Module:
    """The block with the scales of `results` and all its linears rounded; `configs` by name in the block."""

    def inner(full: str) -> str:
        return full.removeprefix(f"{name}.")

    groups = {r.label: replace(r, linears=[inner(n) for n in r.linears], fold_into=inner(r.fold_into)) for r in results}
    bent = replica(block.exact, block.device)
    commit(changes(bent, Calibration(groups=groups), configs, simulate=True))
    return bent


def _correspond(part: Part, x: Tensor) -> bool:
    """Whether the rows of an input belong to the same tokens as at full precision: a router may have chosen others."""
    if part.layout.rows is not None or x.shape != part.exact.shape:
        return False
    if x.dim() > 2:
        return True
    exact = part.exact.to(x.device).float()
    return float((x.float() - exact).square().sum()) < 0.5 * float(exact.square().sum())  # 2 between rows that have nothing in common


class Distortion:
    """The second hidden states, one per piece."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.hidden: list[Tensor] = [p.hidden for p in stream.pieces]

    def call(self, block: Block, number: int) -> Call:
        return cast(self.stream.call(self.stream.pieces[number], hidden=self.hidden[number]), block.device, block.main_dtype, block.model_dtype)

    def feed(self, block: Block, bent: nn.Module, work: Work) -> None:
        """Exchange the inputs of a group's parts. (Rows that a router chose stay: the other block may route otherwise.)"""
        work.total, work.count, work.peak = None, 0.0, None
        for part, seen in self.watch(block, bent, work):
            if seen is not None:
                part.exact_x = part.seen.x
                x, call = block.store.put((seen.x, Call((), {}) if work.group.alone else seen.call))
                part.seen = Seen(x, call, part.seen.out)
            work.note(part.layout.view(part.seen.x.to(block.device)), part.layout.counted, block.config.smoothing is not None)

    def watch(self, block: Block, bent: nn.Module, work: Work) -> Iterator[tuple[Part, Seen | None]]:
        """Run a group's pieces through `bent`: each of its parts, and what the group saw there; None where rows do not correspond."""
        for number in sorted({part.piece for part in work.parts}):
            parts = [part for part in work.parts if part.piece == number]
            call = self.call(block, number)
            with torch.no_grad(), Observer(bent, list(work.group.linears), block.copies) as observed:
                bent(*call.args, **call.kwargs)
            seen = observed.seen(work.group.inspected, work.group.linears)
            same = len(seen) == len(parts) and all(_correspond(part, s.x) for part, s in zip(parts, seen, strict=True))
            yield from zip(parts, seen if same else [None] * len(parts), strict=True)

    def advance(self, block: Block, bent: nn.Module) -> None:
        """Move on to the next block."""
        for number, piece in enumerate(self.stream.pieces):
            call = self.call(block, number)
            with torch.no_grad():
                self.hidden[number] = self.stream.after(piece, bent(*call.args, **call.kwargs), self.hidden[number])
