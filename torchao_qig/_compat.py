"""Everything that depends on torchao's internals or on its version. If torchao has moved something, the import fails here and names it.

- `quiet` suppresses messages that torchao logs when it is imported.
- `register` enters our classes into torchao's tables of names, so that configs and packed tensors go through JSON and safetensors.
- `find_quantize_call` finds the running `torchao.quantize_`. torchao hands a handler only one module and the config; the model and
  the filter are variables in the frame of `quantize_`, which is recognised by its code object.
"""

import inspect
import logging
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn

from torchao_qig.errors import UserError

NOISE = {  # logger -> messages about torchao itself, which a user cannot do anything about
    "torchao": r"Failed to load .*_C_(mxfp8|cutlass_90a)\.",  # kernels for GPUs that are not here
    "torch.utils._pytree": r"<enum '(KernelPreference|ScaleCalculationMode)'> is an Enum subclass",  # deprecated, still right
}


@contextmanager
def quiet() -> Iterator[None]:
    """While this runs, torchao's messages about itself are not logged. All other messages are."""

    def kept(record: logging.LogRecord) -> bool:
        return re.match(NOISE[record.name], record.getMessage(), re.DOTALL) is None

    for name in NOISE:
        logging.getLogger(name).addFilter(kept)
    try:
        yield
    finally:
        for name in NOISE:
            logging.getLogger(name).removeFilter(kept)


with quiet():
    try:
        from torchao.core.config import ALLOWED_AO_MODULES, AOBaseConfig
        from torchao.prototype.safetensors import safetensors_utils
        from torchao.quantization import quant_api
        from torchao.quantization.quant_api import FqnToConfig
        from torchao.quantization.transform_module import register_quantize_module_handler

        QUANTIZE: CodeType = inspect.unwrap(quant_api.quantize_).__code__
        QUANTIZE_LOCALS = ("model", "config", "filter_fn")
        if not set(QUANTIZE_LOCALS) <= set(QUANTIZE.co_varnames):
            raise ImportError(f"quantize_ has no longer the variables {QUANTIZE_LOCALS}")
        for _needed in ("_fqn_to_config_handler", "fqn_matches_fqn_config", "_module_param_matches_fqn_config", "_is_linear"):
            getattr(quant_api, _needed)
        INT8_DYNAMIC_CONFIGS = (quant_api.Int8DynamicActivationIntxWeightConfig, quant_api.Int8DynamicActivationInt8WeightConfig)
        SAFETENSORS_CLASSES, SAFETENSORS_NAMES = safetensors_utils.ALLOWED_CLASSES, safetensors_utils.ALLOWED_TENSORS_SUBCLASSES
    except (ImportError, AttributeError) as error:
        import torchao

        raise ImportError(
            f"torchao_qig does not know torchao {getattr(torchao, '__version__', '?')}: {error}. It is tested with torchao 0.18.0;"
            " install that, or a torchao_qig that supports yours."
        ) from error

__all__ = [
    "INT8_DYNAMIC_CONFIGS", "FqnToConfig", "OurConfig", "QuantizeCall", "find_quantize_call", "quantized_weight", "quiet", "register",
    "register_quantize_module_handler", "stacklevel", "tensor_class",
]  # fmt: skip


def register(tensor_class: type) -> None:
    """Enter our config classes and tensor class into torchao's tables of what may be read from files. Idempotent."""
    ALLOWED_AO_MODULES.add("torchao_qig")
    SAFETENSORS_CLASSES[tensor_class.__name__] = tensor_class
    if tensor_class.__name__ not in SAFETENSORS_NAMES:
        SAFETENSORS_NAMES.append(tensor_class.__name__)  # in place: transformers and vLLM hold this list


def tensor_class(name: str) -> Any:
    """The tensor class with this name that files may hold: torchao's own, and what `register` has entered."""
    if name not in SAFETENSORS_CLASSES:
        raise UserError(f"weights are stored as {name}, which is no known tensor class; import the package that defines it first")
    return SAFETENSORS_CLASSES[name]


