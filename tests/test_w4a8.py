"""`quantize_(model, QIGInt8DynamicActivationConfig(...))`: every way to choose scales and integers, architectures, files, other base configs."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.core.config import config_from_dict, config_to_dict
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    quantize_,
)  # fmt: skip
from torchao.quantization.granularity import PerAxis, PerGroup

import torchao_qig
from tests.plain_models import Block, Decoder, tokens
from tests.test_qig import FAMILIES, packed, run
from tests.tiny_models import language_model, llama, qwen2
from torchao_qig import (
    QIG,
    Calibration,
    Compensate,
    Equalize,
    Modality,
    PackedIntTensor,
    PackedIntWeightOnlyConfig,
    QIGInt8DynamicActivationConfig,
    QIGWeightOnlyConfig,
    Smooth,
)  # fmt: skip
from torchao_qig.methods.draft import Draft

SCALES = Equalize("qig", grid=6)
QUICK = partial(QIGInt8DynamicActivationConfig, steps=[SCALES], verbose=False)
WAYS: dict[str, dict[str, Any]] = {
    "qig": {"steps": [SCALES]}, "qig, clean reference": {"steps": [replace(SCALES, propagate_error=True)]},
    "riemann": {"steps": [replace(SCALES, sensitivity=QIG("riemann"))]}, "modality": {"steps": [replace(SCALES, sensitivity=Modality(ratio=0.5))]},
    "uniform": {"steps": [replace(SCALES, sensitivity="uniform", loss="mse")]}, "smoothquant": {"steps": [Smooth(alpha=0.5)]},
    "compensate": {"steps": [Compensate()]}, "all": {"steps": [SCALES, Compensate("qig", clip=True)]},
    "grouped": {"group_size": 16}, "8 bits": {"bits": 8}, "asymmetric": {"symmetric": False},
}  # fmt: skip


def plain() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(1)
    model = Decoder(partial(Block, kv_heads=2))
    with torch.no_grad():
        model.embed.weight[:, ::9] *= 6  # outlier channels
    ids = tokens(4, 12)
    return model, {"input_ids": ids, "vision_mask": (torch.arange(12) < 5).expand(4, -1)}


def called(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return run(model, {k: v for k, v in inputs.items() if k != "vision_mask"})


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_choosing(way: str) -> None:
    """Integer linears everywhere; the model that calibration simulated is the one that comes out."""
    model, inputs = plain()
    config = QUICK(**WAYS[way])
    found = torchao_qig.calibrate(model, [inputs], config)
    made, exact = copy.deepcopy(model), called(model, inputs)
    config.calib = found
    quantize_(made, config)
    weights = packed(made)
    assert weights.keys() == found.grids.keys() != set()
    assert all(w.int8_activations and w.bits == config.bits and w.group_size == config.group_size for w in weights.values())
    if all(step.decides != "codes" for step in config.chosen_steps):
        simulated = Draft(model, "", dict.fromkeys(found.grids, config.form), found.groups.values()).module(model, torch.device("cpu"))
        torch.testing.assert_close(called(made, inputs), called(simulated, inputs), rtol=1e-3, atol=1e-3)
    rounded = copy.deepcopy(model)
    quantize_(rounded, QUICK(bits=config.bits, group_size=config.group_size, symmetric=config.symmetric, steps=[]), filter_fn=lambda m, n: n in weights)
    error, plainly = ((called(m, inputs) - exact).square().mean() for m in (made, rounded))
    assert error < {"smoothquant": 3.0, "8 bits": 1.02}.get(way, 1.0) * plainly  # SmoothQuant thinks of activations, four bits hurt the weights
    if isinstance(config.chosen_steps[0], Equalize):
        assert sum(g.loss for g in found.groups.values()) < sum(g.rounding_loss for g in found.groups.values())


def test_defaults() -> None:
    """Four bits, a scale per row; integers chosen as for weights alone, and scales where integers are not ours."""
    config = QIGInt8DynamicActivationConfig()
    assert (config.bits, config.group_size, config.symmetric) == (4, -1, True)
    assert config.chosen_steps == [Compensate()]
    assert QIGInt8DynamicActivationConfig(method="qig").chosen_steps == [Equalize("qig")]
    assert QIGInt8DynamicActivationConfig(format=Int8DynamicActivationInt8WeightConfig()).chosen_steps == [Equalize("qig")]
    assert QIGInt8DynamicActivationConfig(method="smoothquant").chosen_steps == [Smooth(alpha=0.5)]
    paper = QIGInt8DynamicActivationConfig.paper()
    assert isinstance(paper, QIGInt8DynamicActivationConfig)
    assert paper.chosen_steps == [Equalize(QIG("riemann", 32, 0), "mae", search="exhaustive", pre_scale=False, paper_rules=True)]
    assert (paper.paper_rules, paper.bits, paper.group_size) == (True, 4, -1)


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (Smooth, {"alpha": 1.5}, "alpha=1.5"), (Smooth, {"alpha": "0.5"}, "alpha='0.5'"),
        (QIGInt8DynamicActivationConfig, {"steps": [Smooth(), Equalize("qig")]}, "both choose scales"),
        (QIGInt8DynamicActivationConfig, {"bits": 8, "symmetric": False}, "symmetric=True"),
        (QIGInt8DynamicActivationConfig, {"bits": {"a": 8}, "symmetric": False}, "symmetric=True"),
        (QIGInt8DynamicActivationConfig, {"bits": 0}, "bits=0"), (QIGInt8DynamicActivationConfig, {"group_size": 100}, "group_size=100"),
        (Smooth, {"fold": False, "pre_scale": False}, "nowhere to put a scale"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(kind: Callable[..., Any], arguments: dict[str, Any], words: str) -> None:
    """Before anything is touched."""
    with pytest.raises(ValueError, match=words):
        kind(**arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_architecture(family: str, tmp_path: Path) -> None:
    """QIG's scales and plain transformers' loader: the same logits from the file, and the config that names the form."""
    model, inputs = FAMILIES[family]()
    quantize_(model, QUICK(steps=[Equalize("qig", grid=3, search="exhaustive")], calib=[inputs]))
    assert packed(model)
    assert all(w.int8_activations for w in packed(model).values())
    torchao_qig.save_pretrained(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(w.int8_activations for w in packed(loaded).values())
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_type"]["default"]
    assert (described["_type"], described["_data"]["int8_activations"]) == ("PackedIntWeightOnlyConfig", True)


def test_whole_layer_compiles() -> None:
    """One graph, its numbers those of eager; linears that share an input share its rounding."""
    model, inputs = FAMILIES["llava_onevision"]()
    quantize_(model, QUICK(calib=[inputs]))
    layer = language_model(model).layers[1]
    for batch in (1, 20):
        x = torch.randn(batch, 5, 128)
        with torch.no_grad():
            positions = language_model(model).rotary_emb(x, torch.arange(5)[None])
            expected = layer(x, position_embeddings=positions)
            torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x, position_embeddings=positions), expected, rtol=2e-3, atol=2e-3)


def test_forms_of_the_call(tmp_path: Path) -> None:
    """One call; a calibration from a file; prepare and convert; through FqnToConfig beside weight-only linears; the config's JSON."""
    model, inputs = llama()
    config = partial(QUICK, steps=[SCALES, Compensate("qig")])
    models = [copy.deepcopy(model) for _ in range(4)]
    found = torchao_qig.calibrate(model, [inputs], config())
    found.save(tmp_path)
    quantize_(models[0], config(calib=[inputs]))
    quantize_(models[1], config(calib=Calibration.load(tmp_path)))
    quantize_(models[2], config(step="prepare"))
    models[2](**inputs)
    quantize_(models[2], config(step="convert"))
    expected = run(models[0], inputs)
    for other in models[1:3]:
        assert torch.equal(run(other, inputs), expected)
    weight_only = QIGWeightOnlyConfig(bits=4, group_size=32, steps=[])
    quantize_(models[3], FqnToConfig({r"re:.*mlp.*": QUICK(steps=[]), r"re:.*self_attn.*": weight_only}), filter_fn=None)
    assert {w.int8_activations for n, w in packed(models[3]).items() if "mlp" in n} == {True}
    assert {w.int8_activations for n, w in packed(models[3]).items() if "self_attn" in n} == {False}
    assert config_from_dict(config_to_dict(config())) == config(verbose=True)


