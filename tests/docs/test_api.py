"""The reference page and the code say the same: names, signatures, fields, defaults. So do figures and the result files that they are from."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import torchao_qig
from tests.docs.pages import DOCS, ROOT
from torchao_qig.config import RUNTIME
from torchao_qig.methods.presets import PRESETS, preset

PAGE = (DOCS / "api.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### `([\w.]+)(\(.*\))?`$", PAGE, re.MULTILINE)
CONFIGS = ("QIGWeightOnlyConfig", "QIGInt8DynamicActivationConfig", "PackedIntWeightOnlyConfig", "Running")
STEPS = ("Equalize", "Smooth", "Compensate", "Clip", "QIG", "Modality", "Uniform")
OWN = {"QIGInt8DynamicActivationConfig": ("bits", "group_size", "symmetric")}  # beside those of the config that it extends
FIGURES = [page for page in sorted(DOCS.glob("*.md")) if page.name not in ("LOG.md", "paper.md", "small_lvlm.md")] + [ROOT / "README.md"]


def definition(path: str) -> ast.FunctionDef | ast.ClassDef:
    """Where a name is defined, without importing what may need an extra."""
    parts = path.split(".")
    if len(parts) == 2 or parts[1][0].isupper():  # torchao_qig.plan, torchao_qig.Calibration.load
        found: Any = getattr(torchao_qig, parts[1])
        found = found.calibrate if inspect.ismodule(found) else found
        member = getattr(found, "nbytes_packed", found)  # the tensor calls itself torchao_qig.PackedIntTensor
        file, names = Path(inspect.getfile(member)), [found.__name__, *parts[2:]]
    else:
        folder = ROOT.joinpath(*parts[:-1])
        file, names = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py"), parts[-1:]
    node: Any = ast.parse(file.read_text())
    for name in names:
        node = next(n for n in node.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name)
    return node


def signature(node: ast.FunctionDef) -> str:
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"({ast.unparse(node.args)})"


def test_every_public_name_is_there() -> None:
    assert {f"torchao_qig.{name}" for name in torchao_qig.__all__} <= {name for name, _ in HEADINGS}


@pytest.mark.parametrize("name, told", HEADINGS, ids=[name for name, _ in HEADINGS])
def test_signatures(name: str, told: str) -> None:
    node = definition(name)

    assert isinstance(node, ast.ClassDef) == (not told)
    if isinstance(node, ast.FunctionDef):
        assert told == signature(node)


@pytest.mark.parametrize("name", CONFIGS + STEPS)
def test_fields_and_defaults(name: str) -> None:
    section = PAGE.split(f"### `torchao_qig.{name}`")[1].split("\n### ")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", section, re.MULTILINE))
    config = getattr(torchao_qig, name)()
    runtime = RUNTIME if name == "QIGWeightOnlyConfig" else ()
    names = OWN.get(name, [f.name for f in fields(config) if f.name not in ("version", *RUNTIME)]) + type(OWN.get(name, []))(runtime)

    assert list(told) == list(names)
    defaults = {k: torchao_qig.Running() if v == "Running()" else ast.literal_eval(v) for k, v in told.items()}
    assert defaults == {k: getattr(config, k) for k in names}


def built(written: ast.expr) -> Any:
    """What an expression of steps stands for."""
    if isinstance(written, ast.List):
        return [built(one) for one in written.elts]
    if isinstance(written, ast.Call) and isinstance(written.func, ast.Name):
        return getattr(torchao_qig, written.func.id)(*map(built, written.args), **{k.arg: built(k.value) for k in written.keywords if k.arg})
    return ast.literal_eval(written)


def test_methods_are_those_of_the_presets() -> None:
    """Every method by name, with the steps that it is."""
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `([\w+-]+)` \| `(\[.*?\])` \|", page, re.MULTILINE))

    assert list(told) == list(PRESETS)
    for name, steps in told.items():
        assert built(ast.parse(steps, mode="eval").body) == preset(name), name


@pytest.mark.parametrize("name", STEPS)
def test_settings_of_steps(name: str) -> None:
    """The page about choosing has the same defaults as the code."""
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    made = getattr(torchao_qig, name)()
    if f"### {name}\n" in page:
        section = page.split(f"### {name}\n")[1].split("\n### ")[0]
        told: dict[str, str] = {}
        for keys, values in re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| ((?:`.*?`(?:, )?)+) \|", section, re.MULTILINE):
            told |= dict(zip(re.findall(r"`(\w+)`", keys), re.findall(r"`(.*?)`", values), strict=True))
        assert {k: ast.literal_eval(v) for k, v in told.items()} == {f.name: getattr(made, f.name) for f in fields(made)}
    else:  # token weights share a table
        section = page.split("### Token weights\n")[1].split("\n## ")[0]
        assert f'| `{name}` | `"{made.name}"` |' in section
        for f in fields(made):
            assert re.search(rf"\| `{f.name}` \| `{re.escape(repr(getattr(made, f.name))).replace(chr(39), '.')}` \|", section), f.name


@pytest.mark.parametrize("page", FIGURES, ids=lambda p: p.name)
def test_divergences_are_measured(page: Path) -> None:
    """Figures with four decimals (KL, NLL) stand in a committed result."""
    results = "".join(path.read_text() for path in sorted((ROOT / "benchmarks" / "results").glob("*.md")))
    told = set(re.findall(r"(?<![\d.])0\.\d{4}(?!\d)", page.read_text(encoding="utf-8")))

    assert {figure for figure in told if figure not in results} == set()


@pytest.mark.parametrize("page", [DOCS / "recipes.md", DOCS / "memory_and_time.md"], ids=lambda p: p.name)
def test_sizes_are_those_of_the_recipes(page: Path) -> None:
    """Rows about published models have the figures of the family's own table."""
    tables = "\n".join(path.read_text() for path in sorted((ROOT / "recipes").glob("*/README.md")))
    rows = re.findall(r"^\| (`[\w.-]+/[\w.-]+`) \|(.*)\|$", page.read_text(), re.MULTILINE)
    number = r"\d+\.\d+"
    known = {model: set(re.findall(number, figures)) for model, figures in re.findall(r"^\| (`[^`]+`) \| \S+ B \|(.*)\|$", tables, re.MULTILINE)}

    assert rows
    for model, figures in rows:
        assert set(re.findall(number, figures)) <= known[model], model


