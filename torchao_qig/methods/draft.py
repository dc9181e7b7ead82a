"""A draft of one block: all that has been decided about it, and the only place that makes the quantized block.

Calibration decides in steps: first the scales of every group and where they go, then the integers of every linear. `Draft.module` makes a copy of the
block with what has been decided so far; linears about which nothing has been decided are rounded to nearest, or left exact. The weights in the copy are
dense and have the values that the packed ones stand for, so that it runs as fast as the block itself.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchao_qig.formats import Activations, CodedFormat, LinearForm
from torchao_qig.formats.base import FLOAT
from torchao_qig.methods.fold import scaled_linear
from torchao_qig.methods.group_result import GroupResult
from torchao_qig.methods.scales import Scales, with_input_scale
from torchao_qig.watch.groups import Group, join, labels
from torchao_qig.watch.observer import replica

Rest = Literal["exact", "nearest"]


class Draft:
    """What has been decided about the block `name` of `root`.

    Attributes:
        forms: what the block's linears become, by their names in the block.
        groups: label of a group -> its scale and how it was found.
        weights: stored weights, by the linears' names in the model.
        squared_errors: label of a group -> its squared error when rounded to nearest, and as decided.
        tokens, completeness: label of a group -> token weights per sample, and their completeness errors.
        labels: group -> its label.
        made: the quantized block, where a step has made it already.
    """

    def __init__(
        self, root: nn.Module, name: str, forms: dict[str, LinearForm], groups: Iterable[GroupResult] = (), weights: dict[str, Tensor] | None = None
    ) -> None:
        self.root, self.name, self.forms = root, name, forms
        self.scales = Scales({join(name, n) for n in forms})
        self.groups: dict[str, GroupResult] = {}
        self.weights = weights or {}
        self.squared_errors: dict[str, tuple[float, float]] = {}
        self.tokens: dict[str, list[Tensor]] = {}
        self.completeness: dict[str, Tensor] = {}
        self.labels: dict[Group, str] = {}
        self.made: nn.Module | None = None
        for group in groups:
            self.add(group)

    def add(self, group: GroupResult) -> None:
        """Note the scale that was chosen for a group."""
        self.groups[group.label] = group
        self.scales.add(self.root, group)

    def name_groups(self, groups: Iterable[Group]) -> None:
        """Give every group its label."""
        groups = list(groups)
        self.labels = dict(zip(groups, labels(groups, self.name), strict=True))

    @property
    def activations(self) -> Activations:
        """What the block's linears do to their inputs. It is the same for all linears of a calibration."""
        return next((form.activations for form in self.forms.values()), FLOAT)

    def weight_dtype(self, inner: str) -> torch.dtype:
        """The dtype that a linear's weight has in the model."""
        dtype = self.root.get_submodule(join(self.name, inner)).weight.dtype
        assert isinstance(dtype, torch.dtype)
        return dtype

    def scaled(self, inner: str) -> tuple[Tensor, Tensor | None]:
        """Weight (at least float32) and bias of a linear with its scales in them."""
        full = join(self.name, inner)
        linear = self.root.get_submodule(full)
        assert isinstance(linear, nn.Linear)
        return scaled_linear(linear, self.scales.columns.get(full), self.scales.rows.get(full))

    def before(self, inner: str) -> Tensor | None:
        """The factors that a linear's input is multiplied by (`act_pre_scale`); None without any."""
        return self.scales.before.get(join(self.name, inner))

    def module(self, block: nn.Module, device: torch.device, rest: Rest = "nearest") -> nn.Module:
        """Make a copy of `block` with what has been decided so far.

        Args:
            block: the block itself, or a replica of it in another dtype.
            rest: whether linears whose codes are undecided are rounded to nearest or stay exact.
        """
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
                if not isinstance(form.format, CodedFormat) and rest == "nearest":  # torchao's weight multiplies integers by itself
                    stored = with_input_scale(form.stored(weight.to(device), linear.weight.dtype), before, form)
                    linear.weight = nn.Parameter(stored, requires_grad=False)
                    continue
                linear.forward = _rounding_forward(linear, before, form.activations)
            self.put(made, inner, self._decided(inner, weight.to(device), rest))
        return made

    def _decided(self, inner: str, weight: Tensor, rest: Rest) -> Tensor:
        """The dense weight of a linear: of the codes that were decided, or else of `weight`, as `rest` says."""
        packed = self.weights.get(join(self.name, inner))
        if packed is not None:
            return packed.to(weight.device).dequantize(torch.float32)
        return self.forms[inner].rounder(self.weight_dtype(inner))(weight, None) if rest == "nearest" else weight

    def relative_gain(self) -> float | None:
        """The relative change of the block's error against rounding to nearest (negative: it fell); None where nothing was measured."""
        errors = list(self.squared_errors.values()) or [(g.rounding_loss, g.loss) for g in self.groups.values()]
        before, after = (sum(losses) for losses in zip(*errors, strict=True)) if errors else (0.0, 0.0)
        return after / before - 1 if before > 0 else None

    def put(self, made: nn.Module, inner: str, weight: Tensor) -> None:
        """Set a linear's weight in a copy of the block. `weight` is dense and carries its scales, except for the factors of the input."""
        before = self.before(inner)
        _set(made.get_submodule(inner), "weight", weight if before is None else weight * before.to(weight))


def _rounding_forward(linear: nn.Linear, before: Tensor | None, activations: Activations) -> Callable[[Tensor], Tensor]:
    """A forward that rounds the input of a linear with a dense weight. The input is multiplied by `before` while it is rounded."""
    columns = None if before is None else 1 / before.float()
    return lambda x: F.linear(activations.fake(x, columns), linear.weight, linear.bias)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter. The new one has the device and the dtype of the old one."""
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.to(old.device, old.dtype), requires_grad=False))
