"""One group under calibration, and what each piece of the samples contributes to it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchao_qig.calibrate import ranks, search
from torchao_qig.calibrate.batches import Tokens
from torchao_qig.calibrate.groups import Group
from torchao_qig.calibrate.observer import Call, Observer, Seen
from torchao_qig.calibrate.stream import cut
from torchao_qig.calibrate.tokens import Layout

KEEP = 2**30  # bytes of linears' outputs that are kept instead of computed again


@dataclass
class Part:
    """What one piece contributes to a group."""

    piece: int
    seen: Seen
    layout: Layout
    weights: Tensor | None = None  # (B, T) of the layout's grid
    completeness: Tensor | None = None
    rounded_out: Tensor | None = None  # the inspected module's output with the group's linears plainly rounded, where it fell out
    exact_x: Tensor | None = None  # the group's input at full precision, where `seen` has another

    @property
    def exact(self) -> Tensor:
        """The group's input at full precision."""
        return self.seen.x if self.exact_x is None else self.exact_x


@dataclass
class Work:
    """One group under calibration."""

    group: Group
    parts: list[Part] = field(default_factory=list)
    total: Tensor | None = None
    count: float = 0.0
    peak: Tensor | None = None  # of |x| per channel, for SmoothQuant
    weighting: str = "none"

    def note(self, x: Tensor, counted: Tensor, peaks: bool) -> None:
        """Add (B, T, C) inputs to the channels' sums, and to their largest if `peaks`."""
        total = search.absolute_sum(x, counted)
        self.total = total if self.total is None else self.total + total
        self.count += float(counted.sum())
        if peaks:
            peak = (x.float().abs() * counted.unsqueeze(-1)).flatten(0, -2).amax(0)
            self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)

    def only_inputs(self) -> None:
        """Forget what the search needed."""
        for part in self.parts:
            part.seen, part.rounded_out = Seen(part.seen.x, Call((), {}), part.seen.x), None

    def x_mean(self, channels: int, device: torch.device) -> Tensor:
        total = torch.zeros(channels, dtype=torch.float64, device=device) if self.total is None else self.total
        sums = ranks.summed(torch.cat([total, total.new_tensor([self.count])]))
        return search.x_mean(sums[:-1], float(sums[-1]))


def around(observed: Observer, group: Group) -> list[Tensor]:
    """Inputs of the modules around a group, nearest first."""
    parts = group.linears[0].split(".")
    names = [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]
    calls = [observed.calls[n][0][0] for n in names if observed.calls.get(n)]
    return [t for c in calls for t in [*c.args, *c.kwargs.values()] if isinstance(t, Tensor) and t.is_floating_point() and t.dim() >= 2]


def known(tokens: Tokens, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Answer and vision masks of a grid; what is not known to be vision counts as answer."""
    fits = tokens.counted is not None and tokens.counted.shape == grid.shape
    vision = tokens.vision.to(grid.device) & grid if fits and tokens.vision is not None else torch.zeros_like(grid)
    answer = tokens.answer.to(grid.device) & grid if fits and tokens.answer is not None else grid & ~vision
    return answer, vision


def subset(part: Part, rows: list[int]) -> Part | None:
    """The part with some of its samples only; all of it where it cannot be cut."""
    size = part.layout.grid.shape[0]
    if not rows:
        return None
    if part.layout.rows is not None or len(rows) == size or part.seen.x.dim() == 2 or part.layout.shape[1] == size:
        return part
    place = Layout(part.layout.grid[rows], (len(rows), part.layout.shape[1]))
    return Part(
        part.piece,
        Seen(*cut(tuple(part.seen), rows, size)),
        place,
        *(None if t is None else t[rows] for t in (part.weights, part.completeness, part.rounded_out, part.exact_x)),
    )
