"""One block on the compute device, and what its groups of linears saw when the samples ran through it.

`Block.observe` runs every micro-batch of a stream through the block. For each group of linears that share an input it keeps a `GroupState`, and in that a
`GroupBatch` for every micro-batch: the input, the call of the inspected module and its output. `Block.inspect` calls an inspected module again, with
other forwards for some linears. Samples are combined by sums only, so they may be divided among micro-batches and ranks in any way.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor, nn

from torchao_qig.watch import ranks
from torchao_qig.watch.batches import Tokens
from torchao_qig.watch.groups import Group, find_groups
from torchao_qig.watch.observer import Call, Observer, RecordedCall, first_tensor, patched, replica
from torchao_qig.watch.stream import MicroBatch, Stream, cast, cut, fresh
from torchao_qig.watch.token_layout import Layout, layout

KEEP = 2**30  # bytes of linears' outputs kept per block; further outputs are computed again when they are needed


@dataclass(frozen=True)
class Needs:
    """What a step needs recorded beside the inputs of all groups. `a | b` is everything that a or b needs."""

    second_stream: bool = False  # the samples also run through the model as quantized so far
    between_blocks: bool = False  # the same, except where the whole model is calibrated as one block
    linear_outputs: bool = False  # the outputs of linears that share their input with others
    lone_outputs: bool = False  # the outputs of linears that share their input with none
    sample: bool = False  # one sample with which the block can be replayed
    peaks: bool = False  # the largest magnitude of every input channel
    padding: bool = False  # padding counts like any other token, as in the published code
    float32: bool = False  # modules are replayed in float32, even where the device is faster in another dtype

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(*(getattr(self, f.name) or getattr(other, f.name) for f in fields(self)))


@dataclass
class GroupBatch:
    """What one micro-batch contributes to a group: one call of the group's inspected module, and what was found for it."""

    piece: int  # number of the micro-batch in the stream
    seen: RecordedCall
    layout: Layout
    weights: Tensor | None = None  # token weights, (B, T), on the layout's grid
    completeness: Tensor | None = None  # per sample, the completeness error of the token weights
    rounded_out: Tensor | None = None  # the inspected module's output with the group's linears rounded to nearest, if it has been computed
    exact_x: Tensor | None = None  # the group's full-precision input, where `seen` has that of the quantized model

    @property
    def exact(self) -> Tensor:
        """The group's input at full precision."""
        return self.seen.x if self.exact_x is None else self.exact_x


@dataclass
class GroupState:
    """A group of linears while its block is calibrated: what was recorded for it, and its token weights."""

    group: Group
    parts: list[GroupBatch] = field(default_factory=list)
    total: Tensor | None = None  # sum of |x| per channel
    count: float = 0.0  # number of tokens in `total`
    peak: Tensor | None = None  # largest |x| per channel
    weighting: str = "none"  # the name of the kind of token weights
    weighed_by: object = None  # the `TokenWeighting` that gave them

    def note(self, x: Tensor, counted: Tensor, peaks: bool) -> None:
        """Add inputs (B, T, C) to the statistics of the channels: to the sums, and to the maxima if `peaks`."""
        total = _absolute_sum(x, counted)
        self.total = total if self.total is None else self.total + total
        self.count += float(counted.sum())
        if peaks:
            peak = (x.float().abs() * counted.unsqueeze(-1)).flatten(0, -2).amax(0)
            self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)

    def forget_sums(self) -> None:
        """Reset the statistics of the channels; the group is about to get other inputs."""
        self.total, self.count, self.peak = None, 0.0, None

    def keep_inputs_only(self) -> None:
        """Drop recorded calls and outputs, to free their memory."""
        for part in self.parts:
            part.seen, part.rounded_out = RecordedCall(part.seen.x, Call((), {}), part.seen.x), None

    def mean_magnitude(self, channels: int, device: torch.device) -> Tensor:
        """Mean |x| of every channel, over all ranks."""
        total = torch.zeros(channels, dtype=torch.float64, device=device) if self.total is None else self.total
        sums = ranks.summed(torch.cat([total, total.new_tensor([self.count])]))
        return (sums[:-1] / max(float(sums[-1]), 1.0)).float()


