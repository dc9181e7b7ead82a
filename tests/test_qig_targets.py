"""Which linears `quantize_(model, QIGWeightOnlyConfig(...))` quantizes, and into what."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

import torchao_qig
from tests.test_qig import FAMILIES, QUICK, SCALES, assert_whole, packed, plain, run
from tests.tiny_models import VLMS, language_model, qwen2
from torchao_qig import Equalize, PackedIntWeightOnlyConfig, QIGWeightOnlyConfig, Running


def test_part_of_a_model() -> None:
    """A language model is quantized with the batches of the whole; without model= that is an error, not a silent loss of images."""
    whole, inputs = VLMS["llava_onevision"]()
    expected = copy.deepcopy(whole)
    quantize_(expected, QUICK(calib=[inputs]))
    before = copy.deepcopy(whole.state_dict())
    with pytest.raises(ValueError, match=r"pixel_values.*model="):
        quantize_(language_model(whole), QUICK(calib=[inputs]))
    assert_whole(whole, before)
    quantize_(language_model(whole), QUICK(calib=[inputs], running=Running(model=whole)))
    assert torch.equal(run(whole, inputs), run(expected, inputs))


def test_mixed_bits_and_layers_left_out() -> None:
    model, inputs = plain()
    loader = [inputs]
    config = FqnToConfig(
        {
            r"re:blocks\.0\.attention\.[qkv]": QUICK(bits=6, calib=loader),
            r"re:blocks\.1\.mlp\..*": QUICK(bits=2, group_size=16, calib=loader),
            "blocks.1.mlp.down": None,
        }
    )
    quantize_(model, config, filter_fn=None)
    assert {n: (w.bits, w.group_size) for n, w in packed(model).items()} == {
        **{f"blocks.0.attention.{x}": (6, 32) for x in "qkv"}, "blocks.1.mlp.gate": (2, 16), "blocks.1.mlp.up": (2, 16),
    }  # fmt: skip


def test_filter() -> None:
    model, inputs = plain()
    quantize_(model, QUICK(calib=[inputs]), filter_fn=lambda m, name: isinstance(m, nn.Linear) and "mlp" in name)
    assert len(packed(model)) == 6
    assert all("mlp" in n for n in packed(model))


def test_calibration_applied_to_some_of_its_linears() -> None:
    """A group of which only a part is wanted keeps its scale to itself: the norm still feeds the others."""
    model, inputs = plain()
    found = torchao_qig.calibrate(model, [inputs], QUICK())
    norm = model.blocks[0].norm1.weight.clone()
    quantize_(model, QUICK(calib=found), filter_fn=lambda m, name: name == "blocks.0.attention.q")
    assert torch.equal(model.blocks[0].norm1.weight, norm)
    assert packed(model).keys() == {"blocks.0.attention.q"}
    assert packed(model)["blocks.0.attention.q"].act_pre_scale is not None


def test_modules_names_more() -> None:
    """The vision tower and the head on request; the decoder only where it is named, too."""
    model, inputs = VLMS["qwen2_vl"]()
    quantize_(model, QUICK(calib=[inputs], modules=["visual.blocks", "lm_head", "layers.0"]))
    names = packed(model).keys()
    assert "lm_head" in names
    assert any(n.startswith("model.visual.blocks.1") for n in names)
    assert {n.split(".")[3] for n in names if "language_model" in n} == {"0"}
    assert torch.isfinite(run(model, inputs)).all()
    with pytest.raises(ValueError, match=r"modules=.*no module 'nothing'"):
        torchao_qig.calibrate(VLMS["qwen2_vl"]()[0], [inputs], QUICK(modules=["nothing"]))


@pytest.mark.parametrize("family", [*VLMS, "gemma3"])
def test_everything_on_request(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """Vision tower, projector, decoder and head, all calibrated; a linear that is never called (SigLIP's pooling) stays, and is named."""
    model, inputs = FAMILIES[family]()
    names = [n for n, part in model.model.named_children() if any(isinstance(m, nn.Linear) for m in part.modules())]
    before = run(model, inputs)
    found = torchao_qig.calibrate(model, [inputs], QUICK(bits=8, group_size=16, steps=[Equalize("qig", grid=3)], modules=[*names, "lm_head"]))
    quantize_(model, QUICK(bits=8, group_size=16, calib=found))
    left = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in packed(model)}
    assert all(n in caplog.text for n in left if ".head." in n)  # (a tied lm_head stays without a word)
    assert len(left) <= 4
    assert (run(model, inputs) - before).abs().max() < 0.05 * before.abs().max()
    assert any("vis" in label for label in found.groups)


