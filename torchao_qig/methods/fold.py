"""Where a group's scale goes without changing the function: x / s and W * s.

- Folded, at no cost: into the norm that makes x (weight / s; Gemma's norms multiply by 1 + weight), or into the linear whose
  last output rows map one to one to x's channels (up_proj before down_proj, v_proj before o_proj without grouped heads).
- Otherwise as `act_pre_scale` on the packed weight, which multiplies x by 1 / s.

Which of these is exact is not guessed from names: a fold is tried, with powers of two as scales, and kept if the block's
output stays the same. A norm that feeds anything else than the group fails this test, as does a mapping that is not one to one.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchao_qig.watch import ranks
from torchao_qig.watch.block import Block
from torchao_qig.watch.groups import Group
from torchao_qig.watch.observer import Observer, first_tensor, patched, replica

TOLERANCE = 1e-4  # by how much outputs may differ, relative to the largest change that the block makes to its input; in float32
Run = Callable[[nn.Module], Tensor]


class Fold(NamedTuple):
    """A module that takes a scale s.

    Attributes:
        kind: "norm" (weight / s), "offset norm" ((1 + weight) / s - 1) or "linear" (last rows / s).
        producer: the module's name in the block.
    """

    kind: str
    producer: str


def _with_rows(scale: Tensor, rows: int) -> Tensor:
    """`scale` for the last rows, 1 for the rows before."""
    return torch.cat([scale.new_ones(rows - len(scale)), scale])


def norm_parameters(norm: nn.Module, kind: str, scale: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The norm's parameters with 1 / scale in them, in their dtype, and the scale that they stand for after rounding to that dtype."""
    offset = 1.0 if kind == "offset norm" else 0.0
    weight = norm.weight.detach()
    compute = torch.promote_types(weight.dtype, torch.float32)
    scale, factor = scale.to(weight.device, compute), weight.to(compute) + offset
    new = {"weight": (factor / scale - offset).to(weight.dtype)}
    if weight.dtype != compute:  # the linears undo what rounding did to the norm
        rounded = new["weight"].to(compute) + offset
        scale = torch.where(rounded != 0, factor / rounded, scale)
    if isinstance(getattr(norm, "bias", None), Tensor):
        new["bias"] = (norm.bias.detach() / scale).to(weight.dtype)
    return new, scale


def pre_scale(scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`act_pre_scale` in `dtype`, and the scale that it stands for after rounding to `dtype`."""
    compute = torch.promote_types(dtype, torch.float32)
    inverse = (1 / scale.to(compute)).to(dtype)
    return inverse, scale.to(compute) if dtype == compute else 1 / inverse.to(compute)


def scaled_linear(linear: nn.Linear, columns: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight (at least float32) and bias of a linear whose columns are multiplied by `columns` and whose last output rows are divided by `rows`."""
    weight, bias = linear.weight.detach(), linear.bias.detach() if linear.bias is not None else None
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if columns is not None:
        weight = weight * columns.to(weight)
    if rows is not None:
        divisor = _with_rows(rows.to(weight), weight.shape[0])
        weight = weight / divisor.unsqueeze(1)
        bias = None if bias is None else (bias / divisor).to(bias.dtype)
    return weight, bias


def _powers_of_two(channels: int, seed: int, device: torch.device) -> Tensor:
    """A random scale of entries 2 and 0.5, which floating-point numbers can be multiplied by without rounding."""
    up = torch.rand(channels, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(up, 2.0, 0.5).to(device)


def _trial(block: nn.Module, folds: Iterable[tuple[Group, Fold]], device: torch.device) -> nn.Module:
    """A replica of the block with these folds applied, for scales of powers of two."""
    trial = replica(block, device)
    columns, rows = {}, {}
    for seed, (group, fold) in enumerate(folds):
        scale = _powers_of_two(trial.get_submodule(group.linears[0]).weight.shape[1], seed, device)
        columns.update(dict.fromkeys(group.linears, scale))
        producer = trial.get_submodule(fold.producer)
        if fold.kind == "linear":
            rows[fold.producer] = scale
        else:
            for name, value in norm_parameters(producer, fold.kind, scale)[0].items():
                setattr(producer, name, nn.Parameter(value, requires_grad=False))
    for name in {*columns, *rows}:
        linear = trial.get_submodule(name)
        weight, bias = scaled_linear(linear, columns.get(name), rows.get(name))
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return trial


def _outputs(observed: Observer) -> dict[str, Tensor]:
    return {name: first_tensor(observed.calls[name][0][1]) for name in observed.inputs}


def _same(a: Tensor, b: Tensor, allowed: float) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= allowed).all())


