"""Steps, and configs made of them: methods by name, plain data, what does not fit, and the configs in files that older versions wrote."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import torchao_qig
from tests.plain_models import Block, Decoder, tokens
from tests.tiny_models import qwen2
from torchao_qig import QIG, Clip, Compensate, Equalize, Modality, PackedIntTensor, PackedIntWeightOnlyConfig, QIGWeightOnlyConfig, Running, Smooth
from torchao_qig.config import MOVED, QIGInt8DynamicActivationConfig
from torchao_qig.errors import UserError
from torchao_qig.formats import Activations, Affine
from torchao_qig.methods import Context, Step, Uniform
from torchao_qig.methods.draft import Draft
from torchao_qig.methods.plain import from_plain, plain
from torchao_qig.methods.presets import PRESETS, preset
from torchao_qig.watch import block as watched

KINDS, FOREIGN = [QIGWeightOnlyConfig, QIGInt8DynamicActivationConfig], Int8DynamicActivationInt8WeightConfig()
OLD = """{"_type": "QIGWeightOnlyConfig", "_version": 1, "_data": {"bits": 5, "group_size": 64, "symmetric": false,
    "dtype": {"_type": "torch.dtype", "_data": "bfloat16"}, "budget": null, "max_bytes": null, "base_config": null, "format": null, "modules": null,
    "fold": true, "pre_scale": true, "pre_scaled": true, "sensitivity": "qig", "loss": "mae", "grid": 20, "quadrature": "gauss", "steps": null,
    "search": "coarse", "warmup_groups": 0, "modality_ratio": null, "clip": false, "compensate": null, "damping": 0.03, "repair": 1.0, "sweeps": 2,
    "propagate_error": false, "official": false}}"""
OLD_INT8 = """{"_type": "QIGInt8DynamicActivationConfig", "_version": 1, "_data": {"bits": 4, "group_size": -1, "symmetric": true, "dtype": null,
    "budget": null, "max_bytes": null, "base_config": null, "format": null, "modules": null, "fold": true, "pre_scale": true, "pre_scaled": true,
    "sensitivity": "auto", "loss": "mae", "grid": 20, "quadrature": "gauss", "steps": 8, "search": "coarse", "warmup_groups": 0, "modality_ratio": null,
    "clip": false, "compensate": false, "damping": 0.03, "repair": 1.0, "sweeps": 2, "propagate_error": false, "official": false, "smoothquant": 0.5}}"""
OLD_BASE = """{"_type": "PackedIntWeightOnlyConfig", "_version": 1, "_data": {"bits": 2, "group_size": 16, "symmetric": false, "dtype": null}}"""
OLD_TORCHAO = """{"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"group_size": null,
    "granularity": {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}, "set_inductor_config": true}}"""


def old(text: str = OLD, **changed: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found | {"_data": found["_data"] | changed}


def through_json(config: Any) -> Any:
    return config_from_dict(json.loads(json.dumps(config_to_dict(config))))


# What older versions wrote into config.json


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (old(), PackedIntWeightOnlyConfig(5, 64, False, torch.bfloat16, int8_activations=False, pre_scaled=True)),
        (old(pre_scaled=False, dtype=None, steps=32), PackedIntWeightOnlyConfig(5, 64)),
        (old(OLD_INT8), PackedIntWeightOnlyConfig(4, -1, True, None, int8_activations=True, pre_scaled=True)),
        (old(OLD_INT8, pre_scaled=False), PackedIntWeightOnlyConfig(4, -1, True, None, int8_activations=True)),
        (old(base_config=json.loads(OLD_BASE)), PackedIntWeightOnlyConfig(2, 16, pre_scaled=True)),
        (old(base_config=json.loads(OLD_TORCHAO)), Int8WeightOnlyConfig(version=2)), (json.loads(OLD_BASE), PackedIntWeightOnlyConfig(2, 16)),
    ],
)  # fmt: skip
def test_a_config_of_before(written: dict[str, Any], read: Any) -> None:
    """What it says of the stored form is what loaders get; how it was calibrated is no longer asked."""
    assert config_from_dict(written) == read  # dataclasses of two classes are never equal


@given(st.integers(2, 8), st.sampled_from([-1, 16, 48, 128]), st.booleans(), st.booleans())
def test_any_form_of_before(bits: int, group_size: int, symmetric: bool, pre_scaled: bool) -> None:
    """Also inside a FqnToConfig; and the weight that a loader makes of it has this form."""
    named = {"0": old(bits=bits, group_size=group_size, symmetric=symmetric, pre_scaled=pre_scaled), "1": None}
    config = config_from_dict({"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": named, "module_fqn_to_config": named}})
    assert config.fqn_to_config == {"0": PackedIntWeightOnlyConfig(bits, group_size, symmetric, torch.bfloat16, pre_scaled=pre_scaled), "1": None}
    quantize_(skeleton := nn.Sequential(nn.Linear(384, 16), nn.Linear(16, 16)), config, filter_fn=None)
    assert isinstance(made := skeleton[0].weight, PackedIntTensor)
    assert (made.bits, made.group_size, made.act_pre_scale is not None) == (bits, group_size, pre_scaled)
    assert type(skeleton[1].weight) is nn.Parameter


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_before(kind: type[QIGWeightOnlyConfig], tmp_path: Path) -> None:
    """A whole directory with the old config.json in it loads, and gives the same logits."""
    model, inputs = qwen2()
    form: dict[str, Any] = {"bits": 4, "group_size": 64, "symmetric": True, "dtype": None}
    quantize_(model, kind(**form, steps=[Equalize("qig", grid=6)], calib=[inputs], verbose=False))
    torchao_qig.save_pretrained(model, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"]["quant_type"]["default"] = old(OLD if kind is QIGWeightOnlyConfig else OLD_INT8, **form)
    (tmp_path / "config.json").write_text(json.dumps(described))
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    stored = PackedIntWeightOnlyConfig(**form, int8_activations=kind.int8_activations, pre_scaled=True)
    assert through_json(loaded.config.quantization_config.quant_type) == stored


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(MOVED))
def test_a_setting_that_moved(kind: Callable[..., Any], name: str) -> None:
    """The error names it and where it is now, and there it is."""
    with pytest.raises(UserError, match=rf"^{name}=3: .*{re.escape(MOVED[name])}"):
        kind(**{name: 3})
    places, methods = re.findall(r"(\w+)\((\w+)=", MOVED[name]), re.findall(r"'([\w+-]+)'", MOVED[name])
    assert places or methods or name == "base_config"
    assert all(field in {f.name for f in fields(getattr(torchao_qig, cls))} for cls, field in places)
    assert set(methods) <= set(PRESETS)


def test_no_setting_of_before_is_forgotten() -> None:
    running = {"calib", "model", "step", "device", "compute_dtype", "micro_batch", "max_host_memory", "checkpoint_dir", "verbose"}
    now = {f.name for f in fields(QIGWeightOnlyConfig)}
    assert now == {f.name for f in fields(QIGInt8DynamicActivationConfig)}
    assert (old(OLD_INT8)["_data"].keys() | running) - now - {"pre_scaled"} == set(MOVED)
    assert len(now) <= 15


# Steps by name and as plain data

FLAG, SIZE = st.booleans(), st.floats(0, 9)
WEIGHTINGS = (
    st.sampled_from(["qig", "modality", "uniform", Uniform()])
    | st.builds(QIG, st.sampled_from(["gauss", "riemann"]), st.none() | st.integers(1, 64), st.integers(0, 9))
    | st.builds(Modality, st.none() | SIZE | st.dictionaries(st.text(), SIZE))
)
SCALES = st.one_of(
    st.builds(Smooth, st.floats(0, 1), st.just(True), FLAG, FLAG),
    st.builds(Equalize, WEIGHTINGS, st.sampled_from(["mae", "mse"]), st.integers(1, 40), st.just("exhaustive"), FLAG, st.just(True), FLAG, FLAG),
)
CODES = st.builds(Clip, st.none() | WEIGHTINGS) | st.builds(Compensate, st.none() | WEIGHTINGS, SIZE, st.floats(0, 1), st.integers(0, 9), FLAG)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRESETS)
def test_methods(kind: type[QIGWeightOnlyConfig], name: str) -> None:
    """Each is a config, its steps are known to recipes, and they come back from files."""
    config = kind(method=name)
    assert config.chosen_steps == preset(name, kind.int8_activations)
    assert config.calibrates == (name != "rtn")
    assert [from_plain(json.loads(json.dumps(plain(step)))) for step in config.chosen_steps] == config.chosen_steps
    assert through_json(config) == config


@given(SCALES | CODES)
def test_steps_as_plain_data(step: Step) -> None:
    assert from_plain(json.loads(json.dumps(plain(step)))) == step


@given(SCALES, CODES, st.sampled_from([None, Affine(5, 64, True), FOREIGN]), st.sampled_from(KINDS))
def test_configs_through_torchaos_json(scales: Step, codes: Step, form: Any, kind: type[QIGWeightOnlyConfig]) -> None:
    """Steps and form come back as they were."""
    alone = form is FOREIGN or (isinstance(scales.weighting, Modality) and isinstance(codes.weighting, Modality))
    config = kind(format=form, steps=[scales] if alone else [scales, codes])
    found = through_json(config)
    assert type(found) is kind
    assert (found, found.steps, found.form) == (config, config.steps, config.form)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"equalise": {}}, "pass one of equalize, smooth, compensate, clip"), ({"equalize": {}, "clip": {}}, "write a name with its settings"),
        ({"equalize": {"gird": 3}}, "equalize has no setting 'gird'; it has .*grid"), ({"compensate": {"alpha": 1}}, "compensate has no setting 'alpha'"),
        ({"equalize": {"sensitivity": {"qig": {"pionts": 3}}}}, "qig has no setting 'pionts'; it has quadrature, points, warmup_groups"),
        ({"clip": {"sensitivity": {"attention": {}}}}, "sensitivity=.*pass one of qig, modality, uniform"), ({"clip": 3}, "pass one of .* with its settings"),
        ([], "write a name with its settings"), (None, "write a name with its settings"), ({"equalize": {"grid": 0}}, "grid=0"),
        ({"equalize": {"sensitivity": "attention"}}, "sensitivity='attention'"), ({"equalize": {"sensitivity": ["qig"]}}, r"sensitivity=\['qig'\]"),
    ],
)  # fmt: skip
def test_plain_data_that_is_no_step(data: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        from_plain(data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": [Equalize(), Smooth()]}, "Equalize.* and Smooth.* both choose scales"),
        ({"steps": [Clip(), Compensate()]}, "Clip.* and Compensate.* both choose codes"),
        ({"steps": [Compensate(), Equalize()]}, "Equalize.* after Compensate.*; put scales first"),
        ({"steps": [Equalize(), Compensate()], "format": FOREIGN}, "Compensate.* chooses codes, which format="),
        ({"steps": [Equalize(Modality(2.0)), Compensate(Modality(3.0))]}, "modality ratios of 2.0 and 3.0"),
        ({"steps": [Equalize("modality"), Compensate(Modality(3.0))]}, "modality ratios of 3.0 and None"),
        ({"steps": Compensate()}, "steps=Compensate.*: pass a list"), ({"steps": 8}, "steps=8: pass a list"), ({"steps": "qig"}, "steps='qig': pass a list"),
        ({"steps": ["equalize"]}, "steps=.*: pass a list"), ({"steps": [Equalize]}, "steps=.*: pass a list"), ({"steps": [QIG()]}, "steps=.*: pass a list"),
        ({"steps": [], "running": Running(micro_batch=2)}, "running=.*has no effect where weights are rounded"),
        ({"method": "rtn", "checkpoint_dir": "somewhere"}, "checkpoint_dir='somewhere': has no effect where weights are rounded"),
        ({"steps": [], "bits": "auto", "budget": 4.0, "checkpoint_dir": "there"}, "checkpoint_dir='there': has no effect where"),
        ({"method": "qig", "steps": [Equalize()]}, "both say how to calibrate"), ({"method": "qig", "steps": []}, "both say how to calibrate"),
        ({"method": "gptx"}, "method='gptx': pass one of default, rtn"), ({"method": ["qig"]}, r"method=\['qig'\]: pass one of"),
        ({"bits": 5, "format": Affine(4)}, "bits=5: format=.*leave bits out"), ({"bits": "auto", "budget": 3.0, "format": Affine(4)}, "leave bits out"),
        ({"group_size": 64, "format": Affine(4)}, "leave group_size out"), ({"running": {"micro_batch": 2}}, "running=.*pass torchao_qig.Running"),
        ({"dtype": torch.bfloat16, "format": FOREIGN}, "dtype=torch.bfloat16: has no effect with format="),
        ({"pre_scaled": True, "calib": [1]}, "pre_scaled=True: .*pass it to PackedIntWeightOnlyConfig"),
        ({"pre_scaled": True, "bitz": 3}, "pre_scaled=True: .*pass it to PackedIntWeightOnlyConfig"),
    ],
)  # fmt: skip
def test_what_does_not_fit(kind: type[QIGWeightOnlyConfig], arguments: dict[str, Any], words: str) -> None:
    """Named before anything runs; nothing that is given goes without effect."""
    with pytest.raises(UserError, match=words):
        kind(**arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"steps": [], "running": Running(model=nn.Linear(2, 2))},  # what the batches are for
        {"steps": [Equalize(Modality(2.0)), Compensate(Modality(2.0))]}, {"steps": [Equalize(Modality(2.0)), Compensate("qig")]},
        {"format": Affine(8, 64, True), "dtype": torch.bfloat16}, {"steps": [], "bits": "auto", "budget": 4.0, "running": Running(micro_batch=2)},
    ],
)  # fmt: skip
def test_what_fits(kind: type[QIGWeightOnlyConfig], arguments: dict[str, Any]) -> None:
    """What stands beside these errors is none."""
    assert through_json(kind(**arguments)).chosen_steps == kind(**arguments).chosen_steps


def test_codes_that_do_not_fit_beside_int8_activations() -> None:
    with pytest.raises(UserError, match="bits=8, symmetric=False"):
        QIGInt8DynamicActivationConfig(format=Affine(8, 32, False))
    assert QIGWeightOnlyConfig(format=Affine(8, 32, False)).form.format == Affine(8, 32, False)


# A step of one's own


@dataclass(frozen=True)
class Count(Step):
    """Decides nothing, and notes which blocks it was shown, and what had been decided."""

    seen: list[tuple[str, int, int]]

    def needs(self, activations: Activations) -> watched.Needs:
        return watched.Needs()

    def run(self, block: watched.Block, draft: Draft, context: Context) -> None:
        self.seen.append((draft.name, len(draft.groups), len(draft.weights)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_ones_own(kind: type[QIGWeightOnlyConfig]) -> None:
    """It runs for every block, in its place among the others, and changes nothing."""
    model, batches = Decoder(Block), [tokens(2, 6)]
    counts, scales, codes = [Count([]) for _ in range(3)], Equalize("uniform", grid=3), Compensate()
    steps = [counts[0], scales, counts[1], codes, counts[2]]
    found = torchao_qig.calibrate(model, batches, kind(bits=3, group_size=16, steps=steps, verbose=False))
    expected = torchao_qig.calibrate(model, batches, kind(bits=3, group_size=16, steps=[scales, codes], verbose=False))
    assert [c.seen for c in counts] == [[(name, *decided) for name in ("blocks.0", "blocks.1")] for decided in ((0, 0), (4, 0), (4, 7))]
    assert found.weights.keys() == expected.weights.keys() != set()
    assert all(torch.equal(found.weights[n].qdata, w.qdata) for n, w in expected.weights.items())
    assert [name for step in found.settings["steps"] for name in step] == ["count", "equalize", "count", "compensate", "count"]
