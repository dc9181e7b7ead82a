"""What `torchao.quantize_` does with our configs.

torchao walks the model and hands a handler one module at a time. The first handler of a call does all of the call's work (`quantize_all`): it looks at all
modules that torchao will hand over, raises for what is wrong while the model is still unchanged, calibrates where there is data, and sets every packed
weight. When torchao then hands over the other modules, `quantize_module` checks that they are done.

A handler may also be called outside such a walk: by torchao's own algorithms (AWQ, SmoothQuant), which hand over a linear that they have scaled, or
directly. It then quantizes only the module that it gets.
"""

import logging
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torchao_qig import _compat
from torchao_qig.config import QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig
from torchao_qig.errors import UserError
from torchao_qig.integrations import transformers
from torchao_qig.stored_config import PackedIntWeightOnlyConfig
from torchao_qig.tensor import PackedIntTensor

logger = logging.getLogger(__name__)

Config = PackedIntWeightOnlyConfig | QIGWeightOnlyConfig
ADVICE = "Pass a group_size that divides them, or -1 for one scale per row."


@_compat.register_quantize_module_handler(PackedIntWeightOnlyConfig)
@_compat.register_quantize_module_handler(QIGInt8DynamicActivationConfig)
@_compat.register_quantize_module_handler(QIGWeightOnlyConfig)
def quantize_module(module: nn.Module, config: Config, *, parameter_name: str = "weight") -> nn.Module:
    """The handler that torchao calls for all of our configs."""
    call = _compat.find_quantize_call()
    ours = call is not None and (call.names_modules or isinstance(call.config, _compat.OurConfig))
    if call is None or not ours:
        return _quantize_one(module, config, parameter_name, call)
    work: WholeCall | None = call.notes.get("work")
    if work is None:
        work = WholeCall(call, module)
        work.quantize_all()
        call.notes["work"] = work
    if (id(module), parameter_name) not in work.assigned:
        if call.names_modules or not work.model.contains(module):  # an algorithm of torchao's, as an entry of FqnToConfig
            return _quantize_one(module, config, parameter_name, call)
        logger.debug("left as it is, since filter_fn did not choose it when it was first asked: %s", module)
    elif (id(module), parameter_name) in work.made and _is_plain_float(getattr(module, parameter_name)):
        raise RuntimeError(f"a {type(module).__name__}'s {parameter_name} was quantized when this call began, and is not any more; what has replaced it?")
    return module


def _quantize_one(module: nn.Module, config: Config, name: str, call: _compat.QuantizeCall | None) -> nn.Module:
    """Round one parameter for a handler that is called outside our own walk."""
    if isinstance(config, QIGWeightOnlyConfig) and (config.calib is not None or config.step is not None):
        raise RuntimeError(
            "calib: the model cannot be found from a handler that is called directly; use torchao_qig.calibrate(model, loader, config)"
            " and quantize_(model, QIGWeightOnlyConfig(..., calib=calibration)), or step='prepare' and step='convert'"
        )
    obstacle = _obstacle(module, name, config, None)
    if obstacle is None or obstacle == "misfit":  # a misfit has not been reported here: packing raises an error
        _set(module, name, _rounded(getattr(module, name), config))
        if call is not None:  # for every module again, since it is not known which one is the last
            transformers.describe(call.model, call.config)
    return module


class _Model:
    """Lookups that every weight needs: the model's modules, and the modules that hold a parameter."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: set[int] = set()
        self._holders: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            self._modules.add(id(module))
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._holders.setdefault(id(parameter), []).append((module, name))

    def contains(self, module: nn.Module) -> bool:
        """Whether this is a module of the model."""
        return id(module) in self._modules

    def holders(self, parameter: Tensor) -> list[tuple[nn.Module, str]]:
        """The modules that hold this very parameter, each with the parameter's name in it."""
        return self._holders.get(id(parameter), [])