def quantized_weight(weight: Tensor, config: Any) -> Tensor:
    """The weight tensor that any torchao config makes of this weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    holder = nn.Sequential(linear)
    quant_api.quantize_(holder, config)
    return holder[0].weight.detach()


class OurConfig(AOBaseConfig):
    """The base class of this package's configs, by which handlers and loaders recognise them."""


class Assignment(NamedTuple):
    """One entry of what a `quantize_` will do: apply `config` to a parameter of `module`."""

    fqn: str
    module: nn.Module
    parameter: str
    config: Any


@dataclass(frozen=True)
class QuantizeCall:
    """A running `torchao.quantize_(model, config, filter_fn)`. `notes` are kept until it returns."""

    model: nn.Module
    config: Any
    filter_fn: Callable[[nn.Module, str], bool] | None
    notes: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def names_modules(self) -> bool:
        """Whether the config says which module gets what (FqnToConfig), instead of a filter."""
        return isinstance(self.config, FqnToConfig)

    def assignments(self, start: nn.Module | None = None) -> Iterator[Assignment]:
        """All that torchao will hand to handlers, in its order.

        `start`: the first module that the filter has matched. The filter is not asked again about it and the modules before it, since it may keep a count.
        """
        if self.names_modules:
            yield from self._by_name()
        else:
            for fqn, module in _matches(self.model, self.filter_fn or quant_api._is_linear, "", [] if start is None else [start]):
                yield Assignment(fqn, module, "weight", self.config)

    def _by_name(self) -> Iterator[Assignment]:
        """FqnToConfig: torchao's own rules of precedence, run with configs that only note what they are given."""
        seen: list[tuple[nn.Module, str, Any]] = []
        noted = FqnToConfig(OrderedDict((k, None if c is None else _Note(c, seen)) for k, c in self.config.fqn_to_config.items()))
        for fqn, module in self.model.named_modules():
            if (
                quant_api.fqn_matches_fqn_config(fqn, noted)
                or quant_api._module_param_matches_fqn_config(module, fqn, noted)
                or ("_default" in noted.fqn_to_config and quant_api._is_linear(module))
            ):
                quant_api._fqn_to_config_handler(module, fqn, noted)
                yield from (Assignment(fqn, *note) for note in seen)
                seen.clear()


@dataclass
class _Note(AOBaseConfig):
    """Stands for a config: where it is applied, it only notes the parameter that it got."""

    config: Any
    seen: list[tuple[nn.Module, str, Any]]


@register_quantize_module_handler(_Note)
def _note(module: nn.Module, note: _Note, *, parameter_name: str = "weight") -> nn.Module:
    note.seen.append((module, parameter_name, note.config))
    return module


def _matches(module: nn.Module, filter_fn: Callable[[nn.Module, str], bool], fqn: str, start: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """torchao's walk, which does not look inside a match. `start` has the first match, if it is known, and is emptied when the walk arrives there."""
    if start:
        matched = module is start[0]
        if matched:
            start.clear()
    else:
        matched = filter_fn(module, fqn)
    if matched:
        yield fqn, module
        return
    for name, child in module.named_children():
        yield from _matches(child, filter_fn, f"{fqn}.{name}" if fqn else name, start)


NOTES = "__torchao_qig__"


def find_quantize_call() -> QuantizeCall | None:
    """The innermost running `quantize_`, or None (a handler called directly)."""
    frame = _quantize_frame()[0]
    if frame is None:
        return None
    held = frame.f_locals  # an entry that is no variable of the function stays there until the call ends
    if NOTES not in held:
        held[NOTES] = {}
    model, config, filter_fn = (held[name] for name in QUANTIZE_LOCALS)
    return QuantizeCall(model, config, filter_fn, held[NOTES])


def stacklevel() -> int:
    """The `stacklevel` for a `warnings.warn` in the calling function that names the line where `quantize_` was called."""
    return _quantize_frame()[1]


def _quantize_frame() -> tuple[FrameType | None, int]:
    """The frame of the innermost running `quantize_`, and the level of its caller, counted from the function that called our caller (1)."""
    frame: FrameType | None = sys._getframe(2)
    for level in count(2):
        if frame is None or frame.f_code is QUANTIZE:
            return frame, level
        frame = frame.f_back
    raise AssertionError
