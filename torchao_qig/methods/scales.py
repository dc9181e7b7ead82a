"""Where equalization scales go in a model: into the columns and rows of weights, into norms, or in front of a linear."""

from collections.abc import Container
from typing import NamedTuple

from torch import Tensor, nn

from torchao_qig.errors import UserError
from torchao_qig.formats import LinearForm
from torchao_qig.methods.fold import norm_parameters, pre_scale
from torchao_qig.methods.group_result import GroupResult
from torchao_qig.tensor import PackedIntTensor


class Change(NamedTuple):
    """A parameter to set."""

    module: nn.Module
    name: str
    value: nn.Parameter


def frozen(t: Tensor) -> nn.Parameter:
    """A parameter that is not trained."""
    return nn.Parameter(t, requires_grad=False)


class Scales:
    """The scales of some linears, as factors by the linears' names.

    Attributes:
        targets: names of the linears that are quantized.
        columns: what the columns of a linear's weight are multiplied by.
        rows: what the last rows of a linear's weight are divided by.
        before: what a linear's input is multiplied by (`act_pre_scale`).
        norms: new parameters of norms.
    """

    def __init__(self, targets: Container[str]) -> None:
        self.targets = targets
        self.columns: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self.norms: list[Change] = []

    def add(self, model: nn.Module, group: GroupResult) -> None:
        """Put a group's scale where it goes, if any of its linears is a target."""
        members = [n for n in group.linears if n in self.targets]
        if not members:
            return
        linear = model.get_submodule(members[0])
        assert isinstance(linear, nn.Linear)
        if linear.in_features != len(group.scale):
            raise UserError(f"calib: made for another model: {members[0]} has {linear.in_features} inputs here, {len(group.scale)} there")
        scale = group.scale.to(linear.weight.device)
        whole = len(members) == len(group.linears)
        if whole and group.fold_kind == "linear" and group.fold_into in self.targets:
            self.rows[group.fold_into] = scale
        elif whole and group.fold_kind.endswith("norm"):
            norm = model.get_submodule(group.fold_into)
            new, scale = norm_parameters(norm, group.fold_kind, scale)
            self.norms += [Change(norm, name, frozen(value)) for name, value in new.items()]
        else:
            before, scale = pre_scale(scale, linear.weight.dtype)
            self.before.update(dict.fromkeys(members, before))
        self.columns.update(dict.fromkeys(members, scale))


def with_input_scale(weight: Tensor, before: Tensor | None, form: LinearForm) -> Tensor:
    """The stored weight, changed so that its linear first multiplies its input by `before` (None: by nothing)."""
    if before is not None and not hasattr(weight, "act_pre_scale"):
        raise UserError(f"format={form.describe()[0]}: its {type(weight).__name__} takes no act_pre_scale; pass pre_scale=False or another config")
    if before is not None or isinstance(weight, PackedIntTensor):
        weight.act_pre_scale = before
    return weight