@pytest.mark.parametrize(
    "base",
    [
        Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerAxis(0)),
        Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=PerGroup(32)),
        Int8DynamicActivationInt8WeightConfig(),
    ],
    ids=["int4 per row", "int4 g32", "int8"],
)
@pytest.mark.parametrize("way", ["qig", "smoothquant"])
def test_base_config(base: Any, way: str) -> None:
    """torchao's own integer linears, scaled where a fold is exact: nearer to full precision than without."""
    model, inputs = llama()
    exact, plainly = run(model, inputs), copy.deepcopy(model)
    config = partial(QUICK, format=base, steps=[Smooth(alpha=0.5, pre_scale=False) if way == "smoothquant" else replace(SCALES, pre_scale=False)])
    found = torchao_qig.calibrate(model, [inputs], config())
    if way == "qig":
        assert sum(g.loss for g in found.groups.values()) < sum(g.rounding_loss for g in found.groups.values())
    quantize_(plainly, base, filter_fn=lambda m, n: n in found.grids)
    quantize_(model, config(calib=found))
    kinds = {type(model.get_submodule(n).weight) for n in found.grids}
    assert kinds == {type(plainly.get_submodule(n).weight) for n in found.grids}
    assert not kinds & {PackedIntTensor, nn.Parameter}
    errors = [(run(m, inputs) - exact).square().mean() for m in (model, plainly)]
    assert errors[0] < (1.5 if way == "smoothquant" else 1.05) * errors[1]