def _absolute_sum(x: Tensor, counted: Tensor) -> Tensor:
    """The sum of |x| over the counted tokens, (C,), in float64."""
    return (counted.flatten().float() @ x.flatten(0, -2).float().abs()).double()


class OneSample:
    """Replays a block on one sample, in float32."""

    def __init__(self, stream: Stream) -> None:
        piece = stream.pieces[0]
        rows = [0] if stream.can_cut(piece) else None
        self.call = cast(stream.call(piece, rows), stream.device, torch.float32)
        self.hidden = None
        if piece.hidden is not None:
            self.hidden = piece.hidden[rows] if rows else piece.hidden
            self.hidden = self.hidden.to(stream.device, torch.float32)

    def run(self, block: nn.Module) -> Tensor:
        """The block's output for the sample."""
        call = fresh(self.call)
        return first_tensor(block(*call.args, **call.kwargs)).float()


class Block:
    """A block on the compute device, with what was recorded when it ran."""

    def __init__(self, module: nn.Module, linears: Iterable[str], stream: Stream, dtype: torch.dtype, needs: Needs) -> None:
        self.stream, self.linears, self.dtype, self.needs = stream, list(linears), dtype, needs
        self._outputs_kept = 0
        self.device, self.store = stream.device, stream.store
        main = next((p.dtype for p in module.parameters() if p.is_floating_point()), dtype)
        self.model_dtype, wider = main, torch.promote_types(main, dtype) == dtype
        self.main_dtype = dtype if wider else main  # dtype in which the samples run: the wider of the model's and the computation's
        self.exact = replica(module, self.device, self.main_dtype)
        self.low_precision = self.exact if wider else replica(module, self.device, dtype)
        self.groups: list[GroupState] = []
        self.copies = False  # whether the block writes into tensors that it computed before, so that copies have to be recorded
        self.not_plain: set[str] = set()  # linears that do more than multiply
        self.sample: OneSample | None = None  # has the stream's inputs of this block, which the stream itself drops

    def observe(self) -> None:
        """Run all micro-batches through the block, record the calls of its groups, and pass the block's outputs on as the stream's next hidden states."""
        if self.needs.sample:
            self.sample = OneSample(self.stream)
        for number, piece in enumerate(self.stream.pieces):
            observed, out = self._watch(piece)
            self._find_new_groups(observed)
            for state in self.groups:
                for seen in observed.seen(state.group.inspected, state.group.linears):
                    self._take(state, seen, number, piece.tokens, _inputs_around(observed, state.group))
            self.stream.advance(piece, out)
        mine = {state.group: state for state in self.groups}  # other ranks may have seen experts that this one has not
        self.groups = [mine.get(group) or GroupState(group) for group in dict.fromkeys(g for groups in ranks.gathered(list(mine)) for g in groups)]

    def _watch(self, piece: MicroBatch) -> tuple[Observer, object]:
        """Run one micro-batch through the block. Returns what was observed, and the block's output."""
        call = cast(self.stream.call(piece), self.device, self.main_dtype, self.model_dtype)
        with torch.no_grad(), Observer(self.exact, self.linears, self.copies) as observed:
            out = self.exact(*call.args, **call.kwargs)
        if observed.stale:  # the block writes into tensors that it computed before: from now on copies are recorded
            self.copies = True
            return self._watch(piece)
        return observed, out

    def _find_new_groups(self, observed: Observer) -> None:
        """Add the groups of linears that run for the first time (experts that no earlier token was sent to)."""
        known = {name for state in self.groups for name in state.group.linears}
        groups = find_groups(observed)
        self.not_plain |= set(observed.inputs) - {name for group in groups for name in group.linears}
        self.groups += [GroupState(group) for group in groups if not known & set(group.linears)]

    def _take(self, state: GroupState, seen: RecordedCall, number: int, tokens: Tokens, around: list[Tensor]) -> None:
        """Add one recorded call to a group, with only those of its tensors that are needed."""
        if not seen.x.numel():
            return
        place = layout(seen.x, tokens, around, everything=self.needs.padding)
        state.note(place.view(seen.x), place.counted, self.needs.peaks)
        kept = sum(y.numel() * y.element_size() for y in seen.ys)
        if state.group.alone:
            seen = RecordedCall(seen.x, Call((), {}), seen.out if self.needs.lone_outputs else seen.x)
        elif not self.needs.linear_outputs or self.dtype != self.main_dtype or self._outputs_kept + kept > KEEP:
            seen = seen._replace(ys=())
        else:
            self._outputs_kept += kept
        state.parts.append(GroupBatch(number, self.store.put(seen), place))

    def weight(self, name: str) -> Tensor:
        """A linear's weight in at least float32."""
        w = self.exact.get_submodule(name).weight
        assert isinstance(w, Tensor)
        return w.to(torch.promote_types(w.dtype, torch.float32))

    def bias(self, name: str) -> Tensor | None:
        """A linear's bias, in the dtype of the computation."""
        bias = self.low_precision.get_submodule(name).bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def ready(self, part: GroupBatch) -> RecordedCall:
        """What was recorded, moved to the compute device and cast to the dtype of the computation."""
        return RecordedCall(*cast(tuple(part.seen), self.device, self.dtype, self.main_dtype))

    def inspect(self, group: Group, call: Call, forwards: dict[str, Callable[[Tensor], Tensor]], place: Layout) -> Tensor:
        """Call a group's inspected module again, with `forwards` in place of those of some linears. Returns its output, (B, T, channels)."""
        if self.copies:  # the block must not write into recorded tensors
            call = fresh(call)
            forwards = {name: _cloning(forward) for name, forward in forwards.items()}
        with patched({self.low_precision.get_submodule(name): forward for name, forward in forwards.items()}):
            return place.view(first_tensor(self.low_precision.get_submodule(group.inspected)(*call.args, **call.kwargs)))

    def share(self, group: Group) -> float:
        """The share of the block's weights that lies in the group's inspected module, 0 to 1."""
        sizes = {n: self.exact.get_submodule(n).weight.numel() for n in self.linears}
        return sum(sizes[n] for n in group.inside) / sum(sizes.values())

    def second_call(self, second: Stream, number: int) -> Call:
        """What the block is called with for a micro-batch of another stream of the same samples."""
        return cast(second.call(second.pieces[number]), self.device, self.main_dtype, self.model_dtype)


