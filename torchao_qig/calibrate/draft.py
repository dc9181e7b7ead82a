"""A draft of one block: all that has been decided about it, and the only place that makes the block as it will be.

Calibration decides in steps: first the scales of every group and where they go, then the integers of every linear. `Draft.module` makes a copy of the
block with what has been decided so far; linears about which nothing has been decided are rounded to nearest, or left exact. The weights in the copy are
dense and have the values that the packed ones stand for, so that it runs as fast as the block itself.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from torchao_qig.calibrate.apply import Scales, packed_by_base_config, rounder, rounding_forward
from torchao_qig.calibrate.fold import scaled_linear
from torchao_qig.calibrate.groups import join
from torchao_qig.calibrate.observer import replica
from torchao_qig.calibrate.result import Calibration, GroupResult
from torchao_qig.config import QIGWeightOnlyConfig
from torchao_qig.tensor import PackedIntTensor

Rest = Literal["exact", "nearest"]


class Draft:
    """What has been decided about the block `name` of `root`; `configs` are those of its linears that are quantized, by name in the block."""

    def __init__(
        self,
        root: nn.Module,
        name: str,
        configs: dict[str, QIGWeightOnlyConfig],
        groups: Iterable[GroupResult] = (),
        weights: dict[str, PackedIntTensor] | None = None,
    ) -> None:
        self.root, self.name, self.configs = root, name, configs
        self.scales = Scales(root, Calibration(groups={g.label: g for g in groups}), {join(name, n): c for n, c in configs.items()})
        self.weights = weights or {}  # integers, by the linears' names in the model

    @classmethod
    def of(cls, root: nn.Module, name: str, configs: dict[str, QIGWeightOnlyConfig], found: Calibration) -> "Draft":
        """What a calibration has found in the block."""
        part = found.of_block(name)
        return cls(root, name, configs, part.groups.values(), part.weights)

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
        for inner, config in self.configs.items():
            linear = made.get_submodule(inner)
            assert isinstance(linear, nn.Linear)
            weight, bias = self.scaled(inner)
            before = self.before(inner)
            before = None if before is None else before.to(device)
            if bias is not None:
                _set(linear, "bias", bias)
            if config.int8_activations and config.base_config is not None and rest == "nearest":  # its integer products run as they are
                packed = packed_by_base_config(weight.to(device), config, linear.weight.dtype, before)
                linear.weight = nn.Parameter(packed, requires_grad=False)
                continue
            if config.int8_activations:
                linear.forward = rounding_forward(linear, before, config.official)
            self.put(made, inner, self._decided(inner, weight.to(device), rest))
        return made

    def _decided(self, inner: str, weight: Tensor, rest: Rest) -> Tensor:
        packed = self.weights.get(join(self.name, inner))
        if packed is not None:
            return packed.to(weight.device).dequantize(torch.float32)
        dtype = self.root.get_submodule(join(self.name, inner)).weight.dtype
        return rounder(self.configs[inner], dtype)(weight, None) if rest == "nearest" else weight

    def put(self, made: nn.Module, inner: str, weight: Tensor) -> None:
        """Give a copy of the block a dense weight that already carries its scales."""
        before = self.before(inner)
        _set(made.get_submodule(inner), "weight", weight if before is None else weight * before.to(weight))


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """In the device and dtype that the parameter has."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.device, old.dtype), requires_grad=False))
