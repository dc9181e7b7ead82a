"""What `torchao.quantize_` does with our configs: the handlers, and one look at the whole model before its first change.

torchao hands over one parameter at a time. Before the first, `check_assignments` looks at all that will come, so that a
weight with a NaN stops the call while the model is still whole, and what is left alone is named in one warning.

A `QIGWeightOnlyConfig` (or `QIGInt8DynamicActivationConfig`) with data does all of its work then (`calibrated_call`): calibrate, make
every packed weight, and only then set them; when torchao comes by with the linears, nothing is left to do.
"""

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from torchao_qig import _compat
from torchao_qig.config import PackedIntWeightOnlyConfig, QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig
from torchao_qig.integrations import transformers
from torchao_qig.tensor import PackedIntTensor, affine

if TYPE_CHECKING:
    from torchao_qig.calibrate.result import Calibration

logger = logging.getLogger(__name__)

OURS = (PackedIntWeightOnlyConfig, QIGWeightOnlyConfig)
RECORDER = "_qig_recorder"  # attribute of a prepared model
ADVICE = "Pass a group_size that divides them, or -1 for one scale per row."


def _is_plain_float(weight: object) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()  # type: ignore[attr-defined]


def _is_shared_with_others(weight: Tensor, call: _compat.QuantizeCall) -> bool:
    """Whether a module that the call does not quantize (an embedding, mostly) holds this very parameter."""
    holders = [m for m in call.model.modules() if any(p is weight for p in m._parameters.values())]
    if len(holders) < 2:
        return False
    ours = {id(a.module) for a in call.assignments() if isinstance(a.config, OURS)}
    return any(id(m) not in ours or not isinstance(m, nn.Linear) for m in holders)


def _contains(model: nn.Module, module: nn.Module) -> bool:
    return any(m is module for m in model.modules())


def _obstacle(module: nn.Module, name: str, config: PackedIntWeightOnlyConfig | QIGWeightOnlyConfig, call: _compat.QuantizeCall | None) -> str | None:
    """Why this parameter stays as it is: 'no matrix', 'done', 'not linear', 'tied', 'misfit'; or None."""
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return "no matrix"
    if not _is_plain_float(weight):
        return "done"
    if name == "weight" and not isinstance(module, nn.Linear) and call is not None and _contains(call.model, module):
        return "not linear"  # embeddings and convolutions do not multiply through F.linear
    if call is not None and _is_shared_with_others(weight, call):
        return "tied"
    own_grid = getattr(config, "base_config", None) is None
    return "misfit" if own_grid and not affine.fits(weight.shape[-1], config.group_size) else None


def check_assignments(call: _compat.QuantizeCall) -> None:
    """Before torchao touches anything: errors, and one warning for each kind of layer that is left alone."""
    found: dict[str | None, list[str]] = {}
    for a in call.assignments():
        if not isinstance(a.config, OURS):
            continue
        label = f"{a.fqn}.{a.parameter}" if a.parameter != "weight" else a.fqn or type(a.module).__name__
        obstacle = _obstacle(a.module, a.parameter, a.config, call)
        weight = getattr(a.module, a.parameter, None)
        if obstacle == "not linear":
            label += f" ({type(a.module).__name__})"
        if obstacle == "misfit":
            label += f" ({weight.shape[-1]} inputs, group_size={a.config.group_size})"  # type: ignore[union-attr]
        elif obstacle is None and not weight.is_meta and not torch.isfinite(weight).all():  # type: ignore[union-attr]
            raise ValueError(f"{label}: the weight contains NaN or infinity; repair it or leave this layer out with filter_fn. The model is unchanged.")
        found.setdefault(obstacle, []).append(label)
    if not found.keys() & {None, "done"} and not isinstance(call.model, nn.Linear):  # one linear: somebody walks the model and calls for each
        misfits, tied, others = (", ".join(found.get(kind, [])) for kind in ("misfit", "tied", "not linear"))
        reason = (
            f"group_size divides the input features of none of: {misfits}. {ADVICE}" if misfits
            else f"the only matches share their weight with another module: {tied}" if tied
            else f"the matches are not nn.Linear: {others}" if others
            else f"filter_fn matched no linear of {type(call.model).__name__}; pass a model with nn.Linear modules, or another filter_fn"
        )  # fmt: skip
        raise ValueError(f"nothing to quantize: {reason}")
    if "misfit" in found:
        warnings.warn(f"left unquantized, group_size does not divide the input features: {', '.join(found['misfit'])}. {ADVICE}", stacklevel=5)
    if "not linear" in found:
        warnings.warn(f"left unquantized, not nn.Linear: {', '.join(found['not linear'])}", stacklevel=5)
    if "done" in found:
        warnings.warn(f"already quantized, left as they are: {', '.join(found['done'])}", stacklevel=5)
    if "tied" in found:
        logger.info("left unquantized, weight shared with another module: %s", ", ".join(found["tied"]))


