"""What `torchao.quantize_` does with our configs: the handlers, and one look at the whole model before its first change.

torchao hands over one parameter at a time. Before the first, `check_assignments` looks at all that will come, so that a
weight with a NaN stops the call while the model is still whole, and what is left alone is named in one warning.
"""

import logging
import warnings
from functools import partial

import torch
from torch import Tensor, nn

from torchao_qig import _compat
from torchao_qig.config import PackedIntWeightOnlyConfig
from torchao_qig.integrations import transformers
from torchao_qig.tensor import PackedIntTensor, affine

logger = logging.getLogger(__name__)

ADVICE = "Pass a group_size that divides them, or -1 for one scale per row."


def _is_plain_float(weight: object) -> bool:
    return type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()  # type: ignore[attr-defined]


def _is_shared_with_others(weight: Tensor, call: _compat.QuantizeCall) -> bool:
    """Whether a module that the call does not quantize (an embedding, mostly) holds this very parameter."""
    holders = [m for m in call.model.modules() if any(p is weight for p in m._parameters.values())]
    if len(holders) < 2:
        return False
    ours = {id(a.module) for a in call.assignments() if isinstance(a.config, PackedIntWeightOnlyConfig)}
    return any(id(m) not in ours or not isinstance(m, nn.Linear) for m in holders)


def _contains(model: nn.Module, module: nn.Module) -> bool:
    return any(m is module for m in model.modules())


def _obstacle(module: nn.Module, name: str, config: PackedIntWeightOnlyConfig, call: _compat.QuantizeCall | None) -> str | None:
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
    return None if affine.fits(weight.shape[-1], config.group_size) else "misfit"


def check_assignments(call: _compat.QuantizeCall) -> None:
    """Before torchao touches anything: errors, and one warning for each kind of layer that is left alone."""
    found: dict[str | None, list[str]] = {}
    for a in call.assignments():
        if not isinstance(a.config, PackedIntWeightOnlyConfig):
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
    first = next((a for a in call.assignments() if isinstance(a.config, PackedIntWeightOnlyConfig)), None)
    return first is not None and first.module is module and first.parameter == name


def _extra_repr(linear: nn.Linear) -> str:
    return f"in_features={linear.in_features}, out_features={linear.out_features}, bias={linear.bias is not None}, weight={linear.weight.data!r}"


@_compat.register_quantize_module_handler(PackedIntWeightOnlyConfig)
def packed_int_weight_only(module: nn.Module, config: PackedIntWeightOnlyConfig, *, parameter_name: str = "weight") -> nn.Module:
    """torchao's handler: put the packed form in place of one parameter."""
    call = _compat.find_quantize_call()
    if call is not None and call.names_modules and _is_first(module, parameter_name, call):
        check_assignments(call)  # calls with a filter have been checked when they were announced
    obstacle = _obstacle(module, parameter_name, config, call)
    if obstacle and not (obstacle == "misfit" and (call is None or not _contains(call.model, module))):
        return module  # a misfit that no plan has announced is an error below
    weight = getattr(module, parameter_name)
    packed = nn.Parameter(PackedIntTensor.from_hp(weight.detach(), config.bits, config.group_size, config.symmetric, config.dtype), requires_grad=False)
    holders = [module] if call is None else [m for m in call.model.modules() if m._parameters.get(parameter_name) is weight]
    for holder in holders or [module]:  # linears that share a weight go on sharing it
        setattr(holder, parameter_name, packed)
    if isinstance(module, nn.Linear):
        module.extra_repr = partial(_extra_repr, module)  # a bound method, torchao's way, would not survive pickling
    if call is not None:
        transformers.describe(call.model, call.config)
    return module
