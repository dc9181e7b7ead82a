"""`quantize_(model, QIGWeightOnlyConfig(...))`: architectures, the forms of the call, what it says and where it runs."""

import copy
import dataclasses
import json
import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_
from transformers import TorchAoConfig

import torchao_qig
from tests.plain_models import Block, Decoder, tokens
from tests.tiny_models import VLMS, gemma3, language_model, llama, qwen2, qwen3_moe
from torchao_qig import QIG, Calibration, Compensate, Equalize, PackedIntTensor, QIGWeightOnlyConfig, Running, Uniform
from torchao_qig.methods.draft import Draft

SCALES = Equalize("qig", grid=6)
QUICK = partial(QIGWeightOnlyConfig, bits=3, group_size=32, steps=[SCALES], verbose=False)
FAMILIES = {**VLMS, "gemma3": gemma3, "llama": llama, "qwen3_moe": qwen3_moe, "qwen2": qwen2}


def plain(kv_heads: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    return Decoder(partial(Block, kv_heads=kv_heads)), {"input_ids": tokens()}


def packed(model: nn.Module) -> dict[str, PackedIntTensor]:
    return {n.removesuffix(".weight"): p for n, p in model.named_parameters() if isinstance(p, PackedIntTensor)}


def run(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


def assert_whole(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], v) and type(after[k]) is type(v) for k, v in before.items())


# Every architecture


@pytest.mark.parametrize("family", FAMILIES)
def test_one_call(family: str, tmp_path: Path) -> None:
    """One call: below plain rounding in every group, logits as the search predicted, one compiled graph, saved and loaded."""
    model, inputs = FAMILIES[family]()
    found = torchao_qig.calibrate(model, [inputs], QUICK())
    assert all(g.loss <= g.rounding_loss for g in found.groups.values())
    assert sum(g.loss for g in found.groups.values()) < 0.99 * sum(g.rounding_loss for g in found.groups.values())
    simulated = Draft(model, "", dict.fromkeys(found.grids, QUICK().form), found.groups.values()).module(model, torch.device("cpu"))

    quantize_(model, QUICK(calib=[inputs]))
    assert packed(model).keys() == found.grids.keys()
    logits = run(model, inputs)
    torch.testing.assert_close(logits, run(simulated, inputs), rtol=1e-4, atol=1e-4)

    torchao_qig.save_pretrained(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(loaded, inputs), logits)
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_type"]["default"]
    assert described["_type"] == "PackedIntWeightOnlyConfig"
    scaled = any(w.act_pre_scale is not None for w in packed(model).values())
    assert described["_data"] == {"bits": 3, "group_size": 32, "symmetric": False, "dtype": None, "int8_activations": False, "pre_scaled": scaled}


def test_defaults() -> None:
    """Integers are chosen, without scales; scales by QIG where integers are not ours to choose, or on request."""
    assert QIGWeightOnlyConfig().chosen_steps == QIGWeightOnlyConfig(method="default").chosen_steps == [Compensate()]
    for config in (QIGWeightOnlyConfig(method="qig"), QIGWeightOnlyConfig(format=Int8WeightOnlyConfig())):
        assert config.chosen_steps == [Equalize("qig")]
    assert QIGWeightOnlyConfig.paper().chosen_steps == [Equalize(QIG("riemann", 32, 5), "mae", search="exhaustive", pre_scale=False, paper_rules=True)]
    assert QIGWeightOnlyConfig(method="default+qig").chosen_steps == [Equalize("qig"), Compensate("qig")]
    assert QIGWeightOnlyConfig(steps=[Equalize("uniform")]).chosen_steps[0].weighting == Uniform()


@pytest.mark.parametrize("family", FAMILIES)
def test_default_call(family: str) -> None:
    """Without any setting but the size: every family comes nearer to itself than by rounding to nearest."""
    model, inputs = FAMILIES[family]()
    found = torchao_qig.calibrate(model, [inputs], QIGWeightOnlyConfig(bits=3, group_size=32, verbose=False))
    assert found.weights.keys() == found.grids.keys()
    assert not found.groups
    before, after = (sum(errors) for errors in zip(*found.squared_errors.values(), strict=True))
    assert after < 0.7 * before
    assert all(label in found.summary() for label in found.squared_errors)


@pytest.mark.parametrize("family", FAMILIES)
def test_traces(family: str) -> None:
    """The whole model goes through torch.compile's tracing and gives the same."""
    model, inputs = FAMILIES[family]()
    quantize_(model, QUICK(calib=[inputs]))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4)


def test_compiles() -> None:
    """Into kernels: one graph for the mlp, scales folded; and the whole decoder layer with its pre-scaled o_proj."""
    model, inputs = VLMS["llava_onevision"]()
    quantize_(model, QUICK(calib=[inputs]))
    layer = language_model(model).layers[1]
    assert layer.self_attn.o_proj.weight.act_pre_scale is not None
    x = torch.randn(3, 5, 128)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer.mlp, fullgraph=True)(x), layer.mlp(x), rtol=1e-4, atol=1e-4)
        positions = language_model(model).rotary_emb(x, torch.arange(5)[None])
        expected = layer(x, position_embeddings=positions)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x, position_embeddings=positions), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models(dtype: torch.dtype) -> None:
    """Packed equals simulated to the dtype's rounding; scales carry what rounding did to norms and pre-scales."""
    model, inputs = VLMS["qwen2_vl"](dtype)
    found = torchao_qig.calibrate(model, [inputs], QUICK())
    simulated = Draft(model, "", dict.fromkeys(found.grids, QUICK().form), found.groups.values()).module(model, torch.device("cpu"))
    quantize_(model, QUICK(calib=found))
    ours, theirs = run(model, inputs).float(), run(simulated, inputs).float()
    assert (ours - theirs).abs().max() < 0.05 * theirs.abs().max()
    assert all(w.dtype == dtype for w in packed(model).values())


