"""Writes the table of sizes in each family's README, from the shapes of its published models.

    python -m recipes.sizes            # writes the tables, prints how long calibration would take on this machine
    python -m recipes.sizes --check    # only says whether they are up to date (exit code 1: no)

A model is built on the meta device from recipes/<family>/shapes.yaml, with every linear of the published model but without weights.
`torchao_qig.plan` then says what the recipes recipes/<family>/w3a16.yaml and w4a8.yaml would make of it.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import nn

from torchao_qig import plan
from torchao_qig.lvlm.load import auto_class
from torchao_qig.lvlm.recipe import read, recipe

HERE = Path(__file__).parent
RECIPES = ("w3a16", "w4a8")
BEGIN, END = "<!-- sizes: written by python -m recipes.sizes -->", "<!-- /sizes -->"
HEAD = """\
| model | parameters | bfloat16 | {columns} |
| --- | --- | --- | {rules} |"""
FOOT = "GiB, whole model; behind the slash what calibration needs beside the bfloat16 model, for 128 samples of 1,024 tokens (`torchao_qig.plan`)."


@dataclass
class Size:
    """One model under one recipe: its bytes before and after, and the bytes and seconds (on this machine) that calibration needs."""

    before: int
    after: int
    calibration: int
    seconds: float


def families() -> list[str]:
    return sorted(path.parent.name for path in HERE.glob("*/shapes.yaml"))


def shapes(family: str) -> list[dict[str, Any]]:
    """The published models of a family: `model`, `billions` of parameters, `config`, and `settings` that it needs beside the recipe."""
    found: list[dict[str, Any]] = yaml.safe_load((HERE / family / "shapes.yaml").read_text())
    return found


def build(config: dict[str, Any]) -> nn.Module:
    """The model with this configuration, on the meta device and in bfloat16, as such models are published."""
    made = transformers.AutoConfig.for_model(**config)
    with torch.device("meta"):
        model: nn.Module = auto_class(made).from_config(made, dtype=torch.bfloat16)
    return model.eval()


def size(model: nn.Module, path: Path, settings: dict[str, Any]) -> Size:
    found = plan(model, recipe(read(path), settings).config())
    assert found.need is not None  # all our recipes calibrate
    after = found.model_bytes - found.bytes_before + found.bytes_after
    return Size(found.model_bytes, after, found.need.device_bytes + found.need.host_bytes, found.need.seconds)


def settings_for(name: str, shape: dict[str, Any]) -> dict[str, Any]:
    """The settings that a model needs beside a recipe. W4A8 needs none: it has a scale per row and so no group size."""
    return dict(shape.get("settings", {})) if name == "w3a16" else {}


def table(family: str) -> tuple[str, list[str]]:
    """A family's table in Markdown, and a line per model about the time of calibration."""
    lines = [HEAD.format(columns=" | ".join(name.upper() for name in RECIPES), rules=" | ".join("---" for _ in RECIPES))]
    times = []
    for shape in shapes(family):
        model = build(shape["config"])
        count = sum(p.numel() for p in model.parameters())
        sizes = {name: size(model, HERE / family / f"{name}.yaml", settings_for(name, shape)) for name in RECIPES}
        short = shape["model"].partition("/")[2]
        cells = [f"{gib(s.after)} / {gib(s.calibration, 1)}{told(settings_for(name, shape))}" for name, s in sizes.items()]
        lines.append(f"| `{shape['model']}` | {count / 1e9:.2f} B | {gib(sizes['w3a16'].before)} | {' | '.join(cells)} |")
        times.append(f"{short}: " + ", ".join(f"{name.upper()} {s.seconds / 3600:.1f} h" for name, s in sizes.items()))
    return "\n".join([*lines, "", FOOT]), times


def gib(count: int, digits: int = 2) -> str:
    return f"{count / 2**30:.{digits}f}"


def told(settings: dict[str, Any]) -> str:
    return "".join(f" (`--set {key}={value}`)" for key, value in settings.items())


def with_table(text: str, made: str) -> str:
    """A README's text with the table `made` between the marks BEGIN and END."""
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"the README has no place for the table; write these two lines into it once:\n{BEGIN}\n{END}")
    return pattern.sub(lambda _: f"{BEGIN}\n{made}\n{END}", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args(arguments).check
    old = []
    for family in families():
        path = HERE / family / "README.md"
        made, times = table(family)
        text = path.read_text()
        new = with_table(text, made)
        if new != text:
            old.append(str(path.relative_to(HERE.parent)))
            if not check:
                path.write_text(new)
        if not check:
            print("\n".join(times))
    if old:
        print(f"{'out of date, run python -m recipes.sizes' if check else 'written'}: {', '.join(old)}")
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
