"""The command that a receipt names does again what was done, whoever called."""

from __future__ import annotations

import inspect
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import torchao_qig.lvlm.bench
import torchao_qig.lvlm.evaluate
import torchao_qig.lvlm.quantize
from torchao_qig.errors import UserError
from torchao_qig.lvlm import command
from torchao_qig.lvlm.recipe import Recipe, keys, recipe
from torchao_qig.methods.presets import PRESETS
from torchao_qig_cli import app

TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")) | st.just("\n"), min_size=1, max_size=8)
PLACES = st.sampled_from(["model", "-model", "--", "a b/'c'", "$HOME", "own/er", "ä\n#", "3", "null", "a: b"]) | TEXT
SENSITIVITIES = st.sampled_from(["qig", "modality", "uniform", {"modality": {"ratio": {"visual": 1e-5, "b": 2.0}}}, {"qig": {"points": 2}}])
EQUALIZE = st.fixed_dictionaries({}, optional={
    "sensitivity": SENSITIVITIES, "loss": st.sampled_from(["mae", "mse"]), "grid": st.integers(1, 40), "fold": st.booleans(), "pre_scale": st.booleans(),
})  # fmt: skip
COMPENSATE = st.fixed_dictionaries({}, optional={"damping": st.floats(0, 1), "repair": st.floats(0, 1), "clip": st.booleans()})
STEPS = st.tuples(EQUALIZE.map(lambda own: [{"equalize": own}]), st.just([]) | COMPENSATE.map(lambda own: [{"compensate": own}])).map(
    lambda two: two[0] + two[1]
)
STEPS |= st.sampled_from([[], ["compensate"], [{"smooth": {"alpha": 0.25}}, "clip"]])
SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "bits": st.integers(1, 8) | st.just({"a.b": 3, "c: d": 16}), "group_size": st.sampled_from([-1, 16, 64, 128]), "symmetric": st.booleans(),
    "images": PLACES, "split": PLACES, "revision": PLACES, "prompt": PLACES, "samples": st.integers(1, 999), "seed": st.integers(-3, 9),
    "few_shot": st.integers(0, 3), "interleaved": st.integers(1, 3), "tokens": st.integers(1, 9000), "max_length": st.none() | st.integers(1, 99),
    "dtype": st.sampled_from(["auto", "bfloat16"]), "device": st.sampled_from([None, "cpu"]), "int8_activations": st.booleans(),
    "explain": st.integers(0, 9), "max_kl": st.floats(0, allow_nan=False), "modules": st.none() | st.lists(PLACES, max_size=3),
    "method": st.none() | st.sampled_from(sorted(PRESETS)), "steps": st.none() | STEPS,
    "compute_dtype": st.sampled_from([None, "float32"]), "max_host_memory": st.none() | st.integers(0, 2**40),
}  # fmt: skip


def heard(monkeypatch: pytest.MonkeyPatch, module: Any, line: str) -> list[Any]:
    """What the command line hands on when it is given this command."""
    calls: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(module, "run", lambda *args, **kwargs: calls.append((args, kwargs)) or "")
        name, *words = shlex.split(line)
        done = CliRunner().invoke(app, words)
    assert name == "torchao-qig"
    assert done.exit_code == 0, f"{line}: {done.output}"
    return calls[0]


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    chosen = draw(st.lists(st.sampled_from(sorted(SETTINGS)), unique=True, max_size=7))
    given: dict[str, Any] = {"model": draw(PLACES), "output": draw(PLACES), "calib": draw(PLACES), **{key: draw(SETTINGS[key]) for key in chosen}}
    known = keys(bool(given.get("int8_activations")))
    try:
        return recipe({key: value for key, value in given.items() if key in known})
    except UserError:
        return recipe({key: given[key] for key in ("model", "output", "calib")})


@given(wanted=recipes())
def test_quantize_again(wanted: Recipe) -> None:
    """The same recipe, and nothing named in vain."""
    line = command.quantizing(wanted)
    with pytest.MonkeyPatch.context() as patched:
        args, _ = heard(patched, torchao_qig.lvlm.quantize, line)
    assert command.meaning(args[0]) == command.meaning(wanted)
    again = {f.name: getattr(args[0], f.name) for f in fields(Recipe) if f.name not in ("settings", "method", "steps")}  # whose meaning is compared above
    assert again == {name: getattr(wanted, name) for name in again}
    assert args[0].config().public() == wanted.config().public()