def _is_first(module: nn.Module, name: str, call: _compat.QuantizeCall) -> bool:
    first = next((a for a in call.assignments() if isinstance(a.config, OURS)), None)
    return first is not None and first.module is module and first.parameter == name


def _extra_repr(linear: nn.Linear) -> str:
    return f"in_features={linear.in_features}, out_features={linear.out_features}, bias={linear.bias is not None}, weight={linear.weight.data!r}"


@_compat.register_quantize_module_handler(PackedIntWeightOnlyConfig)
def packed_int_weight_only(module: nn.Module, config: PackedIntWeightOnlyConfig, *, parameter_name: str = "weight") -> nn.Module:
    """torchao's handler: put the packed form in place of one parameter."""
    call = _compat.find_quantize_call()
    if call is not None and call.names_modules and _is_first(module, parameter_name, call):
        check_assignments(call)  # calls with a filter have been checked when they were announced
    return _round(module, config, parameter_name, call, lambda w: PackedIntTensor.from_hp(w, config.bits, config.group_size, config.symmetric, config.dtype))


def _round(
    module: nn.Module, config: PackedIntWeightOnlyConfig | QIGWeightOnlyConfig, name: str, call: _compat.QuantizeCall | None, pack: Callable[[Tensor], Tensor]
) -> nn.Module:
    obstacle = _obstacle(module, name, config, call)
    if obstacle and not (obstacle == "misfit" and (call is None or not _contains(call.model, module))):
        return module  # a misfit that no plan has announced is an error below
    weight = getattr(module, name)
    packed = nn.Parameter(pack(weight.detach()), requires_grad=False)
    holders = [module] if call is None else [m for m in call.model.modules() if m._parameters.get(name) is weight]
    for holder in holders or [module]:  # linears that share a weight go on sharing it
        setattr(holder, name, packed)
    if isinstance(module, nn.Linear):
        module.extra_repr = partial(_extra_repr, module)  # a bound method, torchao's way, would not survive pickling
    if call is not None:
        transformers.describe(call.model, call.config)
    return module


@_compat.register_quantize_module_handler(QIGInt8DynamicActivationConfig)
@_compat.register_quantize_module_handler(QIGWeightOnlyConfig)
def qig_weight_only(module: nn.Module, config: QIGWeightOnlyConfig, *, parameter_name: str = "weight") -> nn.Module:
    """torchao's handler, for both configs. With data the first call has done everything already; without, weights are rounded to nearest."""
    call = _compat.find_quantize_call()
    if config.calib is None and config.step is None:
        if call is not None and call.names_modules and _is_first(module, parameter_name, call):
            check_assignments(call)
        return _round(module, config, parameter_name, call, lambda w: _uncalibrated(w, config))
    if call is None:
        raise RuntimeError(
            "calib: the model cannot be found from a handler that is called directly; use torchao_qig.calibrate(model, loader, config)"
            " and quantize_(model, QIGWeightOnlyConfig(..., calib=calibration)), or step='prepare' and step='convert'"
        )
    if call.names_modules and _is_first(module, parameter_name, call):
        calibrated_call(call)
    return module


