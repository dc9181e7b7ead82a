"""The parts of vLLM that our plugin touches, without vLLM."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn
from torchao.quantization import FqnToConfig

JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class LinearMethod:
    """vLLM's TorchAOLinearMethod."""

    def __init__(self, quant_config: Any) -> None:
        self.quant_config = quant_config


class Config:
    """vLLM's TorchAOConfig: a config by full name, or one for all that is not skipped."""

    def __init__(self, torchao_config: Any, skip_modules: list[str] | None = None, is_checkpoint_torchao_serialized: bool = True) -> None:
        self.torchao_config, self.skip_modules = torchao_config, skip_modules or []
        self.is_checkpoint_torchao_serialized = is_checkpoint_torchao_serialized
        self.packed_modules_mapping: dict[str, list[str]] = JOINED

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if not isinstance(layer, nn.Linear):
            return None
        if any(f".{name}." in f".{prefix}." for name in self.skip_modules):
            return "unquantized"
        if not isinstance(self.torchao_config, FqnToConfig):
            return LinearMethod(self)
        config = self.torchao_config.fqn_to_config.get(prefix)
        return "unquantized" if config is None else LinearMethod(Config(config))


class Mapper:
    """vLLM's WeightsMapper."""

    def rename(self, name: str) -> str:
        return name.replace("model.language_model.", "language_model.model.")

    def apply_list(self, names: list[str]) -> list[str]:
        return [self.rename(name) for name in names]

    def apply_dict(self, values: dict[str, Any]) -> dict[str, Any]:
        return {self.rename(name): value for name, value in values.items()}


def modules(**classes: Any) -> tuple[dict[str, ModuleType], dict[str, Any]]:
    registered: dict[str, Any] = {}
    names = ["vllm", "vllm.model_executor.layers.quantization", "vllm.model_executor.layers.quantization.torchao"]
    made = {name: ModuleType(name) for name in names}
    made["vllm"].__spec__ = ModuleSpec("vllm", None)
    made["vllm"].__version__ = "9.9"  # type: ignore[attr-defined]
    vars(made[names[1]])["register_quantization_config"] = lambda name: lambda cls: registered.setdefault(name, []).append(cls)
    vars(made[names[2]]).update(classes)
    return made, registered
