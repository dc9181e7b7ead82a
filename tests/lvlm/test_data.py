"""Samples to batches for every family of processor: what models see, which tokens are pictures and answers, how batches are filled."""

import copy
import json
import logging
from collections import Counter
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
from torchao_qig.lvlm.chat import Chat
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


def picture(width: int = 40, height: int = 30) -> Image.Image:
    return Image.new("RGB", (width, height), (9, 90, 200))


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


@pytest.fixture(scope="module")
def text() -> Any:
    return tiny_dirs.text()


WORDS = st.text(st.sampled_from("ab <|>.\n"), min_size=1, max_size=12).map(str.strip).filter(bool)


@given(st.lists(WORDS, min_size=1, max_size=7), st.booleans())
def test_labels_of_any_conversation(turns: list[str], with_picture: bool) -> None:
    """Whatever is said, repeated or looking like the template: labels are the answers."""
    processor = PROCESSOR if with_picture else PROCESSOR.tokenizer
    sample = chat(*turns)
    if with_picture:
        for message in sample.messages[::2]:
            message["content"].insert(0, {"type": "image", "image": picture()})
    batches = calibration_batches([sample], processor if with_picture else TOKENIZER)
    check(batches, [sample], TOKENIZER)


PROCESSOR, TOKENIZER = tiny_dirs.PROCESSORS["llava_onevision"](), tiny_dirs.text()


@given(st.lists(WORDS, min_size=1, max_size=5), st.sampled_from(["", "\n", "\n\n", " \n"]), st.booleans())
def test_what_follows_the_end_of_a_turn(turns: list[str], gap: str, with_picture: bool) -> None:
    """A turn ends otherwise than a document (Gemma): white space behind the end is never generated, so it has no label."""
    processor = tiny_dirs.llava_onevision()
    tokenizer = processor.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<eos>"]})
    tokenizer.eos_token = "<eos>"
    processor.chat_template = processor.chat_template.replace("<|end|>", "<|end|>{{ '" + gap.replace("\n", "\\n") + "' }}")
    sample = chat(*turns)
    for message in sample.messages[::2] if with_picture else []:
        message["content"].insert(0, {"type": "image", "image": picture()})
    check(calibration_batches([sample], processor), [sample], tokenizer)


HEADERS = "{% for m in messages %}<|{{ m.role }}|>"
BODY = "{% for part in m.content %}{{ part.text }}{% endfor %}"
ASKS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATES = {
    "text instead of parts": (
        HEADERS + "{{ m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        f"Yes.<|end|>{BAR}No.<|end|>",
    ),
    "marks its answers": (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}" + BODY + "{% endgeneration %}{% else %}" + BODY + "{% endif %}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
        f"Yes.{BAR}No.",
    ),
    "a prompt that goes on": (
        HEADERS + BODY + "<|end|>{{ '\\n' }}{% endfor %}" + ASKS.replace("<|assistant|>", "<|assistant|><think>\n"),
        f"Yes.<|end|>{BAR}No.<|end|>",
    ),
    "a space before answers": (
        "{% for m in messages %}{{ m.role }}: " + BODY + "<|end|>{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
        f" Yes.<|end|>{BAR} No.<|end|>",
    ),
    "the last answer has thoughts": (
        HEADERS + "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}" + BODY + "<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        f"Yes.{BAR}<think></think>No.<|end|>",
    ),
    "a prompt that begins otherwise": ("{% if add_generation_prompt %}!{% endif %}" + HEADERS + BODY + "<|end|>{% endfor %}" + ASKS, f"Yes.{BAR}No."),
    "no end of turns": (
        "{% for m in messages %}[{{ m.role }}] " + BODY + "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
        f"Yes.\n{BAR}No.\n",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates(name: str) -> None:
    """Answers are found whatever a template does around them."""
    template, wanted = TEMPLATES[name]
    tokenizer = tiny_dirs.text()
    tokenizer.chat_template = template
    batches = calibration_batches([chat("Is it?", "Yes.", "Was it?", "No.")], tokenizer)
    assert labelled(batches[0], tokenizer, 0) == wanted
    assert tokenizer.decode(batches[0]["input_ids"][0]).count("Is it?") == 1


def test_template_that_hides_answers() -> None:
    """A clear refusal, and a way to do without."""
    tokenizer = tiny_dirs.text()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}{{ part.text | upper }}{% endfor %}{% endfor %}"
    with pytest.raises(ValueError, match=r"refused by the processor: here .*does not write the answer of turn 2 as it is; pass answers=False"):
        calibration_batches([chat("Is it?", "Yes.")], tokenizer)
    batches = calibration_batches([chat("Is it?", "Yes.")], tokenizer, answers=False)
    assert "labels" not in batches[0]
    assert tokenizer.decode(batches[0]["input_ids"][0]) == "<|user|>IS IT?<|assistant|>YES."