def _uncalibrated(weight: Tensor, config: QIGWeightOnlyConfig) -> Tensor:
    """What loaders need, without importing calibration."""
    _refuse_without_data(config)
    if config.base_config is not None:
        packed = _compat.quantized_weight(weight, config.base_config)
    else:
        packed = PackedIntTensor.from_hp(weight, config.bits, config.group_size, config.symmetric, config.dtype, config.official)
        packed.int8_activations = config.int8_activations and weight.dim() == 2  # stacks of experts are multiplied by other products
    if config.pre_scaled:
        packed.act_pre_scale = torch.ones(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    return packed


def _refuse_without_data(config: QIGWeightOnlyConfig) -> None:
    if not isinstance(config.bits, int):
        raise ValueError(f"bits={config.bits!r} needs calib=: the bits of each linear come from calibration")


def calibrated_call(call: _compat.QuantizeCall) -> None:
    """Everything that a call with a `QIGWeightOnlyConfig` does, before torchao hands over its first linear."""
    assigned = [a for a in call.assignments() if isinstance(a.config, QIGWeightOnlyConfig)]
    config: QIGWeightOnlyConfig = call.config if isinstance(call.config, QIGWeightOnlyConfig) else assigned[0].config
    config = next((a.config for a in assigned if a.config.calib is not None), config)
    if config.step == "prepare":
        _prepare(call, config)
        return
    if any(not isinstance(a.config.bits, int) for a in assigned) and call.config is not config:
        raise ValueError(f"bits={config.bits!r} inside {type(call.config).__name__}: pass such a config to quantize_ itself")
    if config.calib is None and config.step is None:
        _refuse_without_data(config)
        check_assignments(call)
        if sum(isinstance(m, nn.Linear) for m in call.model.modules()) > 1 and (config.equalizes or config.rounds):
            warnings.warn("calib=None: weights are rounded to nearest, without calibration; pass calib= to calibrate", stacklevel=4)
        return
    if len({a.config.int8_activations for a in assigned}) > 1:
        raise ValueError(
            f"calib: QIGWeightOnlyConfig and QIGInt8DynamicActivationConfig with data in one {type(call.config).__name__}; calibrate each on its own"
            " (torchao_qig.calibrate with filter_fn), then call quantize_ twice, with one calibration each"
        )
    from torchao_qig.calibrate.apply import changes, commit
    from torchao_qig.calibrate.result import Calibration
    from torchao_qig.calibrate.run import calibrate_linears

    root = config.model if config.model is not None else call.model
    names = {id(m): name for name, m in root.named_modules()}
    linears = {names.get(id(a.module), ""): a.config for a in assigned if isinstance(a.module, nn.Linear) and a.parameter == "weight"}
    if assigned and any(id(a.module) not in names for a in assigned):
        raise ValueError(f"model: the {type(root).__name__} given does not contain the modules that quantize_ was called on; pass the whole model")
    loader, recorder = config.calib, getattr(root, RECORDER, None)
    if config.step == "convert" and loader is None:
        if recorder is None or not recorder.calls:
            raise RuntimeError("step='convert': nothing was recorded; call quantize_ with step='prepare' on the same model, then run it on some batches")
        loader = recorder.calls
    if recorder is not None:
        recorder.stop()
    try:
        found = loader if isinstance(loader, Calibration) else calibrate_linears(root, loader, config, linears)
        targets = _targets(found, linears)
        with torch.inference_mode(False), torch.no_grad():
            made = changes(root, found, targets)
    except BaseException:
        if recorder is not None:  # still prepared: convert may be tried again
            recorder.start(root)
        raise
    commit(made)
    if recorder is not None:
        delattr(root, RECORDER)
    for name in targets:
        linear = root.get_submodule(name)
        linear.extra_repr = partial(_extra_repr, linear)
    transformers.describe(call.model, call.config)


def _prepare(call: _compat.QuantizeCall, config: QIGWeightOnlyConfig) -> None:
    from torchao_qig.calibrate.record import Recorder

    root = config.model if config.model is not None else call.model
    if hasattr(root, RECORDER):
        raise RuntimeError("step='prepare': this model is prepared already; run it on some batches, then call quantize_ with step='convert'")
    setattr(root, RECORDER, Recorder(root))


def _targets(found: "Calibration", linears: dict[str, QIGWeightOnlyConfig]) -> dict[str, QIGWeightOnlyConfig]:
    """The linears that this call quantizes, with their configs."""
    from torchao_qig.calibrate.apply import grid_of

    targets = {
        name: config if isinstance(config.bits, int) else config.at(int(found.grids[name][0])) for name, config in linears.items() if name in found.grids
    }
    if not targets:
        raise ValueError(f"calib: the calibration covers none of the linears chosen here; it has {', '.join(found.grids) or 'none'}")
    for name, config in targets.items():
        if grid_of(config) != list(found.grids[name]):
            raise ValueError(
                f"calib: {name} was calibrated for [bits, group_size, symmetric] = {found.grids[name]}, the config has {grid_of(config)}; calibrate again"
            )
    return targets
