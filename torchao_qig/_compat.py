"""Everything that leans on torchao's internals or on a version; a torchao that moved something fails here, by name.

- `register`: torchao's name tables, so that configs and packed tensors go through JSON and safetensors.
- `find_quantize_call`: what `torchao.quantize_` is walking. It hands a handler one module and the config, nothing else; the
  model and the filter lie in its own frame, which is found by torchao's code objects, not by names of ours.
- `AnnouncedConfig`: a config class that hears of the call before the first module is touched, even if none will match.
"""

import inspect
import sys
from abc import ABCMeta
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import Tensor, nn

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

__all__ = ["INT8_DYNAMIC_CONFIGS", "AnnouncedConfig", "QuantizeCall", "find_quantize_call", "quantized_weight", "register", "register_quantize_module_handler"]


def register(tensor_class: type) -> None:
    """Enter our config classes and tensor class into torchao's tables of what may be read from files. Idempotent."""
    ALLOWED_AO_MODULES.add("torchao_qig")
    SAFETENSORS_CLASSES[tensor_class.__name__] = tensor_class
    if tensor_class.__name__ not in SAFETENSORS_NAMES:
        SAFETENSORS_NAMES.append(tensor_class.__name__)  # in place: transformers and vLLM hold this list


def quantized_weight(weight: Tensor, config: Any) -> Tensor:
    """The weight tensor that any torchao config makes of this weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    holder = nn.Sequential(linear)
    quant_api.quantize_(holder, config)
    return holder[0].weight.detach()


class Assignment(NamedTuple):
    """torchao will apply `config` to `module`'s parameter."""

    fqn: str
    module: nn.Module
    parameter: str
    config: Any


@dataclass(frozen=True)
class QuantizeCall:
    """A running `torchao.quantize_(model, config, filter_fn)`."""

    model: nn.Module
    config: Any
    filter_fn: Callable[[nn.Module, str], bool] | None

    @property
    def names_modules(self) -> bool:
        """Whether the config says which module gets what (FqnToConfig), instead of a filter."""
        return isinstance(self.config, FqnToConfig)

    def assignments(self) -> Iterator[Assignment]:
        """All that torchao will hand to handlers, in its order."""
        if self.names_modules:
            yield from self._by_name()
        else:
            for fqn, module in _matches(self.model, self.filter_fn or quant_api._is_linear, ""):
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
    config: Any
    seen: list[tuple[nn.Module, str, Any]]


@register_quantize_module_handler(_Note)
def _note(module: nn.Module, note: _Note, *, parameter_name: str = "weight") -> nn.Module:
    note.seen.append((module, parameter_name, note.config))
    return module


def _matches(module: nn.Module, filter_fn: Callable[[nn.Module, str], bool], fqn: str) -> Iterator[tuple[str, nn.Module]]:
    """torchao's walk: it does not look inside a match."""
    if filter_fn(module, fqn):
        yield fqn, module
        return
    for name, child in module.named_children():
        yield from _matches(child, filter_fn, f"{fqn}.{name}" if fqn else name)


def find_quantize_call() -> QuantizeCall | None:
    """The innermost running `quantize_`, or None (a handler called directly)."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is QUANTIZE:
            return _call_in(frame)
        frame = frame.f_back
    return None


def _call_in(frame: FrameType) -> QuantizeCall:
    return QuantizeCall(*(frame.f_locals[name] for name in QUANTIZE_LOCALS))


class AnnouncedConfig(ABCMeta):
    """Metaclass of our configs: `announce(call)` runs when `quantize_` looks up the handler of a config.

    torchao never calls the handler when nothing matches, so an error about that can come from nowhere else: the look-up
    in its table of handlers hashes the config's class.
    """

    def __hash__(cls) -> int:
        caller = sys._getframe(1)
        if caller.f_code is QUANTIZE and type(caller.f_locals.get("config")) is cls:
            cls.announce(_call_in(caller))
        return super().__hash__()
