"""Load models and processors of any architecture, from a directory or by a name on the hub."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from transformers.utils import cached_file

from torchao_qig.errors import UserError, UserFileError
from torchao_qig.lvlm import stored
from torchao_qig.system import out_of_memory

AUTO = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)
WEIGHT_FILES = ("*.safetensors", "*.bin")
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _located(name: str) -> str:
    """The directory or the name on the hub that `name` stands for. Raises if it is a path without a config.json."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise UserFileError(f"model={name!r}: no config.json in this directory; pass one that save_pretrained wrote, or a name on the hub")
        return str(path)
    looks_like_a_path = name.startswith((".", "/", "~")) or name.count("/") != 1 or path.parent.is_dir()
    if looks_like_a_path:
        raise UserFileError(f"model={name!r}: no such directory; pass one that save_pretrained wrote, or a name on the hub (owner/model)")
    return name


def device_of(name: str | None) -> torch.device:
    """The device of this name; raises if this machine does not have it."""
    try:
        device = torch.device(name or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device={name!r}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise UserError(f"device={name!r}: nothing is computed there; pass cpu or an accelerator")
    return device


def dtype_of(name: str) -> Any:
    """The torch dtype of this name; "auto" stays "auto"."""
    if name not in DTYPES:
        raise UserError(f"dtype={name!r}: pass one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _tried(name: str, load: Callable[[str], Any], what: str) -> Any:
    """`load` called with the located name. Its errors become a `UserFileError` that says `what` could not be loaded."""
    path = _located(name)
    try:
        return load(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # damaged files fail in many ways
        if out_of_memory(error):
            raise
        raise UserFileError(f"model={name!r}: cannot load its {what}: {' '.join(str(error).split())}") from error


def load_config(name: str, revision: str | None = None) -> Any:
    return _tried(name, lambda path: transformers.AutoConfig.from_pretrained(path, revision=revision), "configuration")


def auto_class(config: Any) -> Any:
    """The transformers auto class for this model: the one for images and text if it knows the model, else the one for text."""
    for auto in AUTO:
        if type(config) in auto._model_mapping:
            return auto
    raise UserError(f"model: transformers {transformers.__version__} knows no model that generates text for model_type={config.model_type!r}")


def load_model(name: str, dtype: str = "auto", revision: str | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """The model in eval mode. It is loaded on the CPU and then moved to the device, so that no extra package is needed."""
    config = load_config(name, revision)
    auto = auto_class(config)
    described = _tried(name, lambda _: stored.described(config), "configuration")
    stored.check(name, described, _tried(name, lambda path: stored.packed(path, revision), "weights"))
    options = dict(dtype=dtype_of(dtype), revision=revision, output_loading_info=True)
    model, found = _tried(name, lambda path: auto.from_pretrained(path, **options), "weights")
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise UserError(f"model={name!r}: {len(missing)} weights are not in its files and would be random: {', '.join(missing[:3])} ...; repair the directory")
    return model.eval().to(device)


def shape_of(name: str, dtype: str = "auto", revision: str | None = None) -> nn.Module:
    """The model without its weights, on the meta device. A plan needs no more."""
    config = load_config(name, revision)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"model={name!r}: quantized already; pass the full-precision model")
    wanted = dtype_of(dtype) if dtype != "auto" else getattr(config, "dtype", None) or torch.float32
    auto = auto_class(config)
    with torch.device("meta"):
        return _tried(name, lambda _: auto.from_config(config, dtype=wanted), "configuration").eval()


def bytes_on_disk(directory: Path) -> int:
    """Bytes of a checkpoint's weight files; 0 where there are none."""
    return sum(file.stat().st_size for pattern in WEIGHT_FILES for file in directory.glob(pattern))


def images_only(processor_class: Any) -> Any:
    """A processor class without its part for videos, which needs torchvision. The constructor gets None for that part."""
    every = processor_class.get_attributes()
    kept = [a for a in every if a != "video_processor"]

    def arguments(cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        found = processor_class._get_arguments_from_pretrained.__func__(cls, *args, **kwargs)
        return [dict(zip(kept, found, strict=True)).get(a) for a in every]

    own = {"get_attributes": classmethod(lambda cls: kept), "_get_arguments_from_pretrained": classmethod(arguments)}
    nothing = {"__module__": processor_class.__module__, "video_processor": SimpleNamespace(num_frames=None, fps=None)}
    return type(processor_class.__name__, (processor_class,), own | nothing)


def load_processor(name: str, revision: str | None = None) -> Any:
    """The model's processor, or a text model's tokenizer. Without torchvision, the processor is for images only."""

    def load(path: str) -> Any:
        if importlib.util.find_spec("torchvision") is None and (found := _processor_class(path, revision)) is not None:
            return images_only(found).from_pretrained(path, revision=revision)
        return transformers.AutoProcessor.from_pretrained(path, revision=revision)

    return _tried(name, load, "processor or tokenizer")


def save_processor(processor: Any, name: str, revision: str | None, directory: Path) -> None:
    """Write a processor into a model's directory. Its configuration files are copied as they are, since the processor in memory may lack its
    part for videos."""
    processor.save_pretrained(directory)
    for file in PROCESSOR_FILES:
        found = cached_file(_located(name), file, revision=revision, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            shutil.copyfile(found, directory / file)


def _processor_class(path: str, revision: str | None) -> type | None:
    """The processor's class as its files name it; None where there is none (text models)."""
    for load in (transformers.ProcessorMixin.get_processor_dict, transformers.image_processing_base.ImageProcessingMixin.get_image_processor_dict):
        try:
            found, _ = load(path, revision=revision)
        except OSError:
            continue
        if "processor_class" in found:
            return getattr(transformers, found["processor_class"], None)
    return None
