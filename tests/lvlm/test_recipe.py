"""Recipes: layers, files, and what is refused."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from torchao_qig import Compensate, QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig
from torchao_qig.errors import UserError
from torchao_qig.lvlm.recipe import Recipe, keys, read, recipe
from torchao_qig.methods.plain import from_plain
from torchao_qig.methods.presets import preset

KEYS: dict[str, st.SearchStrategy[Any]] = {
    "bits": st.integers(2, 8),
    "group_size": st.sampled_from([-1, 16, 64, 128]),
    "samples": st.integers(1, 500),
    "method": st.sampled_from(["default", "qig", "awq", "rtn"]),
    "steps": st.builds(lambda grid, damping: [{"equalize": {"grid": grid}}, {"compensate": {"damping": damping}}], st.integers(1, 40), st.floats(1e-6, 1.0)),
    "prompt": st.text(min_size=1),
    "int8_activations": st.booleans(),
    "modules": st.none() | st.lists(st.sampled_from(["visual", "lm_head"]), min_size=1),
    "max_kl": st.floats(0, 10),
}
LAYER = st.fixed_dictionaries({}, optional=KEYS).filter(lambda layer: not {"method", "steps"} <= layer.keys())


@given(st.lists(LAYER, min_size=1, max_size=3))
def test_later_layers_win(layers: list[dict[str, Any]]) -> None:
    made = recipe(*layers)
    resolved = made.resolved()
    last = {k: v for layer in layers for k, v in layer.items()}
    how = [key for layer in layers for key in layer if key in ("method", "steps")]
    assert {k: resolved[k] for k in last if k not in how} == {k: v for k, v in last.items() if k not in how}
    assert [key for key in ("method", "steps") if resolved[key] is not None] == how[-1:]  # the last of them stands for both
    config = made.config()
    assert type(config) is (QIGInt8DynamicActivationConfig if last.get("int8_activations") else QIGWeightOnlyConfig)
    assert all(getattr(config, k) == v for k, v in last.items() if k in ("bits", "group_size", "modules"))
    if how:
        expected = preset(last["method"]) if how[-1] == "method" else [from_plain(step) for step in last["steps"]]
        assert config.chosen_steps == expected


@given(LAYER)
def test_what_is_written_is_a_recipe(tmp_path_factory: pytest.TempPathFactory, layer: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    made = recipe(layer)
    made.write(path)
    assert recipe(read(path)).resolved() == made.resolved()
    assert list(yaml.safe_load(path.read_text())) == list(made.resolved())


def test_settings_are_those_of_the_config() -> None:
    """Whatever a user may set in Python, but for data and run-time objects, is a key."""
    assert {"bits", "budget", "method", "steps", "micro_batch", "max_host_memory", "compute_dtype"} <= set(keys())
    assert {"calib", "device"} <= set(keys())  # a recipe's own
    assert not {"version", "step", "format", "verbose", "checkpoint_dir", "running"} & set(keys())
    assert keys(True) == keys(False)


@pytest.mark.parametrize(
    "layer, said",
    [
        ({"bitz": 3}, "bitz: no such setting; did you mean bits?"),
        ({"version": 2}, "version: no such setting"),
        ({"samples": 0}, "samples=0"),
        ({"samples": True}, "samples=True"),
        ({"few_shot": 2, "interleaved": 2}, "few_shot=2, interleaved=2"),
        ({"dtype": "fp8"}, "dtype='fp8'"),
        ({"compute_dtype": "auto"}, "compute_dtype='auto'"),
        ({"max_kl": "much"}, "max_kl='much'"),
        ({"bits": "auto"}, "bits='auto' with no budget"),
        ({"method": "awk"}, "method='awk': pass one of default, rtn, awq,"),
        ({"method": "awq", "steps": ["compensate"]}, "method='awq', steps=[...]: both say how to calibrate"),
        ({"steps": 32}, "steps=32: pass a list such as [{equalize: {grid: 10}}, compensate]"),
        ({"steps": [{"equalise": {}}]}, "steps={'equalise': {}}: pass one of equalize, smooth, compensate, clip"),
        ({"steps": [{"equalize": {"grids": 3}}]}, "steps: equalize has no setting 'grids'; it has sensitivity, loss, grid"),
        ({"compensate": True}, "compensate: is a setting of a step now; write `method: NAME` or `steps: [{equalize: {...}}, ...]`"),
        ({"smoothquant": 0.5}, "in Python steps=[Smooth(alpha=...)]"),
        ({"device": "moon"}, "device='moon'"),
    ],
)
def test_refused(layer: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as error:
        recipe(layer)
    assert said in str(error.value)


def test_numbers_that_yaml_takes_for_texts(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("steps: [{compensate: {damping: 1e-2}}]\nmax_kl: 1e3\nmodel: 1e3\n")
    made = recipe(read(tmp_path / "x.yaml"))
    assert made.config().steps == [Compensate(damping=0.01)]
    assert (made.max_kl, made.model) == (1000.0, "1e3")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- bits")
    for name, said in (("list.yaml", "has no keys"), ("", "not a YAML file")):
        with pytest.raises(ValueError, match=said):
            read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "absent.yaml")


def test_missing() -> None:
    with pytest.raises(ValueError, match=r"model, calib: not given; pass MODEL, --calib, or --config"):
        Recipe(output="out").needs("model", "calib", "output")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 20) | st.floats() | st.sampled_from(["", "auto", "cpu", "qig", "float32", "3", "x"]) | st.dates(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", 1, "visual"]), inner, max_size=2), max_leaves=3,
)  # fmt: skip


@given(st.booleans(), st.dictionaries(st.sampled_from(sorted({*keys(), *keys(True)})), VALUES, max_size=3))
def test_wrong_values_are_errors_of_users(int8: bool, found: dict[str, Any]) -> None:
    """Whatever YAML can hold, under whatever key: a recipe, or an error that a user can mend."""
    with suppress(UserError):
        recipe({"int8_activations": int8, **{key: value for key, value in found.items() if key in keys(int8)}})


REFUSED = [
    ("seed", "x"), ("seed", True), ("seed", []), ("max_length", 0), ("max_length", "x"), ("int8_activations", "yes"), ("max_kl", float("nan")),
    ("modules", 3), ("modules", False), ("modules", {"visual": 1}), ("modules", [1]),
]  # fmt: skip


@pytest.mark.parametrize("key, value", REFUSED)
def test_wrong_values(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{key}="):
        recipe({key: value})
