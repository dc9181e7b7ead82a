"""What calibration promises whatever the data looks like: token weights, batching, padding, dtypes, resuming, ranks."""

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchao_qig
from tests.plain_models import Block, Decoder, tokens
from tests.tiny_models import llava_onevision, qwen2
from torchao_qig import QIG, Calibration, Equalize, QIGWeightOnlyConfig, Running
from torchao_qig.methods.per_sample import MODALITIES

SCALES = partial(Equalize, grid=6)
QUICK = partial(QIGWeightOnlyConfig, bits=3, group_size=16, steps=[SCALES()], verbose=False)


def build(layers: int = 2, **kwargs: Any) -> nn.Module:
    torch.manual_seed(1)
    model = Decoder(partial(Block, kv_heads=2), layers=layers, **kwargs)
    with torch.no_grad():
        model.embed.weight[:, ::9] *= 6  # outlier channels
    return model


def calibrate(model: nn.Module, batches: list[Any], **kwargs: Any) -> Calibration:
    return torchao_qig.calibrate(model, batches, QUICK(**kwargs))


def assert_same(a: Calibration, b: Calibration, exactly: bool = False, rtol: float = 1e-4) -> None:
    """Scales, losses and token weights, to float summation or to the bit."""
    close = partial(torch.testing.assert_close, rtol=0, atol=0) if exactly else partial(torch.testing.assert_close, rtol=rtol, atol=rtol / 100)
    assert list(a.groups) == list(b.groups)
    for label in a.groups:
        close(a.groups[label].scale, b.groups[label].scale)
        assert a.groups[label].losses.keys() == b.groups[label].losses.keys()
        close(torch.tensor(list(a.groups[label].losses.values())), torch.tensor(list(b.groups[label].losses.values())))
        for x, y in zip(a.tokens[label], b.tokens[label], strict=True):
            close(x, y)


# Token weights


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**20), st.sampled_from(["qig", "uniform"]))
def test_token_weights_are_shares(batch: int, length: int, seed: int, sensitivity: str) -> None:
    """Non-negative, a sample's sum is one, one weight per token; and no chosen loss is above that of plain rounding."""
    found = calibrate(build(1), [{"input_ids": tokens(batch, length, seed)}], steps=[SCALES(sensitivity)])
    for label, group in found.groups.items():
        told = found.token_weights(label)
        weights = torch.stack(told.weights)
        assert weights.shape == (batch, length)
        assert (weights >= 0).all()
        torch.testing.assert_close(weights.sum(1), torch.ones(batch))
        assert group.loss <= group.rounding_loss
        assert torch.isfinite(told.completeness_error).all() == (sensitivity == "qig")


@settings(max_examples=40)
@given(st.lists(st.integers(1, 2), min_size=1, max_size=3), st.sampled_from([1, 2, None]), st.randoms(use_true_random=False))
def test_batches_pieces_and_order_do_not_matter(sizes: list[int], micro_batch: int | None, random: Any) -> None:
    """However samples are batched, cut and ordered: the same scales, the same weights for the same sample."""
    model, ids = build(1), tokens(sum(sizes), 8)
    together = calibrate(model, [ids])
    order = list(range(len(ids)))
    random.shuffle(order)
    apart = calibrate(model, [{"input_ids": part} for part in ids[order].split(sizes)], running=Running(micro_batch=micro_batch))
    for label in together.groups:
        torch.testing.assert_close(apart.groups[label].scale, together.groups[label].scale, rtol=1e-4, atol=0)
        assert apart.groups[label].loss == pytest.approx(together.groups[label].loss, rel=1e-4)
        for place, sample in enumerate(order):
            torch.testing.assert_close(apart.tokens[label][place], together.tokens[label][sample], rtol=1e-3, atol=1e-5)


