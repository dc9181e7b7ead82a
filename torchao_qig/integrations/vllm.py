"""Let vLLM serve our checkpoints: its entry point `vllm.general_plugins` calls `register` in every process, before a config is read.

vLLM has a loader for torchao's checkpoints, and importing this package already registers our configs and our tensor with torchao. This module
corrects what that loader gets wrong for packed weights, mostly without a warning:

- The loader makes parameters by quantizing uninitialised memory, which may hold a NaN. Here zeros are quantized.
- q, k, v and gate, up become one linear, which a config of single linears does not name. Here the names of its parts are looked up.
- The joined linear gets the act_pre_scale of its last part, or none. Here the parts must agree, and a part without one gets ones.
- A shard of a tensor-parallel linear may end inside a group. Here that is an error that says so.
- A parameter without a tensor in the files keeps its first values. Here that is an error, too.

Checkpoints of other torchao configs are left to vLLM.
"""

import logging
import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from torchao_qig._compat import FqnToConfig, OurConfig, quantized_weight
from torchao_qig.errors import UserError
from torchao_qig.tensor import PackedIntTensor, packing

logger = logging.getLogger(__name__)
unknown: Exception | None = None
if find_spec("vllm") is None:
    VllmConfig: Any = object
    VllmLinearMethod: Any = object
else:
    try:
        _theirs = import_module("vllm.model_executor.layers.quantization.torchao")
        VllmConfig, VllmLinearMethod = _theirs.TorchAOConfig, _theirs.TorchAOLinearMethod
        _register = import_module("vllm.model_executor.layers.quantization").register_quantization_config
    except (ImportError, AttributeError) as error:
        VllmConfig = VllmLinearMethod = object
        unknown = error


def register() -> None:
    """Make vLLM load our checkpoints. Calling it again changes nothing; without vLLM there is nothing to do."""
    if unknown is not None:
        version = getattr(import_module("vllm"), "__version__", "?")
        logger.warning("torchao_qig does not know vLLM %s (%s) and may not load in it; it is tested with vLLM 0.32.0", version, unknown)
    elif VllmConfig is not object:
        _register("torchao")(PackedConfig)


def is_ours(config: Any) -> bool:
    """Whether a torchao config is one of this package, or an algorithm (AWQ, SmoothQuant) over one."""
    return isinstance(config, OurConfig) or (hasattr(config, "base_config") and is_ours(config.base_config))


def parts_of(name: str, joined: dict[str, list[str]]) -> list[str]:
    """The checkpoint's names of the linears that vLLM computes as one linear `name`."""
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in joined.get(last, [last])]


def check_shard(name: str, config: Any, columns: int, whole: int) -> None:
    """Raise if a tensor-parallel shard of the inputs ends where packed columns cannot be cut."""
    while getattr(config, "base_config", None) is not None:
        config = config.base_config
    if not is_ours(config):
        return
    group_size: int = config.group_size
    border = packing.UNIT if group_size == -1 else math.lcm(packing.UNIT, group_size)
    if columns != whole and columns % border:
        raise UserError(
            f"tensor_parallel_size={whole // columns}: {name} has {whole} input features, {columns} in each part, which is no multiple of {border}"
            f" (group_size={group_size}); serve with a smaller tensor_parallel_size, or quantize with a group_size that divides {columns}"
        )