def _cloning(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: forward(x).clone()


def _inputs_around(observed: Observer, group: Group) -> list[Tensor]:
    """Floating-point inputs of the modules around a group, those of the nearest module first."""
    parts = group.linears[0].split(".")
    names = [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]
    calls = [observed.calls[n][0][0] for n in names if observed.calls.get(n)]
    return [t for c in calls for t in [*c.args, *c.kwargs.values()] if isinstance(t, Tensor) and t.is_floating_point() and t.dim() >= 2]


def known_masks(tokens: Tokens, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Answer and vision masks on a layout's grid. Where the batch does not mark answers, every token that is not vision counts as one."""
    fits = tokens.counted is not None and tokens.counted.shape == grid.shape
    vision = tokens.vision.to(grid.device) & grid if fits and tokens.vision is not None else torch.zeros_like(grid)
    answer = tokens.answer.to(grid.device) & grid if fits and tokens.answer is not None else grid & ~vision
    return answer, vision


def some_samples(part: GroupBatch, rows: list[int]) -> GroupBatch | None:
    """Cut a part down to the samples `rows`. Returns the whole part where it cannot be cut, and None where `rows` is empty."""
    size = part.layout.grid.shape[0]
    if not rows:
        return None
    if part.layout.rows is not None or len(rows) == size or part.seen.x.dim() == 2 or part.layout.shape[1] == size:
        return part
    place = Layout(part.layout.grid[rows], (len(rows), part.layout.shape[1]))
    return GroupBatch(
        part.piece,
        RecordedCall(*cut(tuple(part.seen), rows, size)),
        place,
        *(None if t is None else t[rows] for t in (part.weights, part.completeness, part.rounded_out, part.exact_x)),
    )