class FoldFinder:
    """Tries folds on one block.

    Args:
        run: `run(block)` gives the block's output for a small sample.
        hidden: the block's input in that sample.
        linears: names of the block's linears to be quantized.
        private: tells whether a module shares none of its parameters with another module.
    """

    def __init__(self, block: nn.Module, run: Run, hidden: Tensor | None, device: torch.device, linears: Iterable[str], private: Callable[[nn.Module], bool]):
        self.block, self.run, self.device = block, run, device
        self.linears = set(linears)
        self.private = private
        self.order: list[str] = []
        with torch.no_grad(), self._noting_order(), Observer(block, sorted(self.linears)) as observed:
            self.expected = run(block)
        self.order = [name for name in self.order if self.order.count(name) == 1]
        self.outputs = _outputs(observed)
        same = hidden is not None and hidden.shape == self.expected.shape
        change = self.expected - hidden if hidden is not None and same else self.expected
        self.allowed = TOLERANCE * float(change.abs().max())

    def _noting_order(self) -> AbstractContextManager[None]:
        """Inside the `with` block, note in `order` the names of the leaf modules that hold a weight, as they run."""
        leaves = {n: m for n, m in self.block.named_modules() if n and not list(m.children()) and isinstance(getattr(m, "weight", None), Tensor)}

        def noting(name: str, forward: Callable[..., object]) -> Callable[..., object]:
            def run(*args: object, **kwargs: object) -> object:
                self.order.append(name)
                return forward(*args, **kwargs)

            return run

        return patched({m: noting(n, m.forward) for n, m in leaves.items()})

    def exact(self, folds: Iterable[tuple[Group, Fold]]) -> bool:
        """Whether the block still computes the same with all of these folds."""
        folds = list(folds)
        trial = _trial(self.block, folds, self.device)
        names = [name for group, _ in folds for name in group.linears]
        producers = {fold.producer for _, fold in folds}  # their outputs change with the fold
        with torch.no_grad(), Observer(trial, names) as observed:
            out = self.run(trial)
        outputs = _outputs(observed)
        return _same(out, self.expected, self.allowed) and all(
            _same(outputs[n], self.outputs[n], TOLERANCE * float(self.outputs[n].abs().max())) for n in names if n not in producers
        )

    def _candidates(self, group: Group) -> Iterable[Fold]:
        """Folds to try for a group: modules that run before it, the nearest first."""
        channels = self.block.get_submodule(group.linears[0]).weight.shape[1]
        positions = [self.order.index(name) for name in group.linears if name in self.order]
        for name in reversed(self.order[: min(positions, default=0)]):
            module = self.block.get_submodule(name)
            weight = module.weight
            if not isinstance(weight, Tensor) or name in group.linears or not self.private(module):
                continue
            if weight.dim() == 1 and len(weight) == channels:
                yield from (Fold("norm", name), Fold("offset norm", name))
            elif name in self.linears and isinstance(module, nn.Linear) and weight.shape[0] >= channels:
                yield Fold("linear", name)

    def find(self, group: Group) -> Fold | None:
        """The nearest producer that takes the group's scale exactly; None where there is none."""
        return next((fold for fold in self._candidates(group) if self.exact([(group, fold)])), None)


def find_folds(finder: FoldFinder, groups: list[Group], hint: dict[Group, Fold | None]) -> dict[Group, Fold | None]:
    """A fold for each group, or None. `hint` has the folds of a block with the same groups; if they are exact here, one trial is enough."""
    if hint and all(g in hint for g in groups):
        known = [(g, fold) for g in groups if (fold := hint[g]) is not None]
        runs_here = all(fold.producer in finder.order and finder.private(finder.block.get_submodule(fold.producer)) for _, fold in known)
        if runs_here and finder.exact(known):
            return {g: hint[g] for g in groups}
    return {g: finder.find(g) for g in groups}


class Folds:
    """Finds folds in the blocks of one model. The folds of one block are tried first in the next block that has the same groups."""

    def __init__(self, model: nn.Module) -> None:
        counts = Counter(id(p) for _, m in model.named_modules(remove_duplicate=False) for p in m._parameters.values() if p is not None)
        self._shared = {i for i, n in counts.items() if n > 1}
        self._hints: dict[tuple[Group, ...], dict[Group, Fold | None]] = {}

    def find_in(self, block: Block, original: nn.Module) -> dict[Group, Fold | None]:
        """A fold, or None, for every group of a block; `original` is the block in the model."""
        assert block.sample is not None
        groups = [state.group for state in block.groups]
        reference = replica(block.exact, block.device, torch.float32)
        pairs = zip(original.modules(), reference.modules(), strict=True)
        private = {id(r) for m, r in pairs if not any(id(p) in self._shared for p in m._parameters.values())}
        finder = FoldFinder(reference, block.sample.run, block.sample.hidden, block.device, block.linears, lambda m: id(m) in private)
        key = tuple(groups)
        folds = find_folds(finder, groups, self._hints.get(key, {}))
        self._hints[key] = ranks.gathered(folds)[0]  # all ranks take what the first one found, which has the first sample
        return self._hints[key]
