"""The bench: figures of the processes that measure, what becomes of them, and what is said when one fails."""

import json
import platform
import sys
from argparse import Namespace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch._dynamo.utils import counters
from torchao.quantization import quantize_

import torchao_qig
from tests import tiny_dirs, tiny_models
from torchao_qig import PackedIntWeightOnlyConfig
from torchao_qig.errors import UserError
from torchao_qig.lvlm import bench, serve
from torchao_qig.lvlm.card import bench_table
from torchao_qig.lvlm.load import load_model

CONFIG = PackedIntWeightOnlyConfig(bits=3, group_size=64)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dirs.directory("llava_onevision", tmp_path_factory.mktemp("full") / "seeing")


@pytest.fixture(scope="module")
def packed(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "seeing-int3"
    model = load_model(str(full), "bfloat16")
    quantize_(model.get_decoder().layers, CONFIG)
    torchao_qig.save_pretrained(model, path, CONFIG)
    tiny_dirs.PROCESSORS["llava_onevision"]().save_pretrained(path)
    return path


def test_two_checkpoints(full: Path, packed: Path, tmp_path: Path) -> None:
    """All figures, one row for each, and the process that asks is in none of them."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    held = torch.ones(2**28)  # 1 GiB here is none of theirs, though Linux hands ru_maxrss on to them
    found = bench.bench(
        packed, full, prompt_tokens=90, new_tokens=5, repeats=3, threads=1, device="cpu", image=tmp_path / "red.png", compiled=False, against_dtype="auto"
    )
    assert held.sum() > 0
    ours, theirs = found["rows"]
    assert (ours["name"], theirs["name"]) == ("seeing-int3", "seeing")
    assert (ours["dtype"], theirs["dtype"]) == ("int3 in bfloat16", "float32")
    for row, path in ((ours, packed), (theirs, full)):
        assert row["bytes_on_disk"] == (path / "model.safetensors").stat().st_size
        assert row["prefill_tokens_per_second"] == pytest.approx(row["prompt_tokens"] / row["first_token_seconds"])
        assert 80 <= row["prompt_tokens"] <= 100
        assert min(row[key] for key in ("load_seconds", "warm_up_seconds", "first_token_seconds", "decode_tokens_per_second")) > 0
        assert row["peak_bytes"] > 2**27
        assert row["peak_bytes"] < 2**30 or platform.system() != "Linux"
    assert found["ratios"]["bytes_on_disk"] == ours["bytes_on_disk"] / theirs["bytes_on_disk"] < 1
    assert found["machine"]["threads"] == 1
    assert found["machine"]["torch"] == torch.__version__
    assert json.loads(json.dumps(found)) == found


def test_what_a_process_does(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles all before it says that it is ready, then answers a round per line."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # guards without kernels
    said: list[dict[str, Any]] = []
    compiled: list[int] = []

    def say(facts: dict[str, Any]) -> None:
        said.append(facts)
        compiled.append(counters["stats"]["unique_graphs"])

    counters.clear()
    monkeypatch.setattr(sys, "stdin", StringIO("\n\n"))
    options = {"prompt_tokens": 70, "new_tokens": 9, "threads": 1, "device": "cpu", "dtype": "auto", "image": None, "compiled": True}
    bench._child(Namespace(directory=str(full), **options), say)
    ready, *rounds, peak = said
    assert ready["dtype"] == "float32"
    assert abs(ready["prompt_tokens"] - 70) <= len(bench.FILLER)
    assert compiled == [2] * 4  # a prompt, a token
    assert all(set(one) == {"first_token_seconds", "decode_tokens_per_second"} for one in rounds)
    assert len(rounds) == 2
    assert peak["peak_bytes"] > 0


def test_a_failed_process_says_why(tmp_path: Path) -> None:
    directory = tiny_dirs.directory("qwen2", tmp_path / "text")
    (directory / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"^model='.*text': cannot load its weights"):
        bench.bench(directory, device="cpu", compiled=False)


def test_a_process_that_breaks_says_its_last_words(full: Path, tmp_path: Path) -> None:
    """A picture that is none is only found by the process."""
    (tmp_path / "none.png").write_text("no picture")
    with pytest.raises(RuntimeError, match=r"(?s)ended with code 1; the last it said:\n.*cannot identify image file"):
        bench.bench(full, device="cpu", compiled=False, image=tmp_path / "none.png")


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"directory": "nowhere"}, FileNotFoundError, "model='nowhere': no checkpoint there"),
        ({"against": "nowhere"}, FileNotFoundError, "against='nowhere': no checkpoint there"),
        ({"image": "nowhere.png"}, FileNotFoundError, "image='nowhere.png'"),
        ({"new_tokens": 1}, ValueError, "new_tokens=1: pass at least 2"),
        ({"repeats": 0}, ValueError, "repeats=0: pass at least 1"),
        ({"prompt_tokens": 0}, ValueError, "prompt_tokens=0"),
        ({"threads": -2}, ValueError, "threads=-2"),
        ({"device": "gpu0"}, UserError, "device='gpu0'"),
    ],
)
def test_errors_come_before_any_process(full: Path, options: dict[str, Any], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_Process", None)
    with pytest.raises(error, match=message):
        bench.bench(**{"directory": full, "device": "cpu", **options})


def test_a_missing_compiler_comes_before_any_process(full: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_Process", None)
    monkeypatch.setattr(serve.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"C\+\+ compiler.*--no-compile"):
        bench.bench(full, device="cpu")


@hypothesis.settings(max_examples=40)
@given(st.integers(30, 2000))
def test_prompts_are_about_as_long_as_wanted(tokens: int) -> None:
    found = bench.prompt_inputs(MODEL, WORDS, None, tokens)["input_ids"].shape
    assert found[0] == 1
    assert abs(found[1] - tokens) <= len(bench.FILLER)


MODEL, WORDS = tiny_models.qwen2()[0], tiny_dirs.text()


def row(name: str, **other: float) -> dict[str, Any]:
    figures = {
        "bytes_on_disk": 3 * 2**20, "load_seconds": 1.0, "warm_up_seconds": 2.0, "first_token_seconds": 0.5, "prefill_tokens_per_second": 200.0,
        "decode_tokens_per_second": 30.0, "peak_bytes": 3 * 2**30,
    }  # fmt: skip
    return {"name": name, "dtype": "bfloat16", **figures, **other}


def test_the_table() -> None:
    ratios = dict.fromkeys(bench.RATIOS, 2.0) | {"decode_tokens_per_second": 3.25}
    lines = bench_table({"rows": [row("a|b"), row("b", decode_tokens_per_second=8.04)], "ratios": ratios}).splitlines()
    assert lines[2] == "| a\\|b | bfloat16 | 3.0 MiB | 1.0 | 2.0 | 0.500 | 200 | 30.0 | 3.00 GiB |"
    assert lines[3].split(" | ")[7] == "8.0"
    assert lines[4] == "| ratio |  | 2.00 |  |  | 2.00 | 2.00 | 3.25 | 2.00 |"
    assert {line.count(" |") for line in [*lines[:2], *lines[3:]]} == {9}
    assert len(bench_table({"rows": [row("a")], "ratios": {}}).splitlines()) == 3


def test_the_result_is_noted_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    result = {"rows": [row("x")], "ratios": {}}
    monkeypatch.setattr(bench, "bench", lambda *a, **k: asked.append((a, k)) or result)
    monkeypatch.setattr("torchao_qig.lvlm.card.text", lambda directory, name: asked.append(directory) or f"about {name}")
    assert bench.run(str(tmp_path), "full", new_tokens=7) == bench_table(result)
    assert asked == [((str(tmp_path), "full"), {"new_tokens": 7})]
    (tmp_path / "qig").mkdir()
    (tmp_path / "qig" / "receipt.json").write_text("{}")
    bench.run(str(tmp_path))
    assert asked[-1] == tmp_path
    assert json.loads((tmp_path / "qig" / "bench.json").read_text()) == result
    assert (tmp_path / "README.md").read_text() == f"about {tmp_path.name}"
