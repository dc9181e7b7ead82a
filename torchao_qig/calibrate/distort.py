"""Inputs as the quantized model will have them (`propagate_error`, `compensate`, int8 activations), next to the full-precision ones.

The samples have a second hidden state that goes through each block as it will be, also through blocks in which nothing is quantized. Where a
list of blocks ends and another begins (a vision tower, a decoder, a head), the model itself runs in between, with the finished blocks quantized.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchao_qig.calibrate.block import Block
from torchao_qig.calibrate.draft import Draft
from torchao_qig.calibrate.observer import Call, Observer, Seen, patched, replica
from torchao_qig.calibrate.result import Calibration
from torchao_qig.calibrate.stream import Stream, cast
from torchao_qig.calibrate.work import Part, Work
from torchao_qig.formats import LinearForm


@contextmanager
def running_quantized(root: nn.Module, blocks: dict[str, dict[str, LinearForm]], found: Calibration) -> Iterator[None]:
    """Run the model with these blocks as they have been calibrated; each is made when it runs, so that no two exist at once."""
    modules = {name: root.get_submodule(name) for name in blocks}
    plain = {name: replica(module, _device_of(module)) for name, module in modules.items()}  # without the forwards that are exchanged below

    def forward_of(name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: Draft.of(root, name, blocks[name], found).module(plain[name], _device_of(plain[name]))(*args, **kwargs)

    with patched({module: forward_of(name) for name, module in modules.items()}):
        yield


def _device_of(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def _correspond(part: Part, x: Tensor) -> bool:
    """Whether the rows of an input belong to the same tokens as at full precision: a router may have chosen others."""
    if part.layout.rows is not None or x.shape != part.exact.shape:
        return False
    if x.dim() > 2:
        return True
    exact = part.exact.to(x.device).float()
    return float((x.float() - exact).square().sum()) < 0.5 * float(exact.square().sum())  # 2 between rows that have nothing in common


class Distortion:
    """The second stream: the same samples, as the model quantized so far has them."""

    def __init__(self, stream: Stream, quantized: Stream | None = None) -> None:
        self.stream = stream
        self.quantized = quantized if quantized is not None else stream.twin()  # nothing has been quantized yet: they begin alike

    @property
    def hidden(self) -> list[Any]:
        """The second hidden states, one per piece."""
        return [piece.hidden for piece in self.quantized.pieces]

    def call(self, block: Block, number: int) -> Call:
        return cast(self.quantized.call(self.quantized.pieces[number]), block.device, block.main_dtype, block.model_dtype)

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
        """Send the samples through the block as it will be: what they are after it is what the next block will get."""
        for number, piece in enumerate(self.quantized.pieces):
            call = self.call(block, number)
            with torch.no_grad():
                self.quantized.advance(piece, bent(*call.args, **call.kwargs))
