"""Put a calibration into a model: scales into norms and weights, then round and pack. All is made first, then set at once."""

from collections.abc import Container
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchao_qig.calibrate.fold import norm_parameters, pre_scale, scaled_linear
from torchao_qig.calibrate.result import Calibration, GroupResult
from torchao_qig.calibrate.shared import SharedWeights
from torchao_qig.errors import UserError
from torchao_qig.formats import LinearForm
from torchao_qig.tensor import PackedIntTensor


class Change(NamedTuple):
    """A parameter to set."""

    module: nn.Module
    name: str
    value: nn.Parameter


def _chosen(name: str, found: Calibration, targets: dict[str, LinearForm], linear: nn.Linear) -> Tensor:
    """The integers that calibration chose for a linear; they hold for the scales and the dtype that they were chosen with."""
    weight, dtype = found.weights[name], targets[name].scale_dtype(linear.weight.dtype)
    if (weight.shape, weight.dtype) != (linear.weight.shape, dtype):
        raise UserError(f"calib: {name} was rounded as {tuple(weight.shape)} in {weight.dtype}, it is {tuple(linear.weight.shape)} in {dtype}; calibrate again")
    into = {g.label: [g.fold_into] if g.fold_kind == "linear" else [] for g in found.groups.values()}
    together = [g for g in found.groups.values() if name in (*g.linears, *into[g.label])]
    missing = sorted({n for g in together for n in (*g.linears, *into[g.label])} - set(targets))
    if missing:
        raise UserError(f"calib: {name} was rounded together with {', '.join(missing)}; quantize these, too, or calibrate again")
    return weight.to(linear.weight.device, copy=True)


def _frozen(t: Tensor) -> nn.Parameter:
    return nn.Parameter(t, requires_grad=False)


class Scales:
    """Who is scaled by what, in the model at hand."""

    def __init__(self, model: nn.Module, found: Calibration, targets: dict[str, LinearForm]) -> None:
        self.columns: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}  # act_pre_scale
        self.norms: list[Change] = []
        for group in found.groups.values():
            members = [n for n in group.linears if n in targets]
            if members:
                self._take(model, group, members, targets)

    def _take(self, model: nn.Module, group: GroupResult, members: list[str], targets: dict[str, LinearForm]) -> None:
        linear = model.get_submodule(members[0])
        assert isinstance(linear, nn.Linear)
        if linear.in_features != len(group.scale):
            raise UserError(f"calib: made for another model: {members[0]} has {linear.in_features} inputs here, {len(group.scale)} there")
        scale = group.scale.to(linear.weight.device)
        whole = len(members) == len(group.linears)
        if whole and group.fold_kind == "linear" and group.fold_into in targets:
            self.rows[group.fold_into] = scale
        elif whole and group.fold_kind.endswith("norm"):
            norm = model.get_submodule(group.fold_into)
            new, scale = norm_parameters(norm, group.fold_kind, scale)
            self.norms += [Change(norm, name, _frozen(value)) for name, value in new.items()]
        else:
            before, scale = pre_scale(scale, linear.weight.dtype)
            self.before.update(dict.fromkeys(members, before))
        self.columns.update(dict.fromkeys(members, scale))


def with_input_scale(weight: Tensor, before: Tensor | None, form: LinearForm) -> Tensor:
    """A stored weight whose linear multiplies its input by `before` first."""
    if before is not None and not hasattr(weight, "act_pre_scale"):
        raise UserError(f"base_config={form.describe()[0]}: its {type(weight).__name__} takes no act_pre_scale; pass pre_scale=False or another config")
    if before is not None or isinstance(weight, PackedIntTensor):
        weight.act_pre_scale = before
    return weight


def changes(model: nn.Module, found: Calibration, targets: dict[str, LinearForm], pre_scaled: Container[str] = ()) -> list[Change]:
    """All parameters to set in `model` so that `targets` are quantized as calibrated.

    `pre_scaled`: linears that get an `act_pre_scale` of ones where calibration gives them none.
    """
    scales, shared = Scales(model, found, targets), SharedWeights(model, targets)
    made = list(scales.norms)
    values: dict[int, nn.Parameter] = {}  # by weight: linears that share one go on sharing
    _refuse_to_untie(model, targets)
    for name, form in targets.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if name in shared and id(linear.weight) in values:
            made.append(Change(linear, "weight", values[id(linear.weight)]))
            continue
        before, source = scales.before.get(name), shared.decided(name, found.weights)
        weight, bias = scaled_linear(linear, scales.columns.get(name), scales.rows.get(name))
        if before is None and name in pre_scaled:
            before = torch.ones(linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
        stored = form.stored(weight, linear.weight.dtype) if source is None else _chosen(source, found, targets, linear)
        values[id(linear.weight)] = _frozen(with_input_scale(stored, before, form))
        made.append(Change(linear, "weight", values[id(linear.weight)]))
        if bias is not None and name in scales.rows:
            made.append(Change(linear, "bias", _frozen(bias)))
    return made


def _refuse_to_untie(model: nn.Module, targets: dict[str, LinearForm]) -> None:
    """A weight that is also held by a module which stays as it is cannot be quantized for one of the two."""
    wanted = {id(model.get_submodule(name).weight): name for name in targets}
    for holder, module in model.named_modules():
        for weight in module._parameters.values():
            name = wanted.get(id(weight))
            if name is not None and holder not in targets:
                raise UserError(f"calib: {name} shares its weight with {holder}, which is not chosen here; choose both, or neither")


def commit(made: list[Change]) -> None:
    for module, name, value in made:
        setattr(module, name, value)