# The forms of the call


def test_every_form_gives_the_same(tmp_path: Path) -> None:
    """One call; calibrate and apply; saved, loaded and applied; prepare, run and convert."""
    model, inputs = plain()
    batches = [inputs, {"input_ids": tokens(2, 7, 5)}]
    models = [copy.deepcopy(model) for _ in range(5)]
    quantize_(models[0], QUICK(calib=batches))
    found = torchao_qig.calibrate(models[1], batches, QUICK())
    quantize_(models[1], QUICK(calib=found))
    found.save(tmp_path)
    quantize_(models[2], QUICK(calib=Calibration.load(tmp_path)))
    quantize_(models[3], QUICK(step="prepare"))
    for batch in batches:
        models[3](**batch)
    quantize_(models[3], QUICK(step="convert"))
    quantize_(models[4], FqnToConfig({r"re:blocks\..*": QUICK(calib=batches)}), filter_fn=None)
    expected = run(models[0], inputs)
    assert not torch.equal(expected, run(model, inputs))
    for other in models[1:]:
        assert torch.equal(run(other, inputs), expected)
        assert not any(m._forward_pre_hooks for m in other.modules())


def test_generator_is_read_once_and_configs_copy() -> None:
    model, inputs = plain()
    reads = []

    def loader() -> Any:
        reads.append(1)
        yield inputs

    config = QUICK(calib=loader())
    again = copy.deepcopy(config)
    assert again.calib is config.calib
    assert dataclasses.replace(config, bits=4).calib is config.calib
    assert pickle.loads(pickle.dumps(config)).calib is None
    assert config_from_dict(config_to_dict(config)) == dataclasses.replace(config, calib=None, verbose=True)
    quantize_(model, config)
    assert len(reads) == 1
    assert TorchAoConfig(config).to_dict()


def test_prepare_records_generation() -> None:
    """Steps that a cache serves are not recorded; the recorder can be used under inference_mode."""
    model, inputs = qwen2()
    quantize_(model, QUICK(step="prepare"))
    model.generate(**inputs, max_new_tokens=3, do_sample=False)
    with torch.inference_mode():
        model(**inputs)
    recorder = model._qig_recorder
    assert len(recorder.calls) == 2
    quantize_(model, QUICK(step="convert"))
    assert len(packed(model)) == 14
    assert not hasattr(model, "_qig_recorder")


# What is said, and where it runs


def test_plan_names_experts(capfd: pytest.CaptureFixture[str]) -> None:
    model, inputs = qwen3_moe()
    torchao_qig.calibrate(model, [inputs], dataclasses.replace(QUICK(), verbose=True))
    assert "3-D parameters (FqnToConfig with PackedIntWeightOnlyConfig rounds them): model.layers.0.mlp.experts.gate_up_proj" in capfd.readouterr().err


def test_progress_is_silent_on_request(capfd: pytest.CaptureFixture[str]) -> None:
    model, inputs = plain()
    torchao_qig.calibrate(model, [inputs], QUICK())
    assert capfd.readouterr() == ("", "")
    torchao_qig.calibrate(model, [inputs], dataclasses.replace(QUICK(), verbose=True))
    shown = capfd.readouterr().err
    assert "14 linears in blocks.0 .. blocks.1" in shown
    assert "outside the decoder's blocks (name them in modules=): head" in shown
    assert "2/2" in shown
    assert "loss -" in shown


def test_summary_and_device() -> None:
    model, inputs = plain()
    found = torchao_qig.calibrate(model, [inputs], QUICK(device="cpu"))
    lines = found.summary().splitlines()
    assert len(lines) == 2 + len(found.groups)
    assert lines[-1].startswith("4 samples, ")
    assert found.stats["samples"] == 4
    assert found.stats["tokens"] == 40
    assert found.stats["peak_host_bytes"] > 2**20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator")
def test_blocks_on_an_accelerator() -> None:
    """The model stays on the CPU; blocks visit the device."""
    model, inputs = plain()
    device = torch.accelerator.current_accelerator()
    found = torchao_qig.calibrate(model, [inputs], QUICK(device=device, running=Running(compute_dtype=torch.float32)))
    here = torchao_qig.calibrate(model, [inputs], QUICK(running=Running(compute_dtype=torch.float32)))
    for label in here.groups:
        assert found.groups[label].loss == pytest.approx(here.groups[label].loss, rel=1e-2)
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert found.stats["peak_device_bytes"] > 0


def test_spread_by_accelerate() -> None:
    """Hooks of accelerate's device map do not disturb, nor get lost."""
    from accelerate import dispatch_model

    model, inputs = qwen2()
    expected = torchao_qig.calibrate(model, [inputs], QUICK())
    names = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dispatch_model(model, names, force_hooks=True)
    found = torchao_qig.calibrate(model, [inputs], QUICK())
    for label, group in expected.groups.items():
        assert torch.equal(found.groups[label].scale, group.scale)
    quantize_(model, QUICK(calib=found))
    assert hasattr(model.model.layers[0], "_hf_hook")
    assert torch.isfinite(run(model, inputs)).all()