def test_batches_without_an_image() -> None:
    """They do not go through the vision tower, and count in the decoder."""
    model, inputs = VLMS["qwen2_vl"]()
    text = {"input_ids": torch.arange(1, 9)[None]}
    found = torchao_qig.calibrate(model, [inputs, text], QUICK(modules=["visual.blocks", "language_model"]))
    assert len(found.token_weights("model.visual.blocks.0.mlp.fc1").weights) == 1
    assert len(found.token_weights("model.language_model.layers.0.mlp").weights) == 2


def test_tied_head_stays() -> None:
    model, inputs = qwen2(tied=True)
    quantize_(model, QUICK(calib=[inputs]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head" not in packed(model)


def test_shared_linear() -> None:
    """Linears of two groups with one parameter: each gets a weight of its own, and the function is kept."""
    model, inputs = plain()
    model.blocks[1].mlp.gate.weight = model.blocks[0].mlp.gate.weight
    found = torchao_qig.calibrate(model, [inputs], QUICK(bits=8))
    expected = run(model, inputs)
    quantize_(model, QUICK(bits=8, calib=found))
    assert (run(model, inputs) - expected).abs().max() < 0.1 * expected.abs().max()


def test_no_search_is_plain_rounding() -> None:
    """steps=[] with data: the decoder's linears, rounded to nearest. Without data: what the filter matches, with a warning."""
    model, inputs = plain()
    expected = copy.deepcopy(model)
    quantize_(expected, PackedIntWeightOnlyConfig(bits=3, group_size=32), filter_fn=lambda m, name: name.startswith("blocks") and isinstance(m, nn.Linear))
    rounded = copy.deepcopy(model)
    quantize_(rounded, QUICK(steps=[], calib=[inputs]))
    assert torch.equal(run(rounded, inputs), run(expected, inputs))
    with pytest.warns(UserWarning, match="calib=None"):
        quantize_(model, QUICK())
    assert len(packed(model)) == 15
    for linear in packed(model).values():
        assert linear.act_pre_scale is None


def test_without_data_the_right_shapes() -> None:
    """What loaders make and then fill: with act_pre_scale if the saved config says so."""
    skeleton = nn.Sequential(nn.Linear(64, 48))
    quantize_(skeleton, PackedIntWeightOnlyConfig(bits=3, group_size=32, pre_scaled=True))
    weight = skeleton[0].weight
    assert weight.act_pre_scale.shape == (64,)
    model, inputs = plain()
    quantize_(model, QUICK(calib=[inputs], steps=[Equalize("qig", grid=6, fold=False)]))
    source = model.blocks[0].mlp.down.weight
    skeleton = nn.Sequential(nn.Linear(64, 32))
    quantize_(skeleton, PackedIntWeightOnlyConfig(bits=3, group_size=32, pre_scaled=True))
    skeleton[0].weight.data.copy_(source.data)
    assert torch.equal(skeleton[0].weight.dequantize(), source.dequantize())


@pytest.mark.parametrize("base", [PackedIntWeightOnlyConfig(bits=2, group_size=16), Int8WeightOnlyConfig(version=2)])
def test_base_config(base: Any) -> None:
    """Any torchao format whose weight takes a pre-scale; searched with that format's own rounding."""
    model, inputs = plain()
    plainly = copy.deepcopy(model)
    expected = run(model, inputs)
    found = torchao_qig.calibrate(model, [inputs], QIGWeightOnlyConfig(steps=[SCALES], verbose=False, format=base))
    assert all(g.loss <= g.rounding_loss for g in found.groups.values())
    quantize_(model, QIGWeightOnlyConfig(steps=[SCALES], verbose=False, format=base, calib=found))
    quantize_(plainly, base, filter_fn=lambda m, name: name in found.grids)
    assert type(model.blocks[0].mlp.up.weight) is type(plainly.blocks[0].mlp.up.weight)
    assert (run(model, inputs) - expected).abs().mean() < 1.05 * (run(plainly, inputs) - expected).abs().mean()


def test_quantized_model_is_left_alone() -> None:
    model, inputs = plain()
    quantize_(model, QUICK(calib=[inputs]))
    before = run(model, inputs)
    with pytest.raises(ValueError, match="already quantized"):
        quantize_(model, QUICK(calib=[inputs]))
    assert torch.equal(run(model, inputs), before)
