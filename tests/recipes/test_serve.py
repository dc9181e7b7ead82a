"""recipes/serve.py from the command line."""

import re
import sys
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from recipes import serve as recipe
from tests import tiny_dirs
from torchao_qig.lvlm import serve
from torchao_qig.lvlm.load import load_model, load_processor

APP = typer.Typer()
APP.command()(recipe.main)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_dirs.directory("llava_onevision", tmp_path_factory.mktemp("model")))


def test_one_question(directory: str, tmp_path: Path) -> None:
    shown = tmp_path / "dog.png"
    Image.new("RGB", (30, 40), "brown").save(shown)
    arguments = [directory, "--image", str(shown), "--question", "What is it?", "--max-new-tokens", "7", "--no-compile"]
    done = CliRunner().invoke(APP, arguments, catch_exceptions=False)
    expected = "".join(serve.answer(load_model(directory), load_processor(directory), shown, "What is it?", 7))
    assert done.stdout == expected + "\n"
    assert re.search(r"\d tokens, \d+\.\d per second", done.stderr)


def test_questions_from_standard_input(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, which is said; up to an empty line; every question as if it were the first."""
    calls: list[object] = []
    monkeypatch.setattr(serve, "compiled", lambda model, length: calls.append(length) or model)
    monkeypatch.setattr(serve, "warm_up", lambda *_: 3.0)
    done = CliRunner().invoke(APP, [directory, "--max-new-tokens", "5", "--max-length", "99"], input="Hello\nWho?\nHello\n\nno more\n", catch_exceptions=False)
    first, second, third = done.stdout.splitlines()
    assert first == third != second
    assert calls == [99]
    assert "compiled in 3 s" in done.stderr


def test_the_module_runs() -> None:
    assert recipe.main.__module__ in sys.modules
    done = CliRunner().invoke(APP, ["nowhere/at/all", "--question", "What?"])
    assert done.exit_code == 1
    assert isinstance(done.exception, FileNotFoundError)