def test_quantize_in_words() -> None:
    given = {"model": "m", "output": "out dir", "calib": "c.jsonl", "bits": 3, "samples": 128}
    expected = "torchao-qig quantize m --output 'out dir' --calib c.jsonl --bits 3"
    assert command.quantizing(recipe(given)) == expected
    assert command.quantizing(recipe(given | {"method": "default"})) == expected
    assert command.quantizing(recipe(given | {"steps": ["compensate"]})) == expected
    assert command.quantizing(recipe(given | {"method": "awq"})) == f"{expected} --method awq"
    damped = "[{compensate: {sensitivity: null, damping: 1.0e-05, repair: 1.0, sweeps: 2, clip: false}}]"
    assert command.quantizing(recipe(given | {"steps": [{"compensate": {"damping": 1e-5}}]})) == f"{expected} --set 'steps={damped}'"
    auto = {"model": "m", "output": "o", "calib": "c", "bits": "auto", "budget": 4, "modules": ["a", "b c"], "int8_activations": True}
    assert command.quantizing(recipe(auto)) == (
        "torchao-qig quantize m --output o --calib c --modules a --modules 'b c' --int8-activations --set bits=auto --set budget=4"
    )


EVALUATED: dict[str, st.SearchStrategy[Any]] = {
    "data": st.none() | PLACES, "images": st.none() | PLACES, "against": st.none() | PLACES, "include": st.none() | PLACES, "split": PLACES,
    "tasks": st.lists(st.sampled_from(["a", "b_c"]), max_size=2), "samples": st.none() | st.integers(1, 99), "seed": st.integers(-2, 9),
    "dtype": st.sampled_from(["auto", "float32"]), "device": st.sampled_from(["cpu", "cuda:1"]), "keep_packed": st.booleans(),
}  # fmt: skip
MEASURED: dict[str, st.SearchStrategy[Any]] = {
    "against": st.none() | PLACES, "image": st.none() | PLACES | PLACES.map(Path), "prompt_tokens": st.integers(1, 999), "new_tokens": st.integers(2, 999),
    "repeats": st.integers(1, 9), "threads": st.none() | st.integers(1, 9), "device": st.sampled_from([None, "cpu", torch.device("cpu")]),
    "compiled": st.booleans(), "against_dtype": st.sampled_from(["auto", "bfloat16", "float32"]),
}  # fmt: skip


def parts(strategies: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=strategies)


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, (Path, torch.device)) else value


@given(model=PLACES, asked=parts(EVALUATED))
def test_evaluate_again(model: str, asked: dict[str, Any]) -> None:
    run = torchao_qig.lvlm.evaluate.run
    signature = inspect.signature(run)
    line = command.command_line("evaluate", run, model, asked)
    with pytest.MonkeyPatch.context() as patched:
        args, kwargs = heard(patched, torchao_qig.lvlm.evaluate, line)
    found, expected = signature.bind(*args, **kwargs), signature.bind(model, **asked)
    for bound in (found, expected):
        bound.apply_defaults()
        bound.arguments["tasks"] = list(bound.arguments["tasks"])
    assert found.arguments == expected.arguments


@given(model=PLACES | PLACES.map(Path), asked=parts(MEASURED))
def test_bench_again(model: str | Path, asked: dict[str, Any]) -> None:
    signature = inspect.signature(torchao_qig.lvlm.bench.bench)
    line = command.command_line("bench", torchao_qig.lvlm.bench.bench, model, asked)
    with pytest.MonkeyPatch.context() as patched:
        args, kwargs = heard(patched, torchao_qig.lvlm.bench, line)
    found, expected = signature.bind(*args, **kwargs), signature.bind(model, **asked)
    for bound in (found, expected):
        bound.apply_defaults()
    assert {k: plain(v) for k, v in found.arguments.items()} == {k: plain(v) for k, v in expected.arguments.items()}


@pytest.mark.parametrize("argv", [["pytest", "-x", "tests"], ["/some/where/torchao-qig", "quantize", "--config", "gone.yaml"], ["-c"]])
def test_who_called_does_not_matter(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert command.quantizing(recipe({"model": "m", "output": "o", "calib": "c"})) == "torchao-qig quantize m --output o --calib c --bits 3"
    assert command.command_line("evaluate", torchao_qig.lvlm.evaluate.run, "m", {"data": "d", "seed": 0}) == "torchao-qig evaluate m --data d"
    assert command.command_line("bench", torchao_qig.lvlm.bench.bench, Path("m"), {"compiled": False}) == "torchao-qig bench m --no-compile"
