"""The command line that repeats a run, for receipts and model cards.

It is made from the run's arguments, so it is the same whether the run was started from a command line, from Python or with files of settings.
"""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from torchao_qig.errors import UserError
from torchao_qig.lvlm.recipe import Recipe, recipe

QUANTIZE_FLAGS = ("output", "calib", "images", "bits", "group_size", "method", "modules", "samples", "seed", "max_length", "dtype", "device")
NEGATED = {"compiled": "--no-compile"}
ALWAYS = ("model", "output", "calib", "bits")  # always named, since today's defaults may change


def _text(value: Any) -> str:
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)


def _joined(name: str, model: Any, words: list[str]) -> str:
    """The command line of a subcommand with a model and other words. A model that begins with a dash comes last, after the `--` that ends options."""
    place = _text(model)
    return shlex.join(["torchao-qig", name, *words, "--", place] if place.startswith("-") else ["torchao-qig", name, place, *words])


def _yaml(value: Any) -> str:
    """A value in one line of YAML, as `--set` reads it."""
    if isinstance(value, str):
        try:
            if value.isprintable() and yaml.safe_load(value) == value:
                return value
        except yaml.YAMLError:
            pass
        return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=float("inf")).strip()
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.removesuffix("...\n").strip()


def command_line(name: str, run: Callable[..., Any], model: Any, given: Mapping[str, Any]) -> str:
    """The command line of a subcommand whose options are the arguments of `run`. Arguments that have their defaults are left out."""
    known = inspect.signature(run).parameters
    words: list[str] = []
    for key, value in given.items():
        flag = "--" + key.replace("_", "-")
        if value is None or value == known[key].default or (isinstance(value, (list, tuple)) and not value):
            continue
        if isinstance(value, bool):
            words.append(flag if value else NEGATED[key])
        else:
            words += [flag, ",".join(value) if isinstance(value, (list, tuple)) else _text(value)]
    return _joined(name, model, words)


def meaning(wanted: Recipe) -> dict[str, Any]:
    """All keys of a recipe with the values that they result in. Recipes with equal meanings do the same."""
    keys, computed = wanted.resolved(), wanted.config().public()
    return keys | {"method": None} | {key: computed[key] for key in keys.keys() & computed.keys() if key != "dtype"}  # a recipe's dtype is the one to load in


def _needed(wanted: Recipe) -> dict[str, Any]:
    """The recipe's keys without those that can be left out without changing its `meaning`."""
    now, kept = meaning(wanted), wanted.resolved()
    for key in now:
        if key not in ALWAYS and _means({k: v for k, v in kept.items() if k != key}, now):
            del kept[key]
    return kept


def _means(keys: dict[str, Any], now: dict[str, Any]) -> bool:
    try:
        return meaning(recipe(keys)) == now
    except UserError:
        return False


def quantizing(wanted: Recipe) -> str:
    """The command line of `torchao-qig quantize` that has the `meaning` of this recipe."""
    words: list[str] = []
    rest: list[str] = []
    keys = _needed(wanted)
    for key in sorted(keys, key=lambda k: QUANTIZE_FLAGS.index(k) if k in QUANTIZE_FLAGS else len(QUANTIZE_FLAGS)):
        value, flag = keys[key], "--" + key.replace("_", "-")
        if key == "model":
            continue
        if key == "int8_activations" and value is True:
            words.append(flag)
        elif key == "modules" and value:
            words += [word for one in value for word in (flag, one)]
        elif key in QUANTIZE_FLAGS and type(value) in (int, str) and not (key == "bits" and isinstance(value, str)):
            words += [flag, str(value)]
        else:
            rest += ["--set", f"{key}={_yaml(value)}"]
    return _joined("quantize", wanted.model, [*words, *rest])