def test_template_that_writes_nothing() -> None:
    tokenizer = tiny_dirs.text()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.words }}{% endfor %}"
    with pytest.raises(ValueError, match=r"neither as parts nor as text: it writes no text; set processor.chat_template"):
        calibration_batches([chat("Is it?", "Yes.")], tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_base_models(family: str) -> None:
    """Without a chat template: the picture's token and the text, where the processor takes that; the answer is labelled."""
    processor = tiny_dirs.PROCESSORS[family]()
    processor.chat_template = None
    model = getattr(tiny_models, family)()[0]
    if hasattr(model.config, "image_grid_pinpoints"):
        model.config.image_grid_pinpoints = tiny_dirs.PINPOINTS
    samples = [chat((picture(), "Who?"), "A dog."), chat((picture(60, 30), "Why?"), "So.", "Oh?", "No.")]
    batches = calibration_batches(samples, processor)
    said = {row: labelled(batch, processor.tokenizer, k) for batch, rows in zip(batches, batches.rows, strict=True) for k, row in enumerate(rows)}
    assert said == {0: "A dog.", 1: f"So.{BAR}No."}
    for batch, seen in zip(batches, read(model, batches), strict=True):
        assert torch.equal(seen.masks.vision, batch["input_ids"] == tiny_models.IMAGE)
        assert seen.masks.vision.any(1).all()
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()


def test_base_model_without_a_place_for_pictures() -> None:
    class Odd:
        chat_template, image_processor, tokenizer = None, object(), tiny_dirs.tokenizer({})

    with pytest.raises(ValueError, match=r"Odd has no chat template, and takes no picture in plain text: it names no image token. Set processor.chat_template"):
        calibration_batches([chat((picture(), "Who?"), "A dog.")], Odd())


def test_base_text_model(text: Any) -> None:
    tokenizer = tiny_dirs.tokenizer({})
    batches = calibration_batches([chat("Only this.")], tokenizer)
    assert tokenizer.decode(batches[0]["input_ids"][0]) == "Only this."
    assert (batches[0]["labels"] == IGNORED).all()


def test_text_models_skip_pictures(text: Any) -> None:
    samples = [chat((picture(), "Who?"), "A dog.", source="a"), chat("Who?", "A dog.", source="b")]
    batches = calibration_batches(samples, text)
    assert batches.rows == [[1]]
    assert list(batches.skipped) == ["refused by the processor"]
    assert "a (TokenizersBackend has no image processor" in batches.skipped["refused by the processor"][0]
    assert "has no image processor" in batches.skipped["refused by the processor"][0]
    assert "1 of 2 samples skipped: refused by the processor: a" in batches.summary()


def test_pictures_and_texts_apart() -> None:
    """Text alone is for a model that sees, too; it shares no batch with pictures."""
    samples = [chat((picture(), "Who?"), "A dog."), chat("Who is it then, do you know?", "A dog, a dog."), chat((picture(), "Why?"), "A cat.")]
    batches = calibration_batches(samples, PROCESSOR)
    assert sorted(batches.rows) == [[0, 2], [1]]
    check(batches, samples, PROCESSOR.tokenizer)
    assert ["pixel_values" in batch for batch in batches] == [1 not in rows for rows in batches.rows]


@pytest.mark.parametrize("family", FAMILIES)
def test_words_that_are_a_picture_token(family: str) -> None:
    """Text that spells the picture's token is refused, with and without a picture, instead of breaking the model."""
    processor = tiny_dirs.PROCESSORS[family]()
    words = f"Say {processor.tokenizer.decode([tiny_models.IMAGE])}"
    samples = [chat((picture(), "Who?"), "A dog.", source="a"), chat(words, "No.", source="b"), chat((picture(), words), "No.", source="c")]
    batches = calibration_batches(samples, processor)
    assert batches.rows == [[0]]
    assert sorted(place[0] for places in batches.skipped.values() for place in places) == ["b", "c"]
    reasons = {"gemma3": {"text holds the picture token"}}  # the others' processors count
    assert set(batches.skipped) == reasons.get(family, {"refused by the processor"})


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


def test_no_padding_token() -> None:
    """Pads all the same, and leaves the tokenizer as it was."""
    tokenizer = tiny_dirs.text()
    tokenizer.pad_token = None
    samples = [chat("Who is it, do you know?", "A dog."), chat("Who is it, do you know?", "A cat!!")]
    batches = calibration_batches(samples, tokenizer)
    assert batches.rows == [[1, 0]]
    check(batches, samples, tokenizer)
    assert tokenizer.pad_token is None


def test_left_padding_stays() -> None:
    tokenizer = tiny_dirs.text()
    tokenizer.padding_side = "left"
    samples = [chat("Who is it, do you know?", "A dog."), chat("Who is it, do you know?", "A cat!!")]
    check(calibration_batches(samples, tokenizer), samples, tokenizer)
    assert tokenizer.padding_side == "left"


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


def test_picture_token() -> None:
    """What pictures brought most of; newlines may be as many."""
    seen = Chat(PROCESSOR)
    assert seen.picture_token(Counter({199: 4, tiny_models.IMAGE: 4, 96: 4, tiny_models.VIDEO: 1})) == tiny_models.IMAGE
    assert seen.picture_token(Counter({199: 5, tiny_models.IMAGE: 4})) == 199
    assert seen.picture_token(Counter()) is None


def test_chat_shapes() -> None:
    """What is observed about a processor."""
    assert [(c.sees, c.plain, c.parts, c.marks) for c in (Chat(PROCESSOR), Chat(TOKENIZER), Chat(tiny_dirs.tokenizer({})))] == [
        (True, False, True, False),
        (False, False, True, False),
        (False, True, False, False),
    ]
