"""What operating systems spell differently: peak memory, locks, and modules that only some of them have."""

from __future__ import annotations

import ast
import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import torchao_qig
import torchao_qig_cli
from torchao_qig import system
from torchao_qig.errors import UserError, UserFileError, UserTypeError

PACKAGE = Path(torchao_qig.__file__).parent
OF_UNIX = ("resource", "fcntl", "grp", "pwd", "termios")
OF_WINDOWS = ("msvcrt", "winreg")
IMPORTED = ("torchao_qig", "torchao_qig_cli", "torchao_qig.calls", "torchao_qig.calibration.run", "torchao_qig.lvlm.quantize", "torchao_qig.lvlm.bench")


def test_imports_without_what_only_unix_has() -> None:
    check = f"import sys; sys.modules.update(dict.fromkeys({OF_UNIX}))\nimport {', '.join(IMPORTED)}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted([*PACKAGE.rglob("*.py"), Path(torchao_qig_cli.__file__)]), ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_module_of_one_system_is_imported_at_the_top(path: Path) -> None:
    """Inside functions they may be, where the system is known."""
    tree = ast.parse(path.read_text())
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if id(node) not in inside and isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not {name.split(".")[0] for name in names} & {*OF_UNIX, *OF_WINDOWS, "psutil"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_on_linux() -> None:
    """It grows with what is held, stays when that is let go, and is the process's own: one that it starts begins anew."""
    before = system.peak_host_bytes()
    held = np.ones(before // 8 + 2**25)  # as much again, and 256 MiB
    peak = system.peak_host_bytes()
    assert before < held.nbytes < peak < before + 2 * held.nbytes
    del held
    assert system.peak_host_bytes() > 0.99 * peak  # the kernel counts in batches
    check = f"import importlib.util as u; s = u.spec_from_file_location('system', {system.__file__!r}); m = u.module_from_spec(s);"
    done = subprocess.run([sys.executable, "-c", f"{check} s.loader.exec_module(m); print(m.peak_host_bytes())"], capture_output=True, text=True, check=True)
    assert 2**20 < int(done.stdout) < 2**27 < peak


@pytest.mark.parametrize("name, unit", [("darwin", 1), ("freebsd14", 1024), ("linux", 1024)])
def test_peak_without_proc(name: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """ru_maxrss is in bytes on macOS, and in KiB on the others."""
    usage = SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: SimpleNamespace(ru_maxrss=3 * 2**20))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "platform", name)
        patched.setitem(sys.modules, "resource", usage)  # type: ignore[arg-type]
        patched.setattr(system, "Path", lambda path: PACKAGE / "absent")
        found = system.peak_host_bytes()
    assert found == 3 * 2**20 * unit


def test_peak_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `resource`, and without looking for /proc."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=12345, rss=1))
    with monkeypatch.context() as patched:
        patched.setattr(sys, "platform", "win32")
        patched.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))  # type: ignore[arg-type]
        patched.setitem(sys.modules, "resource", None)  # type: ignore[arg-type]
        patched.setattr(system, "Path", None)
        found = system.peak_host_bytes()
    assert found == 12345


def test_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert system.out_of_memory(caught.value)
    assert system.out_of_memory(MemoryError())
    assert system.out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert system.out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    others = [RuntimeError("shapes"), OSError(errno.ENOSPC, "No space left"), UserError("prompt='allocate memory'"), KeyError("allocate memory")]
    assert not any(map(system.out_of_memory, others))


@pytest.mark.parametrize("kind, plain", [(UserError, ValueError), (UserTypeError, TypeError), (UserFileError, FileNotFoundError)])
def test_errors_of_users(kind: type[UserError], plain: type[Exception]) -> None:
    """They are what they were before there was a class for them, and say their message only."""
    error = kind("path='x': no path=", "path")
    assert isinstance(error, plain)
    assert isinstance(error, UserError)
    assert str(error) == "path='x': no path="
    assert (type(error.called("calib")), str(error.called("calib"))) == (kind, "calib='x': no path=")
    assert str(kind("bits=3")) == "bits=3"