@dataclass
class WholeCall:
    """The work of one `quantize_` call with our configs."""

    call: _compat.QuantizeCall
    first: nn.Module

    def __post_init__(self) -> None:
        every = self.call.assignments(self.first)
        self.ours = [a for a in every if isinstance(a.config, _compat.OurConfig)]
        self.assigned = {(id(a.module), a.parameter): a for a in self.ours}
        self.made: set[tuple[int, str]] = set()
        self.model = _Model(self.call.model)

    def quantize_all(self) -> None:
        """Check everything, then quantize everything."""
        calibrated = [a for a in self.ours if isinstance(a.config, QIGWeightOnlyConfig) and (a.config.calib is not None or a.config.step is not None)]
        if calibrated:  # QIG configs without data go with those that have it
            calibrated = [a for a in self.ours if isinstance(a.config, QIGWeightOnlyConfig)]
        rounded = [a for a in self.ours if not calibrated or not isinstance(a.config, QIGWeightOnlyConfig)]
        if rounded:
            self._check(rounded)
        if calibrated:
            from torchao_qig.calls import calibrate_all

            for linear in calibrate_all(self.call, calibrated):
                _show(linear)
        for a in rounded:
            self._round(a)
        self.made = {key for key, a in self.assigned.items() if isinstance(getattr(a.module, a.parameter, None), PackedIntTensor)}
        if self.made or calibrated:
            transformers.describe(self.call.model, self.call.config)

    def _check(self, assigned: list[_compat.Assignment]) -> None:
        """Raise for what is wrong, and give one warning for each kind of layer that is left as it is."""
        found: dict[str | None, list[str]] = {}
        for a in assigned:
            _refuse_without_data(a.config)
            label = f"{a.fqn}.{a.parameter}" if a.parameter != "weight" else a.fqn or type(a.module).__name__
            obstacle = _obstacle(a.module, a.parameter, a.config, self)
            weight = getattr(a.module, a.parameter, None)
            if obstacle == "not linear":
                label += f" ({type(a.module).__name__})"
            if obstacle == "misfit":
                label += f" ({weight.shape[-1]} inputs, group_size={a.config.group_size})"  # type: ignore[union-attr]
            elif obstacle is None and not weight.is_meta and not torch.isfinite(weight).all():  # type: ignore[union-attr]
                raise UserError(f"{label}: the weight contains NaN or infinity; repair it or leave this layer out with filter_fn. The model is unchanged.")
            found.setdefault(obstacle, []).append(label)
        misfits, tied, others = (", ".join(found.get(kind, [])) for kind in ("misfit", "tied", "not linear"))
        whole = not isinstance(self.call.model, nn.Linear)  # a single linear: the caller walks the model itself, and calls `quantize_` for each
        if whole and not found.keys() & {None, "done"} and (misfits or tied or others):
            reason = (
                f"group_size divides the input features of none of: {misfits}. {ADVICE}" if misfits
                else f"the only matches share their weight with another module: {tied}" if tied
                else f"the matches are not nn.Linear: {others}"
            )  # fmt: skip
            raise UserError(f"nothing to quantize: {reason}")
        if misfits:
            warnings.warn(f"left unquantized, group_size does not divide the input features: {misfits}. {ADVICE}", stacklevel=_compat.stacklevel())
        if others:
            warnings.warn(f"left unquantized, not nn.Linear: {others}", stacklevel=_compat.stacklevel())
        if "done" in found:
            warnings.warn(f"already quantized, left as they are: {', '.join(found['done'])}", stacklevel=_compat.stacklevel())
        if tied:
            logger.info("left unquantized, weight shared with another module: %s", tied)
        if whole and len(found.get(None, [])) > 1 and any(isinstance(a.config, QIGWeightOnlyConfig) and a.config.calibrates for a in assigned):
            warnings.warn("calib=None: weights are rounded to nearest, without calibration; pass calib= to calibrate", stacklevel=_compat.stacklevel())

    def _round(self, a: _compat.Assignment) -> None:
        """Put the packed form in place of a parameter, wherever it is held: linears that share a weight go on sharing it."""
        if _obstacle(a.module, a.parameter, a.config, self) is None:
            weight = getattr(a.module, a.parameter)
            packed = _rounded(weight, a.config)
            for holder, name in self.model.holders(weight):
                _set(holder, name, packed)


def _is_plain_float(weight: object) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()  # type: ignore[attr-defined]


def _obstacle(module: nn.Module, name: str, config: Config, work: WholeCall | None) -> str | None:
    """Why a parameter stays as it is; None if it can be quantized.

    "no matrix": it has fewer than 2 dimensions. "done": it is quantized already. "not linear": its module is no nn.Linear.
    "tied": a module that is not quantized shares it. "misfit": the format cannot store its shape.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return "no matrix"
    if not _is_plain_float(weight):
        return "done"
    if work is not None:
        if name == "weight" and not isinstance(module, nn.Linear):
            return "not linear"  # embeddings and convolutions do not multiply through F.linear
        holders = work.model.holders(weight)
        if len(holders) > 1 and not all(isinstance(m, nn.Linear) and (id(m), n) in work.assigned for m, n in holders):
            return "tied"  # to a module that is not quantized (an embedding, mostly)
    rows, columns = weight.shape[-2:]
    return "misfit" if config.form.format.misfit(rows, columns) is not None else None


def _set(module: nn.Module, name: str, packed: Tensor | nn.Parameter) -> None:
    setattr(module, name, packed if isinstance(packed, nn.Parameter) else nn.Parameter(packed, requires_grad=False))
    if isinstance(module, nn.Linear):
        _show(module)


def _show(linear: nn.Linear) -> None:
    """Make the linear's repr say how its weight is stored."""
    linear.extra_repr = partial(_extra_repr, linear)  # a bound method, torchao's way, would not survive pickling


def _extra_repr(linear: nn.Linear) -> str:
    return f"in_features={linear.in_features}, out_features={linear.out_features}, bias={linear.bias is not None}, weight={linear.weight.data!r}"


def _rounded(weight: Tensor, config: Config) -> nn.Parameter:
    """The packed form of a weight, rounded to nearest. Loaders use it, so it imports nothing of calibration."""
    _refuse_without_data(config)
    weight = weight.detach()
    packed: Any = config.form.stored(weight, weight.dtype)
    if isinstance(config, PackedIntWeightOnlyConfig) and config.pre_scaled:
        packed.act_pre_scale = torch.ones(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    return nn.Parameter(packed, requires_grad=False)


def _refuse_without_data(config: Config) -> None:
    """Raise for bits that only a calibration can give."""
    if not isinstance(config.bits, int):
        raise UserError(f"bits={config.bits!r} needs calib=: the bits of each linear come from calibration")
