"""What the command line says when something is wrong, and its exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import GPT2Config, GPT2LMHeadModel

import torchao_qig.lvlm.check
import torchao_qig.lvlm.quantize
from tests.test_cli import leftovers, quantize, run
from tests.tiny_dirs import PROCESSORS
from torchao_qig.errors import UserError, UserFileError, UserTypeError
from torchao_qig.lvlm import recipe
from torchao_qig.lvlm.pictures import BadRow


def _no_linears(folder: Path) -> None:
    """GPT-2's products are modules of its own kind."""
    shutil.rmtree(folder / "model")
    tokens = dict(bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=200, **tokens)).save_pretrained(folder / "model")
    PROCESSORS["qwen2"]().save_pretrained(folder / "model")
    (folder / "words.txt").write_text("one two three\n\nfour five six")


def _other_weights(folder: Path) -> None:
    """Those of a model with one block less."""
    config = json.loads((folder / "model" / "config.json").read_text())
    config["text_config"] |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (folder / "model" / "config.json").write_text(json.dumps(config))


def _corrupt(folder: Path) -> None:
    for i in range(10):
        (folder / "images" / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")


def _no_images(folder: Path) -> None:
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()


def _strings(folder: Path) -> None:
    (folder / "coco.jsonl").write_text('"just a string"\n"another"\n')


def _broken_weights(folder: Path) -> None:
    data = (folder / "model" / "model.safetensors").read_bytes()
    (folder / "model" / "model.safetensors").write_bytes(data[: len(data) // 2])


def _no_table(folder: Path) -> None:
    (folder / "rows.parquet").write_bytes(b"PAR1 and nothing else")


WRONG: dict[str, tuple[Callable[[Path], object] | None, dict[str, Any], list[str], list[str]]] = {
    # what is done to the folder, arguments, flags, what the message says
    "no such model": (None, {"model": "modle"}, [], ["model='modle'", "no such directory"]),
    "no config in it": (None, {"model": "images"}, [], ["model='images'", "no config.json"]),
    "no such samples": (None, {"calib": "coko.jsonl"}, [], ["coko.jsonl"]),
    "no such images": (None, {"images": "picutres"}, [], ["images='picutres'", "no such folder"]),
    "no linears": (_no_linears, {"calib": "words.txt"}, [], ["nothing to quantize in GPT2LMHeadModel"]),
    "weights missing": (_other_weights, {}, [], ["model='model'", "layers.2"]),
    "images missing": (_no_images, {}, [], ["image missing", "coco.jsonl:"]),
    "images corrupt": (_corrupt, {}, [], ["image unreadable", "coco.jsonl:"]),
    "empty samples": (lambda f: (f / "coco.jsonl").write_text(""), {}, [], ["calib='coco.jsonl'", "empty"]),
    "samples are strings": (_strings, {}, [], ["coco.jsonl:1"]),
    "group size does not divide": (None, {}, ["--group-size", "96"], ["group_size=96 does not divide"]),
    "group size no multiple of 16": (None, {}, ["--group-size", "10"], ["group_size=10"]),
    "no bits": (None, {}, ["--bits", "0"], ["bits=0"]),
    "too many bits": (None, {}, ["--bits", "9"], ["bits=9"]),
    "no such setting": (None, {}, ["--set", "group=64"], ["group: no such setting", "group_size"]),
    "setting without a value": (None, {}, ["--set", "budget"], ["--set 'budget': write key=value"]),
    "wrong value": (None, {}, ["--set", "steps=[{compensate: {sweeps: many}}]"], ["sweeps='many'"]),
    "wrong method": (None, {}, ["--method", "attention"], ["method='attention': pass one of default, rtn, awq"]),
    "wrong sensitivity": (None, {}, ["--set", "steps=[{equalize: {sensitivity: attention}}]"], ["sensitivity='attention'"]),
    "an option of before": (None, {}, ["--sensitivity", "qig"], ["--sensitivity is --method now"]),
    "a setting of before": (None, {}, ["--set", "clip=true"], ["clip: is a setting of a step now", "method: NAME"]),
    "wrong dtype": (None, {}, ["--dtype", "int8"], ["dtype='int8'"]),
    "wrong device": (None, {}, ["--device", "gpu0"], ["device='gpu0'"]),
    "no such part": (None, {}, ["--modules", "visual"], ["no module 'visual'"]),
    "all too long": (None, {}, ["--max-length", "5"], ["none of"]),
    "no such file": (None, {}, ["--config", "absent.yaml"], ["config='absent.yaml'"]),
    "no YAML": (lambda f: (f / "x.yaml").write_text("a: [1"), {}, ["--config", "x.yaml"], ["x.yaml", "not a YAML file"]),
    "device not here": (None, {}, ["--device", "hpu"], ["device='hpu'"]),
    "no text": (lambda f: (f / "x.yaml").write_text("prompt: 7"), {}, ["--config", "x.yaml"], ["prompt=7"]),
    "output is here": (None, {"output": "."}, [], ["output='.'", "exists already"]),
    "output exists": (lambda f: (f / "out").write_text("mine"), {}, [], ["output='out'", "exists already"]),
    "damaged table": (_no_table, {"calib": "rows.parquet"}, [], ["calib='rows.parquet'", "cannot load it"]),
    "odd config.json": (lambda f: (f / "model" / "config.json").write_text("[]"), {}, [], ["model='model'", "cannot load its "]),
    "a list for a text": (lambda f: (f / "x.yaml").write_text("dtype: [float32]"), {}, ["--config", "x.yaml"], ["dtype=['float32']: pass a text"]),
    "weights cut short": (_broken_weights, {}, [], ["model='model'", "cannot load its weights"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_people_get_wrong(here: Path, case: str) -> None:
    """One line that names the argument, exit code 2, and nothing left behind."""
    change, arguments, flags, said = WRONG[case]
    if change is not None:
        change(here)
    before = leftovers(here)
    done = quantize(*flags, **arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    error = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, done.output
    assert all(part in error[0] for part in said), error[0]
    assert leftovers(here) == before


DEFECTS = [KeyError("model.layers.3"), TypeError("'int' object is not iterable"), IndexError("list index out of range"), ValueError("too many values"),
           RuntimeError("shapes"), AttributeError("x"), AssertionError()]  # fmt: skip


PLACES = {
    "plan": ("torchao_qig.lvlm.recipe.recipe", ["plan", "model"]),
    "quantize": ("torchao_qig.lvlm.quantize.calibration_batches", None),
    "evaluate": ("torchao_qig.lvlm.evaluate.read_samples", ["evaluate", "model", "--data", "coco.jsonl"]),
    "bench": ("torchao_qig.lvlm.bench._Process", ["bench", "model", "--no-compile"]),
    "report": ("torchao_qig.report.write", ["report", "model"]),
}


@pytest.mark.parametrize("command", PLACES)
@pytest.mark.parametrize("error", DEFECTS, ids=lambda error: type(error).__name__)
def test_what_we_get_wrong(here: Path, command: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback and exit code 1, never a line that blames the input, whatever the class of the error."""
    place, words = PLACES[command]

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(place, broken)
    done = quantize() if words is None else run(*words)
    assert done.exit_code == 1
    assert done.exception is error
    assert "error: " not in done.output


def test_exit_codes_by_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the class alone: what the text says counts for nothing."""

    def code(error: BaseException) -> int:
        def failing(*args: Any) -> Any:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(recipe, "recipe", failing)
            return run("plan", "m=1").exit_code

    class BrokenModel(RuntimeError):
        """Of another, with the name of ours."""

    assert code(UserError("bits=9")) == code(UserTypeError("x")) == code(UserFileError("no sign of an argument")) == 2
    assert code(BadRow("image missing", "x.png")) == 2
    assert code(torchao_qig.lvlm.check.BrokenModel("NaN")) == 3
    assert code(BrokenModel("NaN")) == 1
    assert code(FileNotFoundError(2, "No such file", "a=b")) == code(PermissionError(13, "x")) == code(SafetensorError("I/O error")) == 4
    assert code(MemoryError()) == code(torch.OutOfMemoryError("CUDA out of memory")) == code(RuntimeError("can't allocate memory: you tried")) == 5
    assert code(UserError("prompt='allocate memory'")) == 2
    assert code(ValueError("model='m': allocate memory")) == code(LookupError("x=1")) == 1
    assert code(KeyboardInterrupt()) == 130


def test_the_traceback_of_any_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHAO_QIG_TRACEBACK", "1")
    done = run("plan", "absent/model/at/all")
    assert done.exit_code == 1
    assert isinstance(done.exception, UserFileError)


@pytest.mark.parametrize(
    "error, stays", [(UserError("modules=['x']: no such"), False), (KeyError("layers.3"), True), (ValueError("x"), True), (OSError("x"), True)]
)
def test_what_an_error_leaves_behind(here: Path, error: Exception, stays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After one of ours, and of the system, the blocks that are done are still there, for a try with --resume; after a user's nothing is."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(torchao_qig.lvlm.quantize, "quantize_", broken)
        quantize()
    assert leftovers(here) == (["out.partial"] if stays else [])
    if stays:
        assert list(Path("out.partial/blocks").iterdir())
        assert quantize("--resume").exit_code == 0
        assert leftovers(here) == ["out"]


def test_missing_arguments(here: Path) -> None:
    done = run("quantize", "model")
    assert (done.exit_code, "calib, output: not given" in done.output) == (2, True)
    assert run("quantize").exit_code == 2
    assert "nothing to evaluate on" in run("evaluate", "model").output


@pytest.mark.parametrize("old", [["--reference", "model"], ["--reference=model"]], ids=["two words", "one word"])
def test_the_old_name_of_against(old: list[str]) -> None:
    """One line that says what it is called now."""
    done = run("evaluate", "out", "--data", "coco.jsonl", *old)
    assert done.exit_code == 2
    assert done.output == "error: --reference is called --against, as in bench\n"
    assert "--reference" not in run("evaluate", "--help").output
