"""A draft of one block: all that has been decided about it, and the only place that makes the block as it will be.

Calibration decides in steps: first the scales of every group and where they go, then the integers of every linear. `Draft.module` makes a copy of the
block with what has been decided so far; linears about which nothing has been decided are rounded to nearest, or left exact. The weights in the copy are
dense and have the values that the packed ones stand for, so that it runs as fast as the block itself.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchao_qig.calibrate.apply import Scales, with_input_scale
from torchao_qig.calibrate.fold import scaled_linear
from torchao_qig.calibrate.groups import join
from torchao_qig.calibrate.observer import replica
from torchao_qig.calibrate.result import Calibration, GroupResult
from torchao_qig.formats import Activations, CodedFormat, LinearForm

Rest = Literal["exact", "nearest"]


class Draft:
    """What has been decided about the block `name` of `root`; `forms`: what its linears become, by their names in the block."""

    def __init__(
        self,
        root: nn.Module,
        name: str,
        forms: dict[str, LinearForm],
        groups: Iterable[GroupResult] = (),
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        self.root, self.name, self.forms = root, name, forms
        self.scales = Scales(root, Calibration(groups={g.label: g for g in groups}), {join(name, n): form for n, form in forms.items()})
        self.weights = weights or {}  # integers, by the linears' names in the model

    @classmethod
    def of(cls, root: nn.Module, name: str, forms: dict[str, LinearForm], found: Calibration) -> "Draft":
        """What a calibration has found in the block."""
        part = found.of_block(name)
        return cls(root, name, forms, part.groups.values(), part.weights)

    def scaled(self, inner: str) -> tuple[Tensor, Tensor | None]:
        """Weight (at least float32) and bias of a linear with its scales in them."""
        full = join(self.name, inner)
        linear = self.root.get_submodule(full)
        assert isinstance(linear, nn.Linear)
        return scaled_linear(linear, self.scales.columns.get(full), self.scales.rows.get(full))

    def before(self, inner: str) -> Tensor | None:
        """What multiplies a linear's input."""
        return self.scales.before.get(join(self.name, inner))

    def module(self, block: nn.Module, device: torch.device, rest: Rest = "nearest") -> nn.Module:
        """A copy of `block` (the block itself, or a replica of it in another dtype) as decided so far; `rest`: what undecided linears have."""
        made = replica(block, device)
        inside = {id(m): n for n, m in self.root.get_submodule(self.name).named_modules()}
        for change in self.scales.norms:
            assert isinstance(change.value, Tensor)
            _set(made.get_submodule(inside[id(change.module)]), change.name, change.value)
        for inner, form in self.forms.items():
            linear = made.get_submodule(inner)
            assert isinstance(linear, nn.Linear)
            weight, bias = self.scaled(inner)
            before = self.before(inner)
            before = None if before is None else before.to(device)
            if bias is not None:
                _set(linear, "bias", bias)
            if form.activations.rounds:
                if not isinstance(form.format, CodedFormat) and rest == "nearest":  # its integer products run as they are
                    stored = with_input_scale(form.stored(weight.to(device), linear.weight.dtype), before, form)
                    linear.weight = nn.Parameter(stored, requires_grad=False)
                    continue
                linear.forward = _rounding_forward(linear, before, form.activations)
            self.put(made, inner, self._decided(inner, weight.to(device), rest))
        return made

    def _decided(self, inner: str, weight: Tensor, rest: Rest) -> Tensor:
        packed = self.weights.get(join(self.name, inner))
        if packed is not None:
            return packed.to(weight.device).dequantize(torch.float32)
        dtype = self.root.get_submodule(join(self.name, inner)).weight.dtype
        return self.forms[inner].rounder(dtype)(weight, None) if rest == "nearest" else weight

    def put(self, made: nn.Module, inner: str, weight: Tensor) -> None:
        """Give a copy of the block a dense weight that already carries its scales."""
        before = self.before(inner)
        _set(made.get_submodule(inner), "weight", weight if before is None else weight * before.to(weight))


def _rounding_forward(linear: nn.Linear, before: Tensor | None, activations: Activations) -> Callable[[Tensor], Tensor]:
    """A forward for a linear with a dense weight that rounds its input, which `before` multiplies for that."""
    columns = None if before is None else 1 / before.float()
    return lambda x: F.linear(activations.fake(x, columns), linear.weight, linear.bias)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """In the device and dtype that the parameter has."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.device, old.dtype), requires_grad=False))
