"""Put a calibration into a model: scales go into norms and weights, then weights are rounded and packed.

All new parameters are made first (`changes`) and set at the end (`commit`), so that an error in between leaves the model as it was.
"""

from torch import Tensor, nn

from torchao_qig.calibration.result import Calibration
from torchao_qig.errors import UserError
from torchao_qig.formats import LinearForm
from torchao_qig.methods.fold import scaled_linear
from torchao_qig.methods.scales import Change, Scales, frozen, with_input_scale
from torchao_qig.methods.shared_weights import SharedWeights


def _chosen(name: str, found: Calibration, targets: dict[str, LinearForm], linear: nn.Linear) -> Tensor:
    """The packed weight that calibration chose for a linear. It is valid for the scales and the dtype that it was chosen with."""
    weight, dtype = found.weights[name], targets[name].scale_dtype(linear.weight.dtype)
    if (weight.shape, weight.dtype) != (linear.weight.shape, dtype):
        raise UserError(f"calib: {name} was rounded as {tuple(weight.shape)} in {weight.dtype}, it is {tuple(linear.weight.shape)} in {dtype}; calibrate again")
    into = {g.label: [g.fold_into] if g.fold_kind == "linear" else [] for g in found.groups.values()}
    together = [g for g in found.groups.values() if name in (*g.linears, *into[g.label])]
    missing = sorted({n for g in together for n in (*g.linears, *into[g.label])} - set(targets))
    if missing:
        raise UserError(f"calib: {name} was rounded together with {', '.join(missing)}; quantize these, too, or calibrate again")
    return weight.to(linear.weight.device, copy=True)


def changes(model: nn.Module, found: Calibration, targets: dict[str, LinearForm]) -> list[Change]:
    """All parameters to set in `model` so that `targets` are quantized as calibrated."""
    scales, shared = Scales(targets), SharedWeights(model, targets)
    for group in found.groups.values():
        scales.add(model, group)
    made = list(scales.norms)
    values: dict[int, nn.Parameter] = {}  # id of a weight -> its new parameter: linears that share a weight go on sharing it
    _refuse_to_untie(model, targets)
    for name, form in targets.items():
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if name in shared and id(linear.weight) in values:
            made.append(Change(linear, "weight", values[id(linear.weight)]))
            continue
        before, source = scales.before.get(name), shared.decided(name, found.weights)
        weight, bias = scaled_linear(linear, scales.columns.get(name), scales.rows.get(name))
        stored = form.stored(weight, linear.weight.dtype) if source is None else _chosen(source, found, targets, linear)
        values[id(linear.weight)] = frozen(with_input_scale(stored, before, form))
        made.append(Change(linear, "weight", values[id(linear.weight)]))
        if bias is not None and name in scales.rows:
            made.append(Change(linear, "bias", frozen(bias)))
    return made


def _refuse_to_untie(model: nn.Module, targets: dict[str, LinearForm]) -> None:
    """Raise where one of the targets shares its weight with a module that is not quantized: the weight cannot change for one of them only."""
    wanted = {id(model.get_submodule(name).weight): name for name in targets}
    for holder, module in model.named_modules():
        for weight in module._parameters.values():
            name = wanted.get(id(weight))
            if name is not None and holder not in targets:
                raise UserError(f"calib: {name} shares its weight with {holder}, which is not chosen here; choose both, or neither")


def commit(made: list[Change]) -> None:
    """Set the new parameters in the model."""
    for module, name, value in made:
        setattr(module, name, value)