def test_linear_alone() -> None:
    """Without data: a linear outside of any model is rounded to nearest, and says what it is."""
    linear = nn.Sequential(nn.Linear(64, 32))
    x, exact = torch.randn(3, 64), linear[0].weight.detach().clone()
    quantize_(linear, QIGInt8DynamicActivationConfig(bits=8, steps=[]))
    assert "int8 activations" in repr(linear[0].weight.data)
    assert (linear(x) - F.linear(x, exact, linear[0].bias)).abs().max() < 0.05


def test_bits_under_a_budget(tmp_path: Path) -> None:
    """bits="auto" gives linears their bits here, too, and a loader finds every one of them."""
    model, inputs = qwen2()
    quantize_(model, QIGInt8DynamicActivationConfig(bits="auto", budget=4, calib=[inputs], verbose=False))
    weights = packed(model)
    assert len({w.bits for w in weights.values()}) > 1
    assert sum(w.bits * w.numel() for w in weights.values()) <= 4 * sum(w.numel() for w in weights.values())
    assert all(w.int8_activations for w in weights.values())
    torchao_qig.save_pretrained(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {n: (w.bits, w.int8_activations) for n, w in packed(loaded).items()} == {n: (w.bits, True) for n, w in weights.items()}
    assert torch.equal(run(loaded, inputs), run(model, inputs))


def test_kinds_do_not_mix(tmp_path: Path) -> None:
    """What was chosen for exact activations is not taken for rounded ones, nor the other way round; one call calibrates one kind."""
    model, inputs = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    weight_only = partial(QIGWeightOnlyConfig, bits=4, group_size=-1, symmetric=True, verbose=False)
    for chosen, taken in ((QUICK, weight_only), (weight_only, QUICK)):
        found = torchao_qig.calibrate(model, [inputs], chosen(steps=[Compensate()]))
        with pytest.raises(ValueError, match=r"int8 activations.*calibrate again"):
            quantize_(model, taken(steps=[Compensate()], calib=found))
    mixed = FqnToConfig({r"re:.*mlp.*": QUICK(calib=[inputs]), r"re:.*self_attn.*": weight_only(calib=[inputs])})
    with pytest.raises(ValueError, match="calibrate each on its own"):
        quantize_(model, mixed, filter_fn=None)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    in_mlp, in_attention = (lambda m, n, part=part: isinstance(m, nn.Linear) and part in n for part in ("mlp", "self_attn"))
    int8 = torchao_qig.calibrate(model, [inputs], QUICK(), filter_fn=in_mlp)
    other = torchao_qig.calibrate(model, [inputs], weight_only(), filter_fn=in_attention)
    quantize_(model, QUICK(calib=int8), filter_fn=in_mlp)
    quantize_(model, weight_only(calib=other), filter_fn=in_attention)
    assert {n: w.int8_activations for n, w in packed(model).items()} == {n: "mlp" in n for n in packed(model)}


@pytest.mark.parametrize("base", [Int8WeightOnlyConfig(), PackedIntWeightOnlyConfig(bits=4)])
def test_base_config_must_round_activations(base: Any) -> None:
    """Otherwise nothing would."""
    with pytest.raises(ValueError, match="does not round activations"):
        QIGInt8DynamicActivationConfig(format=base)


def test_stacks_of_experts_keep_float_activations() -> None:
    """3-D weights are multiplied by grouped products, which do not round; the tensor does not claim it."""
    model, inputs = FAMILIES["qwen3_moe"]()
    config = QIGInt8DynamicActivationConfig(steps=[])
    quantize_(model, FqnToConfig({r"re:.*experts\.(gate_up_proj|down_proj)": config, r"re:.*self_attn.*": config}), filter_fn=None)
    flags = {n: p.int8_activations for n, p in model.named_parameters() if isinstance(p, PackedIntTensor)}
    assert flags
    assert flags == {n: "experts" not in n for n in flags}
    assert torch.isfinite(run(model, inputs)).all()