class Loader:
    """Wraps vLLM's weight loader of one parameter, and notes which parts of the parameter it has loaded."""

    def __init__(self, name: str, load: Callable[..., None], parts: int) -> None:
        self.name, self.load, self.parts = name, load, parts
        self.loaded: set[Any] = set()
        self.act_pre_scale: Tensor | None = None

    def __call__(self, parameter: nn.Parameter, loaded: Tensor, *part: Any, **named_part: Any) -> None:
        if isinstance(loaded, PackedIntTensor) and isinstance(parameter, PackedIntTensor):
            loaded = self._with_its_scale(loaded, parameter)
        try:
            self.load(parameter, loaded, *part, **named_part)
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error
        for one in (*part, *named_part.values()) or (None,):  # None: all parts at once
            self.loaded.update(one if isinstance(one, tuple) else (one,))

    def _with_its_scale(self, loaded: PackedIntTensor, parameter: PackedIntTensor) -> PackedIntTensor:
        if parameter.act_pre_scale is not None and loaded.act_pre_scale is None:
            loaded = loaded.with_data(lambda t: t, act_pre_scale=torch.ones(loaded.columns, dtype=loaded.dtype, device=loaded.device))
        first, mine = self.act_pre_scale, loaded.act_pre_scale
        if first is not None and (mine is None or not torch.equal(first, mine)):
            raise UserError(
                f"{self.name}: vLLM multiplies its parts' input by one act_pre_scale, in the checkpoint they differ;"
                " quantize with QIGWeightOnlyConfig, which gives linears of one input one scale"
            )
        self.act_pre_scale = mine
        return loaded

    def check(self) -> None:
        """Raise unless all parts have been loaded."""
        if None not in self.loaded and len(self.loaded) < self.parts:
            raise UserError(
                f"{self.name}: vLLM found tensors for {len(self.loaded)} of its {self.parts} parts in the checkpoint;"
                " save with torchao_qig.save_pretrained: model.save_pretrained writes names that vLLM does not look for"
            )


class PackedLinearMethod(VllmLinearMethod):
    """How vLLM makes, loads and multiplies the weight of a linear that has one of our configs."""

    def __init__(self, quant_config: Any, name: str) -> None:
        super().__init__(quant_config)
        self.name = name

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
        **attributes: Any,
    ) -> None:
        config = self.quant_config.torchao_config
        check_shard(self.name, config, input_size_per_partition, input_size)
        zeros = torch.zeros(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype)
        weight = nn.Parameter(quantized_weight(zeros, config), requires_grad=False)
        attributes |= {"input_dim": 1, "output_dim": 0, "weight_loader": Loader(self.name, weight_loader, len(output_partition_sizes))}
        for name, value in attributes.items():
            setattr(weight, name, value)
        layer.register_parameter("weight", weight)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        layer.weight.weight_loader.check()
        if not isinstance(layer.weight, PackedIntTensor):
            super().process_weights_after_loading(layer)


class PackedConfig(VllmConfig):
    """vLLM's reader of torchao's part of config.json. It says how each linear is made and loaded."""

    torchao_config: Any
    skip_modules: list[str]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Add vLLM's names of modules to the checkpoint's names."""
        self.skip_modules = [*self.skip_modules, *hf_to_vllm_mapper.apply_list(self.skip_modules)]
        if isinstance(self.torchao_config, FqnToConfig):
            configs = self.torchao_config.fqn_to_config
            self.torchao_config = FqnToConfig({**configs, **hf_to_vllm_mapper.apply_dict(configs)})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        given = self.torchao_config.fqn_to_config.values() if isinstance(self.torchao_config, FqnToConfig) else [self.torchao_config]
        if not self.is_checkpoint_torchao_serialized or not any(map(is_ours, given)):
            return super().get_quant_method(layer, prefix)
        parts = parts_of(prefix, self.packed_modules_mapping)
        methods = [super(PackedConfig, self).get_quant_method(layer, part) for part in parts]
        configs = [getattr(getattr(method, "quant_config", None), "torchao_config", None) for method in methods]
        if any(config != configs[0] for config in configs):
            told = ", ".join(f"{part}: {config}" for part, config in zip(parts, configs, strict=True))
            raise UserError(f"{prefix}: vLLM computes these as one linear, so they have to be quantized alike, or all left alone; the checkpoint has {told}")
        return PackedLinearMethod(methods[0].quant_config, prefix) if is_ours(configs[0]) else methods[0]
