"""Every fenced block of the pages and of the README runs, or is checked in another way, in a folder such as a reader has."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

import tests.tiny_dirs
from tests.docs.pages import DOCS, PRINTS, ROOT, Block, blocks, commands, pages
from torchao_qig.lvlm import recipe
from torchao_qig.lvlm.data import Batches, calibration_batches
from torchao_qig.lvlm.load import load_model, load_processor
from torchao_qig.lvlm.samples import read_samples
from torchao_qig_cli import app

LANGUAGES = {"python", "bash", "yaml", "json", "jsonl", "text"}
RUN = ("python", "bash")
NOT_RUN = {  # beginnings of commands -> why
    "bash scripts/": "what CI itself runs: it makes an environment and starts these tests",
    "python -m benchmarks.": "minutes to hours of measurement; what it gave is committed in benchmarks/results",
}
FILES = ("my-lvlm", "my-lvlm-int3", "coco.jsonl", "questions.jsonl", "images", "dog.jpg")
WRITES_INT3 = {"index.md", "quickstart.md", "README.md"}  # pages that make my-lvlm-int3 themselves


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: a model, pictures with captions and with questions, and what `quantize` made of them."""
    root = tmp_path_factory.mktemp("reader")
    tests.tiny_dirs.directory("llava_onevision", root / "my-lvlm")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)

    def picture(path: Path) -> None:
        width, height = rng.integers(24, 90, 2)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)

    things = ("dog", "cup", "tree", "boat")
    names = [f"{number:012}.jpg" for number in range(9, 33)]
    for name in names:
        picture(root / "images" / name)
    for name in ("dog.jpg", "cat.jpg"):
        picture(root / name)
    captions = [{"image": name, "caption": f"{i} {things[i % 4]}s on grass."} for i, name in enumerate(names)]
    questions = [{"image": name, "question": "What is it?", "answer": things[i % 4]} for i, name in enumerate(names[:12])]
    for file, rows in (("coco.jsonl", captions), ("questions.jsonl", questions)):
        (root / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = ["quantize", str(root / "my-lvlm"), "--bits", "3", "--calib", str(root / "coco.jsonl"), "--images", str(root / "images"), "--samples", "16"]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(root)
        command(["torchao-qig", *made, "--output", "my-lvlm-int3"])
    return root


def vlm() -> torch.nn.Module:
    return load_model("my-lvlm")


def batches() -> Batches:
    return calibration_batches(read_samples("coco.jsonl", "images", count=8), load_processor("my-lvlm"))


# Names that a page's Python does not make itself, made anew for each of its blocks.
NAMES: dict[str, dict[str, Callable[[], Any]]] = {
    "README.md": {"model": vlm, "vlm": vlm, "loader": batches, "batches": batches},
    "index.md": {"model": vlm, "loader": batches},
    "small_lvlm.md": {"pixels": lambda: np.zeros((112, 112, 3), dtype=np.uint8)},
}


def command(words: list[str]) -> str:
    """Run one command in this process; what it prints."""
    variables = []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        variables.append(words.pop(0).split("=", 1))
    with pytest.MonkeyPatch.context() as patched:
        for name, value in variables:
            patched.setenv(name, value)
        patched.setattr(sys, "argv", words)
        if words[0] == "torchao-qig":
            done = CliRunner().invoke(app, words[1:])
            assert done.exit_code == 0, f"{shlex.join(words)}: exit code {done.exit_code}\n{done.output}\n{done.exception!r}"
            return done.stdout
        assert words[:2] == ["python", "-m"], f"{shlex.join(words)}: commands that cannot run here belong into a text block"
        patched.setattr(sys, "argv", words[2:])
        patched.syspath_prepend(str(ROOT))
        out, code = io.StringIO(), None
        try:
            with contextlib.redirect_stdout(out):
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
        except SystemExit as done:
            code = done.code
        assert not code, f"{shlex.join(words)}: {code}"
        return out.getvalue()


def bash(block: Block) -> str:
    printed = []
    for line in commands(block.body):
        if reason := next((why for start, why in NOT_RUN.items() if line.startswith(start)), None):
            assert exists(line), f"{block}: {line}: no such file ({reason})"
        else:
            printed.append(command(shlex.split(line, comments=True)))
    return "".join(printed)


def exists(line: str) -> bool:
    """Whether a command that is not run at least names something that is there."""
    words = shlex.split(line, comments=True)
    path = ROOT / (words[1] if words[0] == "bash" else f"{words[2].replace('.', '/')}.py")
    return path.is_file()


def python(block: Block, names: dict[str, Any]) -> str:
    code = compile("\n" * (block.line - 1) + block.body, str(block), "exec", dont_inherit=True)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return out.getvalue()


def said(printed: str, expected: str) -> bool:
    """Whether these lines were printed in this order; "..." stands for anything within a line, alone on one for any lines."""
    at = 0
    lines = printed.splitlines()
    for line in filter(None, (line.rstrip() for line in expected.splitlines())):
        if line.strip() == "...":
            continue
        pattern = ".*".join(map(re.escape, line.split("...")))
        at = next((i + 1 for i in range(at, len(lines)) if re.fullmatch(pattern, lines[i].rstrip())), -1)
        if at < 0:
            return False
    return True


@pytest.mark.parametrize("page", [p for p in pages() if any(b.language in RUN for b in blocks(p))], ids=lambda p: p.name)
def test_blocks_run(page: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FILES:
        if name != "my-lvlm-int3" or page.name not in WRITES_INT3:
            copy = shutil.copytree if (prepared / name).is_dir() else shutil.copy
            copy(prepared / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    printed = ""
    for block in blocks(page):
        if block.language == "python":
            names |= {name: make() for name, make in NAMES.get(page.name, {}).items()}
            printed = python(block, names)
        elif block.language == "bash":
            printed = bash(block)
        elif block.language == "text" and block.info == PRINTS:
            assert said(printed, block.body), f"{block}: not what was printed:\n{printed}"


@pytest.mark.parametrize("page", [p for p in pages() if any(b.language in ("yaml", "json", "jsonl") for b in blocks(p))], ids=lambda p: p.name)
def test_data_blocks_are_read(page: Path, prepared: Path, tmp_path: Path) -> None:
    """YAML is a recipe, JSON a file of samples all of which are good."""
    for name in ("dog.jpg", "cat.jpg", "images"):
        (tmp_path / name).symlink_to(prepared / name)
    for number, block in enumerate(blocks(page)):
        if block.language == "yaml":
            recipe.recipe(yaml.safe_load(block.body))
        elif block.language in ("json", "jsonl"):
            path = tmp_path / f"{number}.{block.language}"
            path.write_text(block.body)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = read_samples(path)
            rows = len(block.body.splitlines()) if block.language == "jsonl" else len(found)
            assert len(found) == rows, block


def test_every_block_says_what_it_is() -> None:
    every = [block for page in pages() for block in blocks(page)]

    assert len(every) > 40
    assert {b.language for b in every} <= LANGUAGES, [str(b) for b in every if b.language not in LANGUAGES]
    for page in pages():  # a fence that is not closed would hide what follows it
        assert len(re.findall(r"^[ \t]*(?:```|~~~)", page.read_text(), re.MULTILINE)) == 2 * len(blocks(page)), page


def test_blocks_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong name, a wrong flag, a wrong key, a command that is none, another output: each is noticed."""
    page = tmp_path / "page.md"

    def block(language: str, body: str) -> Block:
        return Block(ROOT / page.name, 7, language, "", body)

    monkeypatch.chdir(tmp_path)
    with pytest.raises(NameError):
        python(block("python", "no_such_name\n"), {})
    for line in ("torchao-qig quantize absent --no-such-flag\n", "torchao-qig plan absent\n", "pip install x\n"):
        with pytest.raises(AssertionError):
            bash(block("bash", line))
    with pytest.raises(AssertionError, match="no such file"):
        bash(block("bash", "bash scripts/absent\n"))
    with pytest.raises(ValueError, match="no such setting"):
        recipe.recipe(yaml.safe_load("dampening: 1"))
    assert said("a 1 b\nx\nlast\n", "a ... b\n...\nlast\n")
    assert not said("a 1 b\n", "a ... c\n")
    assert not said("one\ntwo\n", "two\none\n")


def test_fences_are_found(tmp_path: Path) -> None:
    page = DOCS / "none.md"
    text = 'a\n\n```python\nx = 1\n```\n\n1. b\n\n    ```text title="prints"\n    out\n\n    put\n    ```\n'
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Path, "read_text", lambda self, **_: text)
        first, second = blocks(page)

    assert (first.line, first.language, first.body) == (4, "python", "x = 1\n")
    assert (second.language, second.info, second.body) == ("text", PRINTS, "out\n\nput\n")
    assert commands("a b \\\n  c  # d\n\n# e\nf\n") == ["a b    c  # d", "f"]
