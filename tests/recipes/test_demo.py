"""The demo from the command line, on the model before its training."""

import sys
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import recipes.demo
from tests.untrained import small
from torchao_qig_cli import app


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes.demo, "load", small)


def test_demo() -> None:
    done = CliRunner().invoke(app, ["demo", "--bits", "2", "--samples", "8", "--pictures", "12", "--no-speed"], catch_exceptions=False)
    assert done.exit_code == 0
    rows = {line[:15].strip(): line[15:].split() for line in done.stdout.splitlines() if line.startswith(("full", "W2")) and "%" in line}
    assert list(rows) == ["full precision", "W2 rounded", "W2 QIG scales", "W2 default"]
    kl = {name: float(row[2]) for name, row in rows.items()}
    size = {name: float(row[3]) for name, row in rows.items()}
    assert kl["full precision"] == 0 < min(value for name, value in kl.items() if name != "full precision")
    assert size["W2 default"] == pytest.approx(size["W2 rounded"], abs=0.02)
    assert size["W2 default"] < size["full precision"] / 6
    assert "(right: " in done.stdout
    assert "logits bit-identical" in done.stdout
    with Image.open("demo.png") as picture:
        assert picture.size == (448, 448)


def test_advice_without_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "recipes.demo", None)  # type: ignore[arg-type]
    done = CliRunner().invoke(app, ["demo"])
    assert done.exit_code == 2
    assert "run it from a clone" in done.output
