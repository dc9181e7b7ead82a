"""Save checkpoints: an ordinary transformers directory with packed weights in safetensors, and a config.json that names our config.

`quantize_` describes a transformers model as it quantizes it (`describe`), so `model.save_pretrained` works as usual. `save_pretrained` below
does more. It writes the names that checkpoints of this kind have on the hub, in the files and in the tensors' metadata. transformers may write
only its own names, under which vLLM finds nothing. It can also save a loaded model again.

transformers itself is only imported once a transformers model is given.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchao_qig._compat import FqnToConfig, QuantizeCall
from torchao_qig.errors import UserError, UserTypeError
from torchao_qig.formats import CodedFormat
from torchao_qig.tensor import PackedIntTensor


def _is_transformers_model(model: nn.Module) -> bool:
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def has_packed(module: nn.Module) -> bool:
    return any(isinstance(p, PackedIntTensor) for p in module.parameters())


def _left_alone(module: nn.Module, name: str = "") -> list[str]:
    """Names of the largest sub-modules that hold linears but nothing packed."""
    if not has_packed(module):
        return [name] if any(isinstance(m, nn.Linear) for m in module.modules()) else []
    return [left for child, m in module.named_children() for left in _left_alone(m, f"{name}.{child}" if name else child)]


def modules_left_alone(model: nn.Module) -> list[str]:
    """The modules that stay unquantized, by their full names (for transformers) and by the last components of these (for vLLM)."""
    names = _left_alone(model)
    packed = {part for name, p in model.named_parameters() if isinstance(p, PackedIntTensor) for part in name.split(".")}
    last = [name.rsplit(".", 1)[-1] for name in names]
    return list(dict.fromkeys([*names, *(part for part in last if part not in packed and not part.isdigit())]))


def _loading_config(model: nn.Module, config: Any) -> Any:
    """The config that config.json should name. It holds no data, and a torchao algorithm with several steps is at its step for loading."""
    packed = {name.removesuffix(".weight"): p for name, p in model.named_parameters() if isinstance(p, PackedIntTensor)}
    if isinstance(config, FqnToConfig):
        return _loading_by_name(model, config, packed)
    if isinstance(getattr(config, "format", None), CodedFormat) and packed:  # a user's own format that stores packed integers
        stored = next(iter(packed.values()))
        symmetric = getattr(config.format, "symmetric", config.symmetric)
        config = dataclasses.replace(config, format=None, steps=None, bits=stored.bits, group_size=stored.group_size, symmetric=symmetric)
    if hasattr(config, "for_loading") and not isinstance(config.bits, int):  # each linear has its own bits
        return FqnToConfig({name: config.with_bits(p.bits).for_loading(p.act_pre_scale is not None) for name, p in packed.items()})
    if hasattr(config, "for_loading"):
        return config.for_loading(any(p.act_pre_scale is not None for p in packed.values()))
    return dataclasses.replace(config, step="prepare_for_loading") if hasattr(config, "step") and hasattr(config, "base_config") else config


def _loading_by_name(model: nn.Module, config: FqnToConfig, packed: dict[str, PackedIntTensor]) -> FqnToConfig:
    """The config for config.json if configs are given by name.

    If only some linears of an entry have an `act_pre_scale`, each of its linears gets an entry of its own, before that entry.
    """
    scaled = {name: p.act_pre_scale is not None for name, p in packed.items()}
    of_entry: dict[int, dict[str, bool]] = {}
    for a in QuantizeCall(model, config, None).assignments():
        if a.fqn in scaled and hasattr(a.config, "for_loading"):
            of_entry.setdefault(id(a.config), {})[a.fqn] = scaled[a.fqn]
    entries: dict[str, Any] = {}
    for key, entry in config.fqn_to_config.items():
        linears, name = of_entry.get(id(entry), {}), key.removesuffix(".weight")
        if len(set(linears.values())) > 1 and name not in scaled:
            entries |= {n: entry.for_loading(with_scale) for n, with_scale in linears.items() if n not in entries}
        with_scale = scaled.get(name, any(linears.values()))
        entries[key] = entry.for_loading(with_scale) if hasattr(entry, "for_loading") else entry
    return FqnToConfig(entries)


def describe(model: nn.Module, config: Any) -> None:
    """Write into a transformers model the description that its save_pretrained needs. Other models are left as they are."""
    if not _is_transformers_model(model):
        return
    from transformers import TorchAoConfig
    from transformers.quantizers import AutoHfQuantizer

    described = TorchAoConfig(_loading_config(model, config), modules_to_not_convert=modules_left_alone(model))
    model.config.quantization_config = described
    model.hf_quantizer = AutoHfQuantizer.from_config(described, pre_quantized=True)


def _description(model: nn.Module) -> Any:
    """The torchao config that the model, or a part of it that was quantized on its own, was described with."""
    for module in model.modules():
        described = getattr(getattr(module, "config", None), "quantization_config", None)
        if described is not None and hasattr(described, "quant_type"):
            return described.quant_type
    return None


def _reverses(conversion: Any) -> bool:
    """Whether transformers can reverse a conversion of weights that it did on loading."""
    try:
        conversion.reverse_transform()
    except (NotImplementedError, ValueError):  # a conversion for loading a quantized checkpoint, which renamed nothing
        return False
    return True


def _with_public_names(model: nn.Module, tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Flattened tensors under the names that they have on the hub, and metadata that lists them under these names and under the model's own."""
    from transformers.core_model_loading import revert_weight_conversion

    own = {id(t): name for name, t in tensors.items()}
    public = {
        name if "." in name else own.get(id(t), name): t  # torchao reads no name without a module
        for name, t in revert_weight_conversion(model, tensors).items()
    }
    renamed = {own[id(t)]: name for name, t in public.items() if id(t) in own}
    described = {name: text for name, text in metadata.items() if name != "tensor_names"}
    parts = set()
    for name, text in list(described.items()):
        module, _, parameter = name.rpartition(".")
        for data in json.loads(text).get("_tensor_data_names", ()):
            part = f"._{parameter}_{data}"
            parts.add(written := renamed.get(module + part, module + part))
            described[f"{written.removesuffix(part)}.{parameter}"] = text
    described |= {name: json.dumps({"_type": "Tensor"}) for name in public if name not in parts and name not in described}
    return public, {**described, "tensor_names": json.dumps(list(described))}


