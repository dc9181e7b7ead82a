"""The recipes of LVLM families: the whole command line on a tiny checkpoint of each, the paper's settings, the tables of sizes, the READMEs."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchao.quantization import quantize_
from transformers import AutoConfig, AutoModelForCausalLM
from typer.main import get_command
from typer.testing import CliRunner

import torchao_qig
from recipes import sizes
from tests.tiny_dirs import directory
from torchao_qig import Calibration, Compensate, Equalize, PackedIntTensor, PackedIntWeightOnlyConfig, QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig
from torchao_qig.calibration import estimate
from torchao_qig.lvlm.load import load_model, load_processor, shape_of
from torchao_qig.lvlm.recipe import read, recipe
from torchao_qig_cli import app

RECIPES = Path(sizes.__file__).parent
FOLDER = {
    "llava_onevision": "llava_onevision",
    "qwen2_vl": "qwen_vl",
    "qwen2_5_vl": "qwen_vl",
    "qwen3_vl": "qwen_vl",
    "internvl": "internvl",
    "smolvlm": "smolvlm",
    "gemma3": "gemma3",
}
FOLDERS = sorted(set(FOLDER.values()))
SAMPLES = 6


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """coco.jsonl with its pictures."""
    root = tmp_path_factory.mktemp("samples")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(SAMPLES + 2):
        height, width = rng.integers(20, 80, 2)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(root / f"{i:012}.png")
        rows.append({"image": f"{i:012}.png", "caption": f"A picture of {i} things."})
    (root / "coco.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def prompt(folder: Path, samples: Path) -> dict[str, torch.Tensor]:
    """A question about a picture, as the processor in the folder makes it."""
    content = [{"type": "image", "image": Image.open(samples / f"{0:012}.png")}, {"type": "text", "text": "What is it?"}]
    options: dict[str, Any] = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    return dict(load_processor(str(folder)).apply_chat_template([{"role": "user", "content": content}], **options))


def quantized(folder: str, name: str, model: Path, samples: Path, out: Path, *more: str) -> nn.Module:
    config, data = RECIPES / folder / f"{name}.yaml", ["--calib", samples / "coco.jsonl", "--images", samples, "--samples", SAMPLES]
    done = run("quantize", model, "--config", config, *data, "--output", out, "--set", "explain=0", *more)
    assert done.exit_code == 0, done.output
    return load_model(str(out))


def packed(model: nn.Module) -> dict[str, PackedIntTensor]:
    return {name.removesuffix(".weight"): p for name, p in model.named_parameters() if isinstance(p, PackedIntTensor)}


@torch.no_grad()
def check(model: nn.Module, before: Path, out: Path, samples: Path) -> None:
    """The checkpoint holds what was planned and calibrated, and computes the same as the quantized model in memory."""
    config = recipe(read(out / "qig" / "recipe.yaml")).config()
    planned = torchao_qig.plan(shape_of(str(before)), config)
    found = packed(model)
    assert set(found) == planned.linears
    assert len(found) == 14  # 7 linears in each of 2 blocks; the vision tower is not among them
    assert all(p.bits == config.bits for p in found.values())

    in_memory = load_model(str(before))
    config.calib = Calibration.load(out / "qig" / "calibration")
    quantize_(in_memory, config)
    batch = prompt(out, samples)
    ours, theirs = in_memory(**batch).logits, model(**batch).logits
    assert torch.equal(ours, theirs)
    assert not torch.equal(theirs, load_model(str(before))(**batch).logits)
    new = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert new.shape == (1, batch["input_ids"].shape[1] + 5)


@pytest.mark.parametrize("family", FOLDER)
def test_w3a16(family: str, samples: Path, tmp_path: Path) -> None:
    before = directory(family, tmp_path / "model")
    model = quantized(FOLDER[family], "w3a16", before, samples, tmp_path / "out", "--set", "group_size=64")
    check(model, before, tmp_path / "out", samples)
    assert all((p.bits, p.group_size) == (3, 64) for p in packed(model).values())


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "smolvlm"])
def test_w4a8(family: str, samples: Path, tmp_path: Path) -> None:
    before = directory(family, tmp_path / "model")
    model = quantized(FOLDER[family], "w4a8", before, samples, tmp_path / "out")
    check(model, before, tmp_path / "out", samples)
    assert all(p.bits == 4 and p.int8_activations and p.scale.shape[0] == 1 for p in packed(model).values())  # one scale per row


def test_the_recipe_that_was_written_gives_the_same_integers(samples: Path, tmp_path: Path) -> None:
    before = directory("qwen2_5_vl", tmp_path / "model")
    first = quantized("qwen_vl", "w3a16", before, samples, tmp_path / "first", "--set", "group_size=64", "--seed", "3")
    written = read(tmp_path / "first" / "qig" / "recipe.yaml")
    assert written["samples"] == SAMPLES
    assert written["seed"] == 3
    assert written["group_size"] == 64
    done = run("quantize", "--config", tmp_path / "first" / "qig" / "recipe.yaml", "-o", tmp_path / "second")
    assert done.exit_code == 0, done.output
    one, two = packed(first), packed(load_model(str(tmp_path / "second")))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].qdata, two[name].qdata) and torch.equal(one[name].scale, two[name].scale) for name in one)
    assert read(tmp_path / "second" / "qig" / "recipe.yaml") == written | {"output": str(tmp_path / "second")}


def test_the_paper_on_a_tiny_model(samples: Path, tmp_path: Path) -> None:
    before = directory("llava_onevision", tmp_path / "model")
    model = quantized("llava_onevision", "w3a16_paper", before, samples, tmp_path / "out", "--set", "group_size=64")
    assert len(packed(model)) == 14


@pytest.mark.parametrize("folder", FOLDERS)
def test_settings(folder: str) -> None:
    """The formats are the paper's; the _paper files are its settings, field by field; all of the same samples."""
    made = {name: recipe(read(RECIPES / folder / f"{name}.yaml")) for name in ("w3a16", "w4a8", "w3a16_paper", "w4a8_paper")}
    for name, one in made.items():
        assert one.samples == 128
        assert one.config().bits == (3 if "w3" in name else 4)
    w3, w4 = made["w3a16"].config(), made["w4a8"].config()
    assert type(w3) is QIGWeightOnlyConfig
    assert (w3.group_size, w3.symmetric) == (128, False)
    assert type(w4) is QIGInt8DynamicActivationConfig
    assert (w4.group_size, w4.symmetric) == (-1, True)
    assert w3.steps == w4.steps == [Compensate()]
    for name, expected in (("w3a16_paper", QIGWeightOnlyConfig.paper()), ("w4a8_paper", QIGInt8DynamicActivationConfig.paper())):
        config = made[name].config()
        assert type(config) is type(expected)
        assert {f.name: getattr(config, f.name) for f in fields(config)} == {f.name: getattr(expected, f.name) for f in fields(expected)}
        assert [type(step) for step in config.chosen_steps] == [Equalize]


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables hold no times: this machine's speed need not be measured."""
    monkeypatch.setattr(estimate, "products_per_second", lambda *_: 1e12)


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize("folder", FOLDERS)
def test_sizes_are_those_of_the_published_models(folder: str) -> None:
    """Parameters in all, to half a percent; nothing of the decoder is left behind by the group size."""
    for shape in sizes.shapes(folder):
        model = sizes.build(shape["config"])
        count = sum(p.numel() for p in model.parameters())
        assert count == pytest.approx(shape["billions"] * 1e9, rel=5e-3), shape["model"]
        assert all(p.is_meta for p in model.parameters())
        settings = sizes.settings_for("w3a16", shape)
        planned = torchao_qig.plan(model, recipe(read(RECIPES / folder / "w3a16.yaml"), settings).config())
        assert not [why for why in planned.left if "group_size" in why], shape["model"]
        assert planned.model_bytes == 2 * count


