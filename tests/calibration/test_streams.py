"""What a block is calibrated on: the inputs that it has in the quantized model, whatever lies before it; and how much of that is held in memory."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization import FqnToConfig, quantize_

import torchao_qig
from tests.calibration.test_rounding import divergence
from tests.calibration.test_run import build
from tests.plain_models import tokens
from tests.test_qig import packed
from tests.tiny_models import VLMS
from torchao_qig import Calibration, Compensate, Equalize, QIGWeightOnlyConfig
from torchao_qig.calibration import run
from torchao_qig.calibration.chain import ChainRun
from torchao_qig.methods import Context, Step
from torchao_qig.methods.draft import Draft
from torchao_qig.watch.block import Block

CONFIG = partial(QIGWeightOnlyConfig, bits=2, group_size=16, verbose=False)
SCALES = partial(Equalize, grid=4)
ROUND: dict[str, Any] = dict(steps=[])


@pytest.fixture
def inputs_of(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """By block: the quantized model's hidden states that its integers are chosen on, in the order of the blocks."""
    seen: dict[str, Tensor] = {}

    original = Compensate.run

    def spy(self: Compensate, block: Block, draft: Draft, context: Context) -> None:
        assert context.second is not None
        seen[draft.name] = torch.cat([h.float() for h in context.second.hidden])
        original(self, block, draft, context)

    monkeypatch.setattr(Compensate, "run", spy)
    return seen


def real_inputs(model: nn.Module, names: list[str], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The first tensor that each of these modules is called with."""
    seen: dict[str, Tensor] = {}

    def note(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[name] = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()).detach().float().clone()

    handles = [model.get_submodule(n).register_forward_pre_hook(lambda _, args, kwargs, n=n: note(n, args, kwargs), with_kwargs=True) for n in names]
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


# Blocks left out


def linear_names(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks.")]


def by_filter(model: nn.Module, left: list[str], **settings: Any) -> None:
    quantize_(model, CONFIG(**settings), lambda m, n: isinstance(m, nn.Linear) and not n.startswith(tuple(left)))


def by_name(model: nn.Module, left: list[str], **settings: Any) -> None:
    kept = "".join(n for n in "0123" if f"blocks.{n}." not in left)
    quantize_(model, FqnToConfig({rf"re:blocks\.[{kept}]\..*": CONFIG(**settings)}), filter_fn=None)


def by_modules(model: nn.Module, left: list[str], **settings: Any) -> None:
    quantize_(model, CONFIG(modules=[n for n, _ in model.named_modules() if n.count(".") == 1 and n.startswith("blocks.") and f"{n}." not in left], **settings))


def by_bits(model: nn.Module, left: list[str], **settings: Any) -> None:
    quantize_(model, CONFIG(bits={n: 16 if n.startswith(tuple(left)) else 2 for n in linear_names(model)}, **settings), lambda m, n: n in linear_names(model))


def by_budget(model: nn.Module, left: list[str], **settings: Any) -> None:
    """bits="auto", which here happens to leave these blocks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "allocate", lambda model, batches, blocks, names, form_at, budget: {n: 16 if n.startswith(tuple(left)) else 2 for n in names})
        quantize_(model, CONFIG(bits="auto", budget=3.0, **settings))


WAYS = [by_filter, by_name, by_modules, by_bits, by_budget]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("left", [["blocks.0."], ["blocks.1."], ["blocks.0.", "blocks.2."], ["blocks.1.", "blocks.2."]], ids=" ".join)
def test_blocks_after_one_left_out(way: Callable[..., None], left: list[str], inputs_of: dict[str, Tensor]) -> None:
    """Every block is calibrated on the input that it has in the partly quantized model; the model is nearer than by rounding."""
    model, batches = build(4), [tokens(8, 16, seed) for seed in range(3)]
    ours, rounded = copy.deepcopy(model), copy.deepcopy(model)
    way(ours, left, calib=batches)
    way(rounded, left, calib=batches, **ROUND)
    assert packed(ours).keys() == packed(rounded).keys() == {n for n in linear_names(model) if not n.startswith(tuple(left))}
    blocks = [n for n in ("blocks.0", "blocks.1", "blocks.2", "blocks.3") if f"{n}." not in left]
    assert list(inputs_of) == blocks
    for name, expected in real_inputs(ours, blocks, torch.cat(batches)).items():
        torch.testing.assert_close(inputs_of[name], expected, rtol=1e-4, atol=1e-4)
    assert divergence(ours, model, batches) < 0.9 * divergence(rounded, model, batches)