def test_complaints_are_all_answered() -> None:
    """1 to 32, each with issues, an answer of a known kind, and links that are there (the site's test looks where they lead)."""
    rows = re.findall(r"^\| (\d+) \| (.*) \| (.*) \|$", (DOCS / "pains.md").read_text(), re.MULTILINE)
    kinds = ("feature", "message", "documentation", "partly", "not done", "not applicable")

    assert [int(number) for number, _, _ in rows] == list(range(1, 33))
    for number, complaint, answer in rows:
        assert "#" in complaint or "resume.py" in complaint, number
        assert set(re.findall(r"\*\*(.+?)\*\*", answer.lower())) <= set(kinds), number
        assert answer.lower().startswith(tuple(f"**{kind}**" for kind in kinds)), number


def test_definitions_are_found() -> None:
    """A wrong signature is noticed: the page's own forms, against another function."""
    assert signature(definition("torchao_qig.plan")) == "(model, config, filter_fn=None)"  # type: ignore[arg-type]
    assert signature(definition("torchao_qig.lvlm.mixes.few_shot")) == "(samples, shots, seed=0)"  # type: ignore[arg-type]
    with pytest.raises(StopIteration):
        definition("torchao_qig.lvlm.mixes.no_such")
    assert json.loads((ROOT / "benchmarks" / "results" / "accuracy.json").read_text())
    assert importlib.import_module("torchao_qig.lvlm.mixes").few_shot
