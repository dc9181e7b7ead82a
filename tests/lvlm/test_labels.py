"""Which tokens of a chat are answers, whatever its template is."""

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests import tiny_dirs, tiny_models
from tests.lvlm.test_data import BAR, FAMILIES, PROCESSOR, TOKENIZER, chat, check, labelled
from torchao_qig.lvlm.chat import Chat
from torchao_qig.lvlm.data import IGNORED, calibration_batches
from torchao_qig.watch.batches import read


def picture(width: int = 40, height: int = 30) -> Image.Image:
    return Image.new("RGB", (width, height), (9, 90, 200))


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
