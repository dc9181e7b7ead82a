"""Put a calibration into a model: scales into norms and weights, then round and pack. All is made first, then set at once."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchao_qig._compat import quantized_weight
from torchao_qig.calibrate.fold import norm_parameters, pre_scale, scaled_linear
from torchao_qig.calibrate.result import INT8, Calibration, GroupResult
from torchao_qig.calibrate.shared import SharedWeights
from torchao_qig.config import QIGWeightOnlyConfig
from torchao_qig.errors import UserError
from torchao_qig.tensor import PackedIntTensor, affine

Product = Callable[[Tensor], Tensor]


class Change(NamedTuple):
    """A parameter, or a forward, to set."""

    module: nn.Module
    name: str
    value: nn.Parameter | Product | None


def grid_of(config: QIGWeightOnlyConfig) -> list[Any]:
    """What a weight is rounded to, as JSON; and what its activations are."""
    grid = [repr(config.base_config)] if config.base_config is not None else [config.bits, config.group_size, config.symmetric]
    return [*grid, INT8] if config.int8_activations else grid


def rounder(config: QIGWeightOnlyConfig, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A function from a weight and a scale to what the quantized form of weight * scale stands for, divided by scale.

    `dtype` is that of the model's weights.
    """

    def by_base_config(w: Tensor, scale: Tensor | None = None) -> Tensor:
        scaled = dense(quantized_weight((w if scale is None else w * scale).to(dtype), config.base_config)).to(w.dtype)
        return scaled if scale is None else scaled / scale

    def by_grid(w: Tensor, scale: Tensor | None = None) -> Tensor:
        return affine.fake_quantize(w, config.bits, config.group_size, config.symmetric, config.official, config.dtype or dtype, scale)

    return by_grid if config.base_config is None else by_base_config


def integer_product(config: QIGWeightOnlyConfig, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Product]:
    """A function from a weight and a scale to what their quantized linear does, without its bias: rounds x / scale, and multiplies."""

    def by_base_config(w: Tensor, scale: Tensor | None = None) -> Product:
        weight = quantized_weight((w if scale is None else w * scale).to(dtype), config.base_config)
        return lambda x: F.linear((x if scale is None else x / scale).to(dtype), weight).to(x.dtype)

    def by_grid(w: Tensor, scale: Tensor | None = None) -> Product:
        weight = rounder(config, dtype)(w, scale)
        return lambda x: F.linear(affine.fake_quantize_rows(x, scale, config.official), weight.to(x.dtype))

    return by_grid if config.base_config is None else by_base_config


def dense(weight: Tensor) -> Tensor:
    """The weight that a quantized tensor of any kind stands for."""
    if hasattr(weight, "dequantize") and type(weight) is not Tensor:
        try:
            return weight.dequantize()
        except (NotImplementedError, RuntimeError):
            pass  # some of torchao's tensors cannot: multiply by ones and zeros instead
    return F.linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight).T


def quantize_weight(w: Tensor, config: QIGWeightOnlyConfig, dtype: torch.dtype) -> PackedIntTensor:
    """The packed form of a weight that carries its scales already."""
    return PackedIntTensor.from_hp(w, config.bits, config.group_size, config.symmetric, config.dtype or dtype, config.official, config.int8_activations)


def rounding_forward(linear: nn.Linear, before: Tensor | None, official: bool) -> Product:
    """A forward for a linear with a dense weight that rounds its input, which `before` multiplies for that."""
    columns = None if before is None else 1 / before.float()
    return lambda x: F.linear(affine.fake_quantize_rows(x, columns, official), linear.weight, linear.bias)


def _chosen(name: str, found: Calibration, targets: dict[str, QIGWeightOnlyConfig], linear: nn.Linear) -> PackedIntTensor:
    """The integers that calibration chose for a linear; they hold for the scales and the dtype that they were chosen with."""
    weight, dtype = found.weights[name], targets[name].dtype or linear.weight.dtype
    if (weight.rows, weight.columns, weight.dtype) != (*linear.weight.shape, dtype):
        raise UserError(
            f"calib: {name} was rounded as {(weight.rows, weight.columns)} in {weight.dtype}, it is {tuple(linear.weight.shape)} in {dtype}; calibrate again"
        )
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

    def __init__(self, model: nn.Module, found: Calibration, targets: dict[str, QIGWeightOnlyConfig]) -> None:
        self.columns: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}  # act_pre_scale
        self.norms: list[Change] = []
        for group in found.groups.values():
            members = [n for n in group.linears if n in targets]
            if members:
                self._take(model, group, members, targets)

    def _take(self, model: nn.Module, group: GroupResult, members: list[str], targets: dict[str, QIGWeightOnlyConfig]) -> None:
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


def packed_by_base_config(weight: Tensor, config: QIGWeightOnlyConfig, dtype: torch.dtype, before: Tensor | None) -> Tensor:
    """What a base config makes of a weight that carries its scales already; `before` multiplies its input."""
    value = quantized_weight(weight.to(dtype), config.base_config)
    if before is not None:
        if not hasattr(value, "act_pre_scale"):
            raise UserError(f"base_config={config.base_config!r}: its {type(value).__name__} takes no act_pre_scale; pass pre_scale=False or another config")
        value.act_pre_scale = before
    return value


def changes(model: nn.Module, found: Calibration, targets: dict[str, QIGWeightOnlyConfig]) -> list[Change]:
    """All parameters to set in `model` so that `targets` are quantized as calibrated."""
    scales, shared = Scales(model, found, targets), SharedWeights(model, targets)
    made = list(scales.norms)
    values: dict[int, nn.Parameter] = {}  # by weight: linears that share one go on sharing
    _refuse_to_untie(model, targets)
    for name, config in targets.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if name in shared and id(linear.weight) in values:
            made.append(Change(linear, "weight", values[id(linear.weight)]))
            continue
        dtype, before, source = linear.weight.dtype, scales.before.get(name), shared.decided(name, found.weights)
        weight, bias = scaled_linear(linear, scales.columns.get(name), scales.rows.get(name))
        value: Any
        if config.base_config is not None:
            value = packed_by_base_config(weight, config, dtype, before)
        else:
            value = _chosen(source, found, targets, linear) if source is not None else quantize_weight(weight, config, dtype)
            value.act_pre_scale = before
        if before is None and config.pre_scaled:
            value.act_pre_scale = torch.ones(linear.in_features, dtype=dtype, device=linear.weight.device)
        values[id(linear.weight)] = _frozen(value)
        made.append(Change(linear, "weight", values[id(linear.weight)]))
        if bias is not None and name in scales.rows:
            made.append(Change(linear, "bias", _frozen(bias)))
    return made


def _refuse_to_untie(model: nn.Module, targets: dict[str, QIGWeightOnlyConfig]) -> None:
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
