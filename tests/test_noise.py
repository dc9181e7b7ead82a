"""What torchao says when it is imported, and no user can do anything about, reaches no user; all else does."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny_dirs
from torchao_qig import _compat

NOISE = {  # of torchao 0.18, by logger
    "torchao": ("Failed to load %s: %s", "/a b/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so", "Could not load this library:\n/a b"),
    "torch.utils._pytree": ("%s is an Enum subclass and is now natively supported ...", "<enum 'KernelPreference'>"),
}
SAID = ("Failed to load", "is an Enum subclass")
LOGGING = """
import logging, torch
def found():
    loggers = map(logging.getLogger, ["", "torchao", "torch", "torch.utils", "torch.utils._pytree"])
    return logging.root.manager.disable, [(one.level, one.disabled, one.propagate, *one.handlers, *one.filters) for one in loggers]
before = found()
import torchao_qig
print(found() == before)
"""


class Heard(logging.Handler):
    """The loggers and the first values of what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[str, object]] = []

    def emit(self, record: logging.LogRecord) -> None:
        assert isinstance(record.args, tuple)
        self.records.append((record.name, record.args[0]))


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, object]]:
    handler = Heard()
    for name in (*NOISE, "mine"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [handler])
    return handler.records


@pytest.mark.parametrize("name", NOISE)
def test_only_these_messages_and_only_meanwhile(name: str, heard: list[tuple[str, object]]) -> None:
    logger = logging.getLogger(name)
    filters = list(logger.filters)
    with _compat.quiet():
        logger.warning(*NOISE[name])
        logger.warning("Failed to load %s: %s", "torchao/_C.abi3.so", "Could not load this library")
        logger.warning("%s is an Enum subclass", "<enum 'Mine'>")
        logging.getLogger("mine").warning(*NOISE[name])
    logger.warning(*NOISE[name])
    assert heard == [(name, "torchao/_C.abi3.so"), (name, "<enum 'Mine'>"), ("mine", NOISE[name][1]), (name, NOISE[name][1])]
    assert logger.filters == filters


def test_an_import_that_fails_leaves_no_filter() -> None:
    before = [list(logging.getLogger(name).filters) for name in NOISE]
    with pytest.raises(ImportError), _compat.quiet():
        raise ImportError
    assert [logging.getLogger(name).filters for name in NOISE] == before


def stderr(*words: str) -> str:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stderr


def test_of_the_library() -> None:
    done = subprocess.run([sys.executable, "-c", LOGGING], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert not any(part in done.stderr for part in SAID)


def test_of_the_command_line(tmp_path: Path) -> None:
    model = tiny_dirs.directory("llava_onevision", tmp_path / "model")
    said = stderr("-m", "torchao_qig_cli", "plan", str(model), "--group-size", "64")
    assert not any(part in said for part in SAID)


@pytest.mark.parametrize("words", [("-c", "import recipes.demo"), ("-m", "recipes.evaluate", "--help"), ("-m", "recipes.methods")], ids=" ".join)
def test_of_the_recipes(words: tuple[str, ...]) -> None:
    """Those import transformers or torchao first, of themselves."""
    assert not any(part in stderr(*words) for part in SAID)
