"""What one row of a file can look like."""

import base64
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.lvlm.conftest import COLOURS, png
from tests.lvlm.test_samples import caption, jsonl, said
from torchao_qig.lvlm.messages import as_messages
from torchao_qig.lvlm.pictures import located
from torchao_qig.lvlm.samples import PROMPT, Sample, read_samples

URL = "data:image/png;base64," + base64.b64encode(png(1)).decode()


TURNS: dict[str, tuple[dict[str, Any], list[tuple[str, list[str]]]]] = {
    "llava": (
        {
            "image": "dog.png",
            "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A dog."}, {"from": "human", "value": "So?"}],
        },
        [("user", ["<0>", "Who?"]), ("assistant", ["A dog."]), ("user", ["So?"])],
    ),
    "picture behind the text": (
        {"image": "dog.png", "conversations": [{"from": "human", "value": "Who?\n<image>"}, {"from": "gpt", "value": "A dog."}]},
        [("user", ["Who?", "<0>"]), ("assistant", ["A dog."])],
    ),
    "no place": (
        {"image": ["dog.png", "bus.png"], "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Who?"}]},
        [("system", ["Be brief."]), ("user", ["<0>", "<2>", "Who?"])],
    ),
    "text only": ({"image": None, "conversations": [{"from": "human", "value": "Hi"}]}, [("user", ["Hi"])]),
    "vqa": ({"image": "dog.png", "question": "Who?", "answer": "A dog."}, [("user", ["<0>", "Who?"]), ("assistant", ["A dog."])]),
    "answers": (
        {"images": ["bus.png", "dog.png"], "question": "First <image> or second <image>?", "answers": ["", "Both", "None"]},
        [("user", ["First", "<2>", "or second", "<0>", "?"]), ("assistant", ["Both"])],
    ),
    "openai": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "image_url", "image_url": {"url": URL}}]}]},
        [("user", ["Who?", "<1>"])],
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "and"}, {"type": "image"}]},
                {"role": "assistant", "content": "No."},
            ],
            "images": ["bus.png", "dog.png"],
        },
        [("user", ["<2>", "and", "<0>"]), ("assistant", ["No."])],
    ),
    "inline": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "bus.png"}, {"type": "image", "path": "file://dog.png"}, {"type": "text", "text": "?"}]}
            ]
        },
        [("user", ["<2>", "<0>", "?"])],
    ),
    "five captions": ({"image": "dog.png", "caption": ["", "A dog.", "Dog"]}, caption(0, "A dog.")),
    "text": ({"text": "All of it, <image> too."}, [("user", ["All of it, <image> too."])]),
    "captions may name the place": ({"image": "dog.png", "caption": "says <image>"}, caption(0, "says <image>")),
}


@pytest.mark.parametrize("name", TURNS)
def test_rows(name: str, pictures: Path) -> None:
    row, wanted = TURNS[name]
    assert said(read_samples(jsonl(pictures / "rows.jsonl", [row]))[0]) == wanted


def test_pil_images_and_stored_dicts() -> None:
    """What a data set in memory holds."""
    for image in (Image.new("RGB", (8, 8), COLOURS[2]), {"bytes": png(2), "path": "bus.png"}, png(2)):
        messages = as_messages({"image": image, "caption": "A bus."}, PROMPT, lambda value: located(value, Path(), True))
        assert said(Sample(messages, "")) == caption(2, "A bus.")