def test_as_many_samples_as_tokens() -> None:
    """Batch and time have the same size: nothing is cut along the wrong one."""
    model, _ = qwen2()
    batches = [tokens(9, 5), tokens(7, 7), tokens(4, 4)]
    every = partial(calibrate, model, steps=[SCALES(search="exhaustive")])
    apart = every([row[None] for ids in batches for row in ids])
    assert_same(every(batches), apart, rtol=1e-2)
    assert_same(every(batches, running=Running(micro_batch=2)), apart, rtol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_counts_in_nothing(side: str) -> None:
    """A padded batch gives what the samples give one by one; padding weighs nothing."""
    model, _ = qwen2()
    samples = [tokens(1, n, n)[0] for n in (9, 5, 12)]
    apart = calibrate(model, [{"input_ids": s[None]} for s in samples])
    width = 15
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, s in enumerate(samples):
        at = slice(width - len(s), width) if side == "left" else slice(0, len(s))
        ids[row, at], mask[row, at] = s, 1
    padded = calibrate(model, [{"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}])
    for label in apart.groups:
        assert padded.groups[label].loss == pytest.approx(apart.groups[label].loss, rel=1e-3)
        torch.testing.assert_close(padded.groups[label].x_mean, apart.groups[label].x_mean, rtol=1e-4, atol=1e-6)
        told = padded.token_weights(label)
        for row, weights in enumerate(told.weights):
            assert not weights[mask[row] == 0].any()
            torch.testing.assert_close(weights[mask[row] == 1], apart.tokens[label][row], rtol=1e-2, atol=1e-4)
            assert ((told.modality[row] == MODALITIES["padding"]) == (mask[row] == 0)).all()


def test_uniform_equals_qig_on_samples_of_one_token() -> None:
    model, batch = build(), {"input_ids": tokens(3, 1)}
    assert_same(calibrate(model, [batch]), calibrate(model, [batch], steps=[SCALES("uniform")]))


def test_modalities_are_told_apart() -> None:
    """Image tokens by the model's own image token id; labels mark answers."""
    model, inputs = llava_onevision()
    labels = inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 18, -100)
    found = torchao_qig.calibrate(model, [inputs | {"labels": labels}], QUICK())
    told = found.token_weights("model.language_model.layers.1.mlp")
    assert told.modality[0].tolist() == [1] * 4 + [2] * 10 + [1] * 4 + [3] * 4
    by_modality = torchao_qig.calibrate(model, [inputs | {"labels": labels}], QUICK(steps=[SCALES("modality")]))
    weights = by_modality.token_weights("model.language_model.layers.1.mlp").weights[0]
    assert len(weights[told.modality[0] == 2].unique()) == 1
    assert not weights[told.modality[0] == 1].any()
    with pytest.raises(ValueError, match="vision_mask"):
        torchao_qig.calibrate(qwen2()[0], [qwen2()[1]], QUICK(steps=[SCALES("modality")]))


def test_warmup_groups_are_uniform() -> None:
    found = calibrate(build(), [{"input_ids": tokens()}], steps=[SCALES(QIG(warmup_groups=3))])
    assert [g.weighting for g in found.groups.values()] == ["uniform"] * 3 + ["qig"] * 5


def test_completeness() -> None:
    """The default rule's attributions add up; the paper's 32 points miss by their 1/32 where a linear stands alone."""
    model, batch = build(), {"input_ids": tokens(4, 12)}
    for label in calibrate(model, [batch]).groups:
        assert calibrate(model, [batch]).token_weights(label).completeness_error.max() < 0.02
    paper = calibrate(model, [batch], steps=[SCALES(QIG("riemann"))]).token_weights("blocks.0.mlp.down").completeness_error
    torch.testing.assert_close(paper, torch.full((4,), 1 / 32), rtol=1e-3, atol=0)


@pytest.mark.parametrize("loss", ["mae", "mse"])
def test_coarse_search_is_close_to_the_exhaustive_one(loss: str) -> None:
    model, batch = build(), {"input_ids": tokens(6, 16)}
    every, some = (calibrate(model, [batch], steps=[SCALES(loss=loss, grid=20, search=s)]) for s in ("exhaustive", "coarse"))
    for label, group in some.groups.items():
        assert every.groups[label].losses[group.winner] <= 1.05 * every.groups[label].loss
        assert group.loss == pytest.approx(every.groups[label].losses[group.winner], rel=1e-4)
        assert len(every.groups[label].losses) == 20


# The model and its surroundings


def state_of(model: nn.Module) -> Any:
    hooks = sum(len(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks))
    own = [sorted(m.__dict__) for m in model.modules()]
    return {n: (p.clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()}, [m.training for m in model.modules()], hooks, own


def assert_untouched(model: nn.Module, before: Any) -> None:
    after = state_of(model)
    assert after[1:] == before[1:]
    for name, (value, needs, grad) in after[0].items():
        assert torch.equal(value, before[0][name][0])
        assert (needs, grad) == before[0][name][1:]


@pytest.mark.parametrize("trainable", [True, False])
def test_model_is_only_read(trainable: bool) -> None:
    """Parameters, gradients, training flags (mixed), hooks and instance attributes are as before; dropout plays no role."""
    model, inputs = qwen2()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    expected = calibrate(model, [inputs])
    model.train()
    model.model.layers[1].eval()
    model.requires_grad_(trainable)
    before = state_of(model)
    assert_same(calibrate(model, [inputs]), expected, exactly=True)
    assert_untouched(model, before)
    assert model.config.use_cache is True


def test_surroundings_do_not_matter() -> None:
    """inference_mode, no_grad and autocast of the caller, gradient checkpointing, a cache."""
    model, inputs = qwen2()
    expected = calibrate(model, [inputs])
    with torch.inference_mode():
        made_here = {k: v.clone() for k, v in inputs.items()}
        assert_same(calibrate(model, [made_here]), expected, exactly=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert_same(calibrate(model, [inputs]), expected, exactly=True)
    model.gradient_checkpointing_enable()
    model.train()
    assert_same(calibrate(model, [inputs | {"use_cache": True}]), expected, exactly=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, compute: torch.dtype) -> None:
    """Any model dtype, computed in float32 or bfloat16: finite, below plain rounding, close to what float32 finds."""
    model, inputs = llava_onevision(dtype)
    every = partial(QUICK, steps=[SCALES(search="exhaustive")])
    exact = torchao_qig.calibrate(llava_onevision()[0], [llava_onevision()[1]], every())
    found = torchao_qig.calibrate(model, [inputs], every(running=Running(compute_dtype=compute)))
    for label, group in found.groups.items():
        assert group.loss <= group.rounding_loss
        assert group.loss == pytest.approx(exact.groups[label].loss, rel=0.1)


# Loaders


def test_loaders() -> None:
    """Dicts, tuples, tensors, a DataLoader, a generator, a datasets.Dataset: the same calibration."""
    import datasets

    model, ids = build(), tokens(4, 8)
    expected = calibrate(model, [{"input_ids": ids[:2]}, {"input_ids": ids[2:]}])
    for loader in (
        [(ids[:2],), (ids[2:],)],
        [ids[:2], ids[2:]],
        torch.utils.data.DataLoader([{"input_ids": row} for row in ids], batch_size=2),
        (ids[i : i + 2] for i in (0, 2)),
        datasets.Dataset.from_dict({"input_ids": ids.tolist(), "caption": ["a", "b", "c", "d"]}),
        datasets.Dataset.from_dict({"input_ids": ids.tolist()}).with_format("torch"),
    ):
        assert_same(calibrate(model, loader), expected)


def test_ragged_batches() -> None:
    model = build()
    found = calibrate(model, [tokens(2, 7), tokens(3, 11), tokens(1, 4)])
    assert [len(w) for w in found.token_weights("blocks.1.mlp").weights] == [7, 7, 11, 11, 11, 4]


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "no batch"),
        (tokens(), TypeError, "one batch goes into a list"),
        ({"input_ids": tokens()}, TypeError, "one batch goes into a list"),
        (3, TypeError, "calib=int"),
        ([{"input_ids": tokens(), "pixels": torch.randn(2, 3)}], ValueError, "pixels"),
        ([{"input_ids": torch.full((1, 3), 99)}], ValueError, "cannot run batch 0"),
        ([("a", "b")], TypeError, "without tensors"),
        (["what is it?", "who is it?"], TypeError, "got str without tensors"),
        ([{"input_ids": tokens()}, {"input_ids": torch.full((1, 3), 99)}], ValueError, "cannot run batch 1.*out of range"),
    ],
)
def test_bad_loaders_leave_the_model_alone(loader: Any, error: type[Exception], message: str) -> None:
    model = build()
    before = state_of(model)
    with pytest.raises(error, match=message):
        calibrate(model, loader)
    assert_untouched(model, before)


# The result


def test_save_and_load(tmp_path: Path) -> None:
    found = calibrate(build(), [tokens(3, 9), tokens(2, 6)])
    found.save(tmp_path / "c")
    assert sorted(os.listdir(tmp_path / "c")) == ["calibration.json", "calibration.safetensors"]
    loaded = Calibration.load(tmp_path / "c")
    assert_same(loaded, found, exactly=True)
    assert (loaded.settings, loaded.grids, loaded.summary()) == (found.settings, found.grids, found.summary())
    told, again = found.token_weights("blocks.1.mlp"), loaded.token_weights("blocks.1.mlp.up")
    assert torch.equal(told.completeness_error, again.completeness_error)
    assert all(torch.equal(a, b) for a, b in zip(told.modality, again.modality, strict=True))
    with pytest.raises(KeyError, match=r"blocks\.7"):
        found.token_weights("blocks.7.mlp")
    with pytest.raises(FileNotFoundError, match=r"calibration\.json"):
        Calibration.load(tmp_path)


def test_deep_copies_of_the_model_give_the_same() -> None:
    model, batch = build(), [tokens()]
    assert_same(calibrate(copy.deepcopy(model), batch), calibrate(model, batch), exactly=True)
