"""Check that a checkpoint's config.json and its files say the same about the packed weights. Only headers are read, no weights.

If config.json has lost its quantization_config, transformers warns and loads random weights. If it names other bits than the files hold,
transformers uses the bits of the files, while vLLM and human readers rely on config.json.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from safetensors import safe_open
from transformers.utils import cached_file

from torchao_qig._compat import FqnToConfig, OurConfig
from torchao_qig.errors import UserError
from torchao_qig.tensor import PackedIntTensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COMPARED = ("bits", "group_size", "int8_activations")
CURE = "put the config.json back that was saved with these files, or quantize again"


class Packed(NamedTuple):
    """A packed weight: the file that holds it, and its attributes as the file describes them. They are empty if the description is lost."""

    file: str
    attributes: dict[str, Any]


def _files(path: str, revision: str | None) -> list[Path]:
    """The files that transformers loads for a directory or a name on the hub."""

    def found(file: str) -> str | None:
        return cached_file(path, file, revision=revision, _raise_exceptions_for_missing_entries=False)

    names = [WEIGHTS]
    if found(WEIGHTS) is None:
        index = found(INDEX)
        names = [] if index is None else sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [Path(file) for file in map(found, names) if file is not None]


def packed(path: str, revision: str | None = None) -> dict[str, Packed]:
    """The packed weights in a checkpoint's files, by name. The names may be the model's, the hub's, or both."""
    weights: dict[str, Packed] = {}
    for file in _files(path, revision):
        with safe_open(file, "pt") as opened:
            described, names = opened.metadata() or {}, list(opened.keys())
        for name in names:
            module, _, data = name.rpartition("._")
            if module and data.endswith("_qdata"):
                weights.setdefault(f"{module}.{data.removesuffix('_qdata')}", Packed(file.name, {}))
        for name, text in described.items():
            if name != "tensor_names" and f'"{PackedIntTensor.__name__}"' in text:
                weights[name] = Packed(file.name, json.loads(text)["_data"])
    return weights


def described(config: Any) -> Any:
    """The torchao config that config.json names; None where it names none."""
    found = getattr(config, "quantization_config", None)
    if isinstance(found, dict):
        found = transformers.TorchAoConfig.from_dict(found) if found.get("quant_method") == "torchao" else None
    return getattr(found, "quant_type", None)


def _of(config: Any, weight: str) -> Any:
    """The config of ours for this weight; None if the weight has another config or none."""
    if isinstance(config, FqnToConfig):
        names = (weight, weight.rpartition(".")[0])
        known = config.fqn_to_config
        chosen = next((name for name in names if name in known), None)
        chosen = chosen or next((k for k in known if k.startswith("re:") and any(re.fullmatch(k[3:], name) for name in names)), "_default")
        config = known.get(chosen)
    while getattr(config, "base_config", None) is not None:
        config = config.base_config
    return config if isinstance(config, OurConfig) else None


def check(model: str, config: Any, weights: dict[str, Packed]) -> None:
    """Raise where the files' packed weights (`packed`) and config.json (`described`) contradict each other."""
    for weight, (file, attributes) in weights.items():
        linear = weight.removesuffix(".weight")
        if config is None:
            raise UserError(
                f"model={model!r}: config.json has no quantization_config of torchao, but {file} holds packed weights ({linear} and others),"
                f" which would be random; {CURE}"
            )
        mine = _of(config, weight)
        for key in COMPARED:
            said, stored = getattr(mine, key, None), attributes.get(key)
            if isinstance(said, int) and stored is not None and said != stored:
                raise UserError(f"model={model!r}: config.json says {key}={said} for {linear}, {file} holds {key}={stored}; {CURE}")
