"""Samples to batches for every family of processor: what models see, which tokens are pictures and answers, how batches are filled."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import torchao_qig
from tests import tiny_dirs, tiny_models
from torchao_qig.lvlm.data import IGNORED, WASTE, Batches, calibration_batches, packed
from torchao_qig.lvlm.load import load_model, load_processor
from torchao_qig.lvlm.mixes import few_shot, interleaved
from torchao_qig.lvlm.samples import Sample, Samples, read_samples
from torchao_qig.watch.batches import read

BAR = "\u00a6"  # between labels, where tokens have none
SIZES = [(30, 20), (60, 28), (28, 60), (56, 56), (90, 40), (28, 28)]
FAMILIES = [family for family in tiny_dirs.PROCESSORS if family != "qwen2"]


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    """Six pictures of different sizes with captions of different lengths."""
    folder = tmp_path_factory.mktemp("captions")
    rows = []
    for i, size in enumerate(SIZES):
        Image.effect_mandelbrot(size, (-2, -1, 1, 1), 9).convert("RGB").save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"Picture {i}: " + "it is a set. " * i})
    (folder / "coco.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_samples(folder / "coco.jsonl")


def chat(*turns: str | tuple[Any, str], source: str = "here") -> Sample:
    """Question, answer, question...; a pair is a picture with its question."""
    messages = []
    for i, turn in enumerate(turns):
        parts = [{"type": "text", "text": turn if isinstance(turn, str) else turn[1]}]
        if not isinstance(turn, str):
            parts.insert(0, {"type": "image", "image": turn[0]})
        messages.append({"role": ("user", "assistant")[i % 2], "content": parts})
    return Sample(messages, source)


def answers_of(sample: Sample) -> list[str]:
    return [part["text"] for m in sample.messages if m["role"] == "assistant" for part in m["content"]]


def labelled(batch: dict[str, torch.Tensor], tokenizer: Any, row: int) -> str:
    """The text of the row's labels, a bar where tokens between them have none."""
    text, before = "", False
    for label in batch["labels"][row].tolist():
        text += tokenizer.decode([label]) if label != IGNORED else BAR if before else ""
        before = label != IGNORED
    return text.strip(BAR)


def check(batches: Batches, samples: list[Sample] | Samples, tokenizer: Any) -> None:
    """Each sample once; labels are the answers; padding is at the end and has no labels."""
    assert sorted(i for rows in batches.rows for i in rows) == list(range(len(samples)))
    for batch, rows, lengths in zip(batches, batches.rows, batches.lengths, strict=True):
        assert batch["input_ids"].shape == batch["labels"].shape == (len(rows), max(lengths))
        assert batch["attention_mask"].sum(1).tolist() == lengths
        for k, (i, length) in enumerate(zip(rows, lengths, strict=True)):
            assert batch["attention_mask"][k, :length].all()
            assert (batch["labels"][k, length:] == IGNORED).all()
            real = batch["labels"][k] != IGNORED
            assert torch.equal(batch["labels"][k][real], batch["input_ids"][k][real])
            assert labelled(batch, tokenizer, k) == BAR.join(f"{answer}<|end|>" for answer in answers_of(samples[i]))