@pytest.mark.parametrize(
    "steps", [[SCALES("uniform", propagate_error=True)], [SCALES("qig", propagate_error=True), Compensate("qig")]], ids=["scales", "scales and integers"]
)
def test_other_methods_on_quantized_inputs(steps: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales alone, and scales with integers: the second stream is the partly quantized model's there, too."""
    seen: dict[str, Tensor] = {}
    original = ChainRun.run_block

    def spy(self: ChainRun, name: str) -> Any:
        assert self.context.second is not None
        seen[name] = torch.cat([h.float() for h in self.context.second.hidden])
        return original(self, name)

    monkeypatch.setattr(ChainRun, "run_block", spy)
    model, ids = build(3), tokens(6, 12)
    config = CONFIG(bits=3, steps=steps, calib=[ids])
    quantize_(model, config, lambda m, n: isinstance(m, nn.Linear) and not n.startswith("blocks.1."))
    for name, expected in real_inputs(model, list(seen), ids).items():
        torch.testing.assert_close(seen[name], expected, rtol=1e-4, atol=1e-4)


# One list of blocks after another


def test_head_after_the_decoder(inputs_of: dict[str, Tensor]) -> None:
    model, ids = build(2), tokens(8, 12)
    quantize_(model, CONFIG(calib=[ids], modules=["blocks", "head"]))
    assert list(inputs_of) == ["blocks.0", "blocks.1", "head"]
    for name, expected in real_inputs(model, list(inputs_of), ids).items():
        torch.testing.assert_close(inputs_of[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen3_vl"])
def test_decoder_after_a_quantized_tower(family: str, inputs_of: dict[str, Tensor]) -> None:
    """Each part is calibrated on what those that run before it have become, also on the features that Qwen3-VL adds between blocks."""
    model, inputs = VLMS[family]()
    whole = {n.rpartition(".")[2]: n for n, _ in model.named_modules() if n.count(".") == 1}
    tower = next(n for n in whole if "vis" in n)
    others = [n for n in whole if "projector" in n]
    quantize_(model, CONFIG(bits=3, calib=[inputs], modules=["language_model", *others, tower]))
    order = [next(part for part in (tower, *others, "language_model") if part in n) for n in inputs_of]
    assert list(dict.fromkeys(order)) == [tower, *others, "language_model"]
    decoder = [n for n in inputs_of if "language_model" in n]
    assert len(decoder) > 1
    for name, expected in real_inputs(model, decoder, **inputs).items():
        torch.testing.assert_close(inputs_of[name], expected.view(inputs_of[name].shape), rtol=2e-3, atol=2e-4)


def test_batches_that_do_not_run_all_parts() -> None:
    """A batch of text comes first: order and streams are those of the batches that have an image."""
    model, inputs = VLMS["qwen2_vl"]()
    text = {"input_ids": torch.arange(1, 9)[None]}
    found = torchao_qig.calibrate(model, [text, inputs], CONFIG(bits=3, modules=["language_model", "visual"]))
    blocks = [label.split(".")[1] for label in found.squared_errors]
    assert blocks == sorted(blocks, reverse=True)
    assert set(blocks) == {"visual", "language_model"}


def test_interrupted_between_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A calibration that goes on in its second list of blocks finds what one that was not interrupted finds."""
    model, ids = build(2), tokens(6, 12)
    expected = torchao_qig.calibrate(model, [ids], CONFIG(modules=["blocks", "head"]))
    original, stop = ChainRun.run_block, [True]

    def stopping(self: ChainRun, name: str) -> Any:
        if name == "head" and stop.pop():
            raise KeyboardInterrupt
        return original(self, name)

    monkeypatch.setattr(ChainRun, "run_block", stopping)
    attempt = partial(torchao_qig.calibrate, model, [ids], CONFIG(modules=["blocks", "head"], checkpoint_dir=tmp_path))
    with pytest.raises(KeyboardInterrupt):
        attempt()
    stop.append(False)
    found = attempt()
    assert found.weights.keys() == expected.weights.keys() >= {"head"}
    assert all(torch.equal(found.weights[n].dequantize(), w.dequantize()) for n, w in expected.weights.items())


# Linears that share a weight


def sharing(*pairs: tuple[str, str]) -> nn.Module:
    model = build(3)
    for one, other in pairs:
        model.get_submodule(other).weight = model.get_submodule(one).weight
    return model


@pytest.mark.parametrize(
    "pair", [("blocks.0.mlp.gate", "blocks.1.mlp.gate"), ("blocks.1.mlp.up", "blocks.1.mlp.gate"), ("blocks.2.attention.q", "blocks.0.attention.o")]
)
@pytest.mark.parametrize("settings", [{}, dict(steps=[SCALES("uniform")]), ROUND], ids=["integers", "scales", "rounded"])
def test_linears_that_share_a_weight_go_on_sharing_it(pair: tuple[str, str], settings: dict[str, Any], tmp_path: Path) -> None:
    """One packed tensor for both, as when rounding, also through a saved calibration; and the blocks after it see what it has become."""
    model, ids = sharing(pair), tokens(8, 12)
    config = CONFIG(bits=4, **settings)
    found = torchao_qig.calibrate(model, [ids], config)
    found.save(tmp_path)
    for calib in ([ids], found, Calibration.load(tmp_path)):
        ours = copy.deepcopy(model)
        quantize_(ours, CONFIG(bits=4, calib=calib, **settings))
        one, other = (ours.get_submodule(name) for name in pair)
        assert one.weight is other.weight
        assert len(packed(ours)) == 20  # named_parameters names a parameter once
        assert divergence(ours, model, [ids]) < 0.1


def test_the_stream_sees_shared_integers(inputs_of: dict[str, Tensor]) -> None:
    model, ids = sharing(("blocks.0.mlp.gate", "blocks.1.mlp.gate"), ("blocks.0.attention.v", "blocks.0.attention.k")), tokens(8, 12)
    quantize_(model, CONFIG(calib=[ids]))
    for name, expected in real_inputs(model, list(inputs_of), ids).items():
        torch.testing.assert_close(inputs_of[name], expected, rtol=1e-4, atol=1e-4)


def test_shared_weights_have_one_form() -> None:
    """Other bits for a weight's other holder are refused; so is one holder alone; bytes count once."""
    model, ids = sharing(("blocks.0.mlp.gate", "blocks.1.mlp.gate")), tokens(8, 12)
    names = linear_names(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.gate \[3.* share one weight"):
        torchao_qig.calibrate(model, [ids], CONFIG(bits={n: 3 if n == "blocks.0.mlp.gate" else 2 for n in names}), lambda m, n: n in names)
    found = torchao_qig.calibrate(model, [ids], CONFIG())
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.gate shares its weight with blocks\.1\.mlp\.gate, which is not chosen"):
        quantize_(model, CONFIG(calib=found), lambda m, n: n in names and n != "blocks.1.mlp.gate")
    assert not packed(model)
    plain = torchao_qig.plan(build(3), CONFIG())
    assert plain.bytes_before - torchao_qig.plan(model, CONFIG()).bytes_before == model.blocks[0].mlp.gate.weight.numel() * 4


# Memory