@pytest.mark.usefixtures("untimed")
def test_tables_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert sizes.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.usefixtures("untimed")
def test_a_size_is_of_the_whole_model() -> None:
    """Against the weights packed for real, of a model small enough to exist."""
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 200}
    config = {"model_type": "qwen2", **shape}
    found = sizes.size(sizes.build(config), RECIPES / "qwen_vl" / "w3a16.yaml", {"group_size": 64})
    real = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    assert found.before == sum(p.nbytes for p in real.parameters())
    quantize_(real, PackedIntWeightOnlyConfig(bits=3, group_size=64), filter_fn=lambda m, name: isinstance(m, nn.Linear) and "layers" in name)
    assert found.after == sum(p.nbytes_packed() if isinstance(p, PackedIntTensor) else p.nbytes for p in real.parameters())


def test_an_old_table_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "shapes.yaml").write_text("[]")
    readme = tmp_path / "one" / "README.md"
    readme.write_text(f"# One\n\n{sizes.BEGIN}\n{sizes.END}\n")
    monkeypatch.setattr(sizes, "HERE", tmp_path)
    monkeypatch.setattr(sizes, "table", lambda family: (f"| a table for {family} |", ["times"]))
    assert sizes.main(["--check"]) == 1
    assert "table for" not in readme.read_text(), "--check writes nothing"
    assert sizes.main([]) == 0
    assert readme.read_text() == f"# One\n\n{sizes.BEGIN}\n| a table for one |\n{sizes.END}\n"
    assert sizes.main(["--check"]) == 0


@given(before=st.text(), after=st.text(), old=st.text(), made=st.text(min_size=1))
def test_only_the_table_changes(before: str, after: str, old: str, made: str) -> None:
    text = f"{before}{sizes.BEGIN}\n{old}{sizes.END}{after}"
    once = sizes.with_table(text, made)
    assert once == f"{before}{sizes.BEGIN}\n{made}\n{sizes.END}{after}"
    assert sizes.with_table(once, made) == once


def test_a_readme_without_a_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="no place for the table"):
        sizes.with_table("# A family\n", "|")


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_commands_of_the_readme_exist(folder: str) -> None:
    """Subcommands, options, and files of this repository; every model that is named has a row in the table."""
    text = (RECIPES / folder / "README.md").read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    ours = [c for c in commands if c[0] == "torchao-qig"]
    assert {c[1] for c in ours} >= {"plan", "quantize", "evaluate", "bench", "report"}
    known = get_command(app).commands  # type: ignore[attr-defined]
    for _, name, *rest in ours:
        options = {o for p in known[name].params for o in p.opts}
        assert {r for r in rest if r.startswith("--")} <= options, name
    for word in (w for c in commands for w in c if w.startswith("recipes/")):
        assert (RECIPES.parent / word).exists(), word
    modules = [c for c in commands if c[:2] == ["python", "-m"]]
    assert "recipes.serve" in {c[2] for c in modules}
    for _, _, module, *rest in modules:
        parameters = signature(import_module(module).main).parameters
        assert {r.removeprefix("--").replace("-", "_") for r in rest if r.startswith("--")} <= set(parameters), module
    table = text[text.index(sizes.BEGIN) : text.index(sizes.END)]
    named = {w for c in ours for w in c if re.fullmatch(r"[\w.-]+/[\w.-]+", w) and not w.startswith("recipes/")}
    assert named
    assert all(f"`{model}`" in table for model in named)
    for file in re.findall(r"`(\w+\.yaml)`", text):
        assert yaml.safe_load((RECIPES / folder / file).read_text())