@contextmanager
def _public_names(model: nn.Module) -> Iterator[None]:
    """While this runs, transformers writes files with the hub's names."""
    target: Any = model
    flatten, used = target.hf_quantizer.get_state_dict_and_metadata, getattr(model, "_weight_conversions", None)
    target._weight_conversions = [c for c in used or () if _reverses(c)] or None
    target.hf_quantizer.get_state_dict_and_metadata = lambda m: _with_public_names(m, *flatten(m))
    try:
        yield
    finally:
        del target.hf_quantizer.get_state_dict_and_metadata
        target._weight_conversions = used


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str], config: Any = None, **kwargs: Any) -> None:
    """Save a quantized transformers model so that transformers and vLLM load it.

    Args:
        model: a transformers model, quantized as a whole or in part.
        directory: where to write config.json, the safetensors files and the generation config.
        config: the torchao config that the model was quantized with; only needed if another tool quantized it.
        kwargs: passed on to `model.save_pretrained` (max_shard_size, ...).
    """
    if not _is_transformers_model(model):
        raise UserTypeError(f"model: save_pretrained is for transformers models, got {type(model).__name__}; use torch.save(model.state_dict()) instead")
    if not has_packed(model):
        raise UserError("model: it holds no packed weight; call quantize_(model, config) first, or use model.save_pretrained")
    config = config if config is not None else _description(model)
    if config is None:
        raise UserError("config: cannot tell how the model was quantized; pass the torchao config that you gave to quantize_")
    for module in model.modules():  # a part quantized on its own has a description: keep only that of the whole model
        if module is not model and _is_transformers_model(module) and hasattr(module.config, "quantization_config"):
            del module.config.quantization_config
    describe(model, config)
    with _public_names(model):
        model.save_pretrained(directory, save_original_format=False, **kwargs)  # False: it is in that format already