MIXES: dict[str, Callable[[Samples], Any]] = {
    "captions": lambda samples: samples,
    "few shot": lambda samples: few_shot(samples, 1),
    "interleaved": lambda samples: interleaved(samples, 2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, captions: Samples, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From a directory and a file to logits: labels, picture tokens, finite outputs; nothing is warned about."""
    model, processor = load_model(str(tiny_dirs.directory(family, tmp_path))), load_processor(str(tmp_path))
    state = copy.deepcopy(processor.tokenizer.init_kwargs), processor.tokenizer.padding_side, processor.tokenizer.pad_token
    for name, mix in MIXES.items():
        samples = mix(captions)
        caplog.clear()  # what loading says
        with caplog.at_level(logging.WARNING, "transformers"):
            batches = calibration_batches(samples, processor, tokens=320)
        assert not caplog.records
        check(batches, samples, processor.tokenizer)
        assert not batches.skipped
        assert name != "captions" or max(len(rows) for rows in batches.rows) > 1
        for batch, seen in zip(batches, read(model, batches), strict=True):
            vision = batch["input_ids"] == tiny_models.IMAGE
            assert torch.equal(seen.masks.vision, vision)
            assert vision.any(1).all()
            assert torch.equal(seen.masks.counted, batch["attention_mask"] != 0)
            assert torch.equal(seen.masks.answer, batch["labels"] != IGNORED)
            assert not (seen.masks.vision & seen.masks.answer).any()
            with torch.no_grad():
                assert model(**batch).logits.isfinite().all()
    assert state == (processor.tokenizer.init_kwargs, processor.tokenizer.padding_side, processor.tokenizer.pad_token)


@pytest.mark.parametrize("family", ["llava_onevision", "smolvlm", "qwen2_vl"])
def test_a_sample_in_a_batch_is_the_sample_alone(family: str, captions: Samples, tmp_path: Path) -> None:
    """The same logits at real tokens."""
    model, processor = load_model(str(tiny_dirs.directory(family, tmp_path))), load_processor(str(tmp_path))
    together, alone = (calibration_batches(captions, processor, tokens=tokens) for tokens in (400, 1))
    assert [len(rows) for rows in alone.rows] == [1] * 6
    assert len(together) < 6
    with torch.no_grad():
        single = {rows[0]: model(**batch).logits[0] for batch, rows in zip(alone, alone.rows, strict=True)}
        for batch, rows, lengths in zip(together, together.rows, together.lengths, strict=True):
            for row, length, logits in zip(rows, lengths, model(**batch).logits, strict=True):
                torch.testing.assert_close(logits[:length], single[row], rtol=1e-4, atol=1e-4)


def test_calibrate(captions: Samples, tmp_path: Path) -> None:
    """A calibration from a file of captions, some samples to a batch; the batches can be read again."""
    model, processor = load_model(str(tiny_dirs.directory("llava_onevision", tmp_path))), load_processor(str(tmp_path))
    batches = calibration_batches(captions, processor, tokens=320)
    assert max(map(len, batches.rows)) > 1
    for method in ("default", "gptq-modality"):
        config = torchao_qig.QIGWeightOnlyConfig(bits=3, group_size=64, method=method, verbose=False)
        first, second = (torchao_qig.calibrate(model, batches, config) for _ in range(2))
        assert first.summary().rsplit("samples,", 1)[0] == second.summary().rsplit("samples,", 1)[0]  # without time and memory
        assert "layers.1.mlp.down_proj" in " ".join(first.grids)


PROCESSOR, TOKENIZER = tiny_dirs.PROCESSORS["llava_onevision"](), tiny_dirs.text()


def test_too_long(captions: Samples) -> None:
    """Longer samples are skipped whole and named; none is cut."""
    every = calibration_batches(captions, PROCESSOR)
    tokens = {row: n for rows, lengths in zip(every.rows, every.lengths, strict=True) for row, n in zip(rows, lengths, strict=True)}
    limit = sorted(tokens.values())[2]
    some = calibration_batches(captions, PROCESSOR, max_length=limit)
    assert sorted(i for rows in some.rows for i in rows) == [i for i in range(6) if tokens[i] <= limit]
    assert sorted(some.skipped["too long"]) == sorted(f"{captions[i].source} ({n} tokens, max_length={limit})" for i, n in tokens.items() if n > limit)
    with pytest.raises(ValueError, match=r"none of 6 can be used with .*too long: coco.jsonl"):
        calibration_batches(captions, PROCESSOR, max_length=3)


@pytest.mark.parametrize("argument", ["tokens", "max_length"])
def test_arguments(argument: str, captions: Samples) -> None:
    with pytest.raises(ValueError, match=f"{argument}=0: must be at least 1"):
        calibration_batches(captions, PROCESSOR, **{argument: 0})
    with pytest.raises(ValueError, match="none of 0 can be used"):
        calibration_batches([], PROCESSOR)


def test_a_processor_that_takes_one_sample_at_a_time(captions: Samples) -> None:
    """Pictures of different sizes cannot always be stacked: then every sample is a batch."""

    class Single(type(PROCESSOR)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if len(kwargs.get("images") or [[]]) > 1:
                raise ValueError("Unable to convert output to tensors")
            return super().__call__(*args, **kwargs)

    processor = copy.copy(PROCESSOR)
    processor.__class__ = Single
    batches = calibration_batches(captions, processor)
    check(batches, captions, PROCESSOR.tokenizer)
    assert all(len(rows) == 1 for rows in batches.rows)


def test_deterministic_and_described(captions: Samples) -> None:
    first, second = (calibration_batches(captions, PROCESSOR, tokens=320) for _ in range(2))
    assert first.rows == second.rows
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, second, strict=True) for k in a)
    tokens = [int(batch["attention_mask"].sum()) for batch in first]
    shares = first.shares()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["picture"] == sum(int((b["input_ids"] == tiny_models.IMAGE).sum()) for b in first) / sum(tokens)
    assert shares["answer"] == sum(int((b["labels"] != IGNORED).sum()) for b in first) / sum(tokens)
    assert first.padding == pytest.approx(1 - sum(tokens) / sum(b["input_ids"].numel() for b in first))
    each = sorted(n for lengths in first.lengths for n in lengths)
    assert f"6 samples in {len(first)} batches, {sum(tokens)} tokens, {first.padding:.1%} padding" in first.summary()
    assert f"tokens per sample: {each[0]} to {each[-1]}, median {each[3]}" in first.summary()


@given(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 600), st.sampled_from([0.0, 0.05, WASTE, 0.5]))
def test_packed(lengths: list[int], tokens: int, waste: float) -> None:
    """Every sample once, within budget and waste; a batch ends only where one of them would break; order is fixed."""
    batches = packed(lengths, tokens, waste)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)
    for batch, after in zip(batches, [*batches[1:], None], strict=False):
        size = len(batch) * lengths[batch[0]]
        assert size <= tokens or len(batch) == 1
        assert sum(lengths[i] for i in batch) >= (1 - waste) * size
        if after is not None:
            more = size + lengths[batch[0]]
            assert more > tokens or sum(lengths[i] for i in [*batch, after[0]]) < (1 - waste) * more


@settings(max_examples=50)
@given(st.permutations(range(6)))
def test_order_given_does_not_matter_for_content(captions_order: list[int]) -> None:
    """The same samples in another order: the same tokens in total, each under its new number."""
    samples = [chat("Who?", "a" * (i + 1)) for i in range(6)]
    batches = calibration_batches([samples[i] for i in captions_order], TOKENIZER)
    for batch, rows in zip(batches, batches.rows, strict=True):
        for k, row in enumerate(rows):
            assert labelled(batch, TOKENIZER, k) == "a" * (captions_order[row] + 1) + "<|end|>"
