"""Checkpoints that are damaged, or cannot be loaded or saved: each is an error that says so."""

import json
import logging
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

import torchao_qig
from tests.test_checkpoints import quantized
from tests.tiny_models import qwen2


def header(path: Path) -> tuple[int, dict[str, Any]]:
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return 8 + size, json.loads(raw[8 : 8 + size])


def flip_bit(path: Path, part: str) -> None:
    """One bit in the first packed weight's `part`."""
    start, tensors = header(path)
    name = next(k for k in sorted(tensors) if k.endswith(f"layers.0.mlp.up_proj._weight_{part}"))
    raw = bytearray(path.read_bytes())
    raw[start + tensors[name]["data_offsets"][0] + 6] ^= 4
    path.write_bytes(raw)


def edit_description(path: Path, **changes: int) -> None:
    """Other attributes for the first packed weight."""
    start, tensors = header(path)
    described = tensors["__metadata__"]
    name = next(k for k in sorted(described) if k.endswith("layers.0.mlp.up_proj.weight"))
    attributes = json.loads(described[name])
    attributes["_data"].update(changes)
    described[name] = json.dumps(attributes)
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + path.read_bytes()[start:])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: flip_bit(f, "qdata"), "damaged"), (lambda f: flip_bit(f, "scale"), "damaged"), (lambda f: flip_bit(f, "zero_point"), "damaged"),
        (lambda f: edit_description(f, bits=4), "expected int32"), (lambda f: edit_description(f, rows=512), "expected int32"),
        (lambda f: edit_description(f, group_size=32), "scale: expected shape"), (lambda f: edit_description(f, layout_version=2), "layout_version=2"),
        (truncate, "not fully covered"),
    ],
)  # fmt: skip
def test_damaged_checkpoint_is_an_error(damage: Callable[[Path], None], words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Never silently wrong weights; the reason stands in the error or in transformers' report."""
    model, _ = qwen2()
    torchao_qig.save_pretrained(quantized(model), tmp_path)
    damage(tmp_path / "model.safetensors")
    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING), pytest.raises(Exception) as error:  # noqa: B017, PT011 - the loader chooses the class
            Qwen2ForCausalLM.from_pretrained(tmp_path)
    finally:
        transformers_logging.disable_propagation()
    assert words in f"{error.value} {caplog.text}"


def test_damaged_torch_file_is_an_error(tmp_path: Path) -> None:
    """torch.load of a file with one flipped bit."""
    model, _ = qwen2()
    torch.save(quantized(model).state_dict(), tmp_path / "weights.pt")
    raw = bytearray((tmp_path / "weights.pt").read_bytes())
    raw[bytes(raw).index(model.model.layers[0].mlp.up_proj.weight.qdata.numpy().tobytes()) + 6] ^= 4
    (tmp_path / "weights.pt").write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        torch.load(tmp_path / "weights.pt", weights_only=True)


def test_loading_without_our_import_says_so(tmp_path: Path) -> None:
    """transformers' own message; the README names the cure."""
    model, _ = qwen2()
    torchao_qig.save_pretrained(quantized(model), tmp_path)
    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert "Failed to find class PackedIntWeightOnlyConfig" in failed.stderr
    subprocess.run([sys.executable, "-c", f"import torchao_qig; {code}"], capture_output=True, check=True)


@pytest.mark.parametrize(
    ("model", "error", "words"), [(lambda: torch.nn.Linear(4, 4), TypeError, "transformers models"), (lambda: qwen2()[0], ValueError, "no packed weight")]
)
def test_save_refuses_what_it_cannot_save(model: Callable[[], Any], error: type[Exception], words: str, tmp_path: Path) -> None:
    """And writes nothing."""
    with pytest.raises(error, match=words):
        torchao_qig.save_pretrained(model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
