"""One quantized directory for all tests of the report, and copies of it that a test may damage."""

import shutil
from pathlib import Path

import pytest

from tests.report.made import quantized_directory
from torchao_qig import report
from torchao_qig.report import figures


@pytest.fixture(scope="session")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized_directory(tmp_path_factory.mktemp("quantized") / "tiny")


@pytest.fixture(scope="session")
def page(complete: Path) -> Path:
    return report.write(complete)


@pytest.fixture
def copied(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete / "qig", tmp_path / "copy" / "qig", ignore=shutil.ignore_patterns("report"))).parent


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what does not depend on them: drawing is what takes the time."""
    monkeypatch.setattr(figures, "_written", lambda figure, name, alt, directory: figures.Drawn(name, figures.Markup("<svg></svg>"), alt))
