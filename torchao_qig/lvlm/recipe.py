"""A recipe: all settings of a run, given by flags and YAML files.

A recipe is one flat list of keys. The keys of `Recipe` itself say what is loaded, which samples are used, and where the result goes. All others
are settings of `QIGWeightOnlyConfig` (with `int8_activations: true` of `QIGInt8DynamicActivationConfig`) or of `Running`, and mean what they mean there.
Steps are plain data: `steps: [{equalize: {grid: 10}}, compensate]`.
Files override defaults, and flags override files. Every run writes the resulting recipe as recipe.yaml, which is such a file again.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from torchao_qig.config import MOVED, RUNTIME, QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig
from torchao_qig.errors import UserError, UserFileError
from torchao_qig.lvlm.load import DTYPES, device_of, dtype_of
from torchao_qig.methods.plain import from_plain, plain
from torchao_qig.running import Running

FIXED = {"format", "dtype", *RUNTIME}  # settings of the config that are no keys of a recipe; a recipe's own `dtype` is the one to load in
RUNNING = ("compute_dtype", "micro_batch", "max_host_memory")
TEXTS = {"model", "output", "calib", "images", "split", "revision", "prompt", "dtype", "device"}


@dataclass
class Recipe:
    """All settings of a run.

    Attributes:
        model: directory, or name on the hub; `revision`: that of a model on the hub.
        output: directory to write.
        calib, images, split: where the samples are (see `samples.read_samples`).
        samples, seed: how many samples to draw, and the seed of the draw.
        prompt: the question for captions that come without one.
        few_shot: demonstrations before each sample; `interleaved`: samples joined to one. Both are formats of the paper.
        tokens: largest number of tokens of a batch; `max_length`: of a sample, longer ones are left out.
        dtype: the dtype to load in; "auto" is as stored.
        device: where blocks are computed.
        int8_activations: W4A8 and the like.
        method, steps: how to calibrate: a name, or a list of steps.
        explain: number of samples whose token weights the report shows.
        max_kl: largest KL to full precision in nats per token; a model beyond it is an error.
        settings: those of the config.
    """

    model: str = ""
    output: str = ""
    calib: str = ""
    images: str | None = None
    split: str = "train"
    revision: str | None = None
    samples: int = 128
    seed: int = 0
    prompt: str | None = None
    few_shot: int = 0
    interleaved: int = 1
    tokens: int = 4096
    max_length: int | None = None
    dtype: str = "auto"
    device: str | None = None
    int8_activations: bool = False
    method: str | None = None
    steps: list[Any] | None = None
    explain: int = 8
    max_kl: float = 2.0
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("few_shot", 0), ("interleaved", 1), ("tokens", 1), ("explain", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"{name}={value!r}: pass an integer of at least {least}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise UserError(f"seed={self.seed!r}: pass an integer")
        if self.max_length is not None and (isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 1):
            raise UserError(f"max_length={self.max_length!r}: pass an integer of at least 1, or null for samples of any length")
        if not isinstance(self.int8_activations, bool):
            raise UserError(f"int8_activations={self.int8_activations!r}: pass true or false")
        modules = self.settings.get("modules")
        if not (modules is None or (isinstance(modules, list) and all(isinstance(name, str) for name in modules))):
            raise UserError(f"modules={modules!r}: pass a list of module names, or null for the decoder's blocks")
        if isinstance(self.max_kl, bool) or not isinstance(self.max_kl, (int, float)) or math.isnan(self.max_kl):
            raise UserError(f"max_kl={self.max_kl!r}: pass a number, .inf for no limit")
        if self.few_shot and self.interleaved > 1:
            raise UserError(f"few_shot={self.few_shot}, interleaved={self.interleaved}: pass one of them")
        for name in sorted(TEXTS):
            if not isinstance(getattr(self, name), str | None):
                raise UserError(f"{name}={getattr(self, name)!r}: pass a text")
        dtype_of(self.dtype)
        device_of(self.device)
        self.config()  # raises if the config refuses a setting

    def needs(self, *names: str) -> None:
        """Raise if one of these keys is not given."""
        missing = [name for name in names if not getattr(self, name)]
        if missing:
            raise UserError(f"{', '.join(missing)}: not given; pass {', '.join(f'--{n}' if n != 'model' else 'MODEL' for n in missing)}, or --config with them")

    def config(self, **runtime: Any) -> QIGWeightOnlyConfig:
        """The config for `quantize_`. `runtime`: settings of the config that a recipe does not have, such as calib."""
        made = QIGInt8DynamicActivationConfig if self.int8_activations else QIGWeightOnlyConfig
        settings: dict[str, Any] = {k: v for k, v in self.settings.items() if k not in RUNNING}
        running: dict[str, Any] = {k: v for k, v in self.settings.items() if k in RUNNING}
        if isinstance(running.get("compute_dtype"), str):
            if running["compute_dtype"] not in (computed := [name for name in DTYPES if name != "auto"]):
                raise UserError(f"compute_dtype={running['compute_dtype']!r}: pass one of {', '.join(computed)}")
            running["compute_dtype"] = DTYPES[running["compute_dtype"]]
        if self.device is not None:
            settings["device"] = self.device
        if self.steps is not None:
            if not isinstance(self.steps, list):
                raise UserError(f"steps={self.steps!r}: pass a list such as [{{equalize: {{grid: 10}}}}, compensate]")
            settings["steps"] = [from_plain(step) for step in self.steps]
        return made(**settings, method=self.method, running=Running(**running), **runtime)

    def resolved(self) -> dict[str, Any]:
        """All keys with their values, defaults included."""
        config = self.config()
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}
        own["steps"] = None if self.steps is None else [plain(step) for step in config.steps or []]
        others = (name for name in keys(self.int8_activations) if name not in own)
        return own | {name: _plain(getattr(config.running if name in RUNNING else config, name)) for name in others}

    def write(self, path: Path) -> None:
        path.write_text(yaml.safe_dump(self.resolved(), sort_keys=False))


def _plain(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


def _number(value: Any) -> Any:
    """The number that a text stands for: YAML reads 1e-3 as a text."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _numbers(value: Any) -> Any:
    """`_number` for everything inside dicts and lists."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    return [_numbers(v) for v in value] if isinstance(value, list) else _number(value)


def keys(int8_activations: bool = False) -> list[str]:
    """Every key that a recipe may have."""
    config = QIGInt8DynamicActivationConfig if int8_activations else QIGWeightOnlyConfig
    own = [f.name for f in fields(Recipe) if f.name != "settings"]
    return own + [f.name for f in fields(config) if f.name not in FIXED and f.name not in own] + list(RUNNING)


def read(path: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file."""
    try:
        found = yaml.safe_load(Path(path).expanduser().read_text())
    except FileNotFoundError:
        raise UserFileError(f"config={str(path)!r}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"config={str(path)!r}: not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UserError(f"config={str(path)!r}: has no keys; write lines such as `bits: 3`")
    return {str(k): v for k, v in found.items()}


def pairs(texts: list[str]) -> dict[str, Any]:
    """Keys and values from texts of the form key=value, as `--set` takes them."""
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r}: write key=value")
        try:
            found[key.strip().replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {text!r}: {' '.join(str(error).split())}") from error
    return found


def recipe(*layers: dict[str, Any]) -> Recipe:
    """A recipe from layers of keys. Later layers override earlier ones."""
    given: dict[str, Any] = {}
    for layer in layers:
        for key, other in (("method", "steps"), ("steps", "method")):  # each of them replaces an earlier value of the other
            if layer.get(key) is not None and layer.get(other) is None:
                given.pop(other, None)
        given |= layer
    given = {k: v if k in TEXTS else _numbers(v) if k == "steps" else _number(v) for k, v in given.items()}
    known = keys(bool(given.get("int8_activations")))
    for key in given:
        if key in MOVED and key not in known:
            raise UserError(f"{key}: is a setting of a step now; write `method: NAME` or `steps: [{{equalize: {{...}}}}, ...]`; in Python {MOVED[key]}")
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            raise UserError(f"{key}: no such setting{f'; did you mean {near[0]}?' if near else ''} (all: {', '.join(known)})")
    own = {f.name for f in fields(Recipe)}
    settings = {k: v for k, v in given.items() if k not in own}
    return Recipe(**{k: v for k, v in given.items() if k in own}, settings=settings)
