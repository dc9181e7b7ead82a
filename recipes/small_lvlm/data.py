"""Pictures with questions, by number: `sample("test", 7)` is the same on every machine.

The checksum of a scene's description decides which split the scene belongs to. So no scene of one split occurs in another, whatever
the seeds. The training split has other images of handwritten digits than the other splits.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from recipes.small_lvlm.worlds import charts, digits, maps, objects, text
from recipes.small_lvlm.worlds.canvas import Canvas, Mark, one_of

WORLDS = (objects, text, charts, digits, maps)
SPLITS = {"test": (0,), "validation": (1,), "calibration": (2,), "train": range(3, 16)}
FAMILIES = ("attribute", "counting", "spatial", "multistep", "ocr", "chart")


@dataclass(frozen=True)
class Question:
    family: str  # one of FAMILIES, or "caption"
    text: str
    answer: str


@dataclass(frozen=True)
class Sample:
    pixels: np.ndarray  # (side, side, 3), uint8
    questions: tuple[Question, ...]
    patches: list[Mark]  # what each patch shows
    scene: str  # the description, as text


def scene_of(split: str, rng: random.Random) -> tuple[object, object]:
    """A kind of picture, and a random scene of that kind that belongs to the split."""
    world = rng.choice(WORLDS)
    while True:
        scene = world.describe(rng, split != "train") if world is digits else world.describe(rng)
        if zlib.crc32(repr(scene).encode()) % 16 in SPLITS[split]:
            return world, scene


def sample(split: str, number: int) -> Sample:
    """The picture with this number and all questions about it; the first one asks for a caption."""
    rng = random.Random(f"{split} {number}")
    world, scene = scene_of(split, rng)
    canvas = Canvas.blank(rng)
    world.draw(scene, canvas, rng)  # type: ignore[attr-defined]
    asked = {question: Question(family, question, answer) for family, question, answer in world.questions(scene, rng)}  # type: ignore[attr-defined]
    ask = one_of(rng, "describe the picture.", "what is in the picture?")
    caption = Question("caption", ask, world.caption(scene))  # type: ignore[attr-defined]
    return Sample(canvas.pixels, (caption, *asked.values()), canvas.patches(), f"{world.__name__}: {scene!r}")  # type: ignore[attr-defined]


def chosen(split: str, count: int, per_image: int = 4) -> Iterator[Sample]:
    """Samples with a caption and `per_image` questions each, families as evenly as the pictures allow."""
    seen = dict.fromkeys(FAMILIES, 0)
    for number in range(count):
        full = sample(split, number)
        rng = random.Random(f"choice {split} {number}")
        rest = list(full.questions[1:])
        rng.shuffle(rest)
        picked: list[Question] = []
        for _ in range(min(per_image, len(rest))):
            question = min(rest, key=lambda q: seen[q.family])
            seen[question.family] += 1
            rest.remove(question)
            picked.append(question)
        yield replace(full, questions=(full.questions[0], *picked))


def corpus(count: int) -> Iterator[str]:
    """Questions and answers of the training split, for the tokenizer."""
    for number in range(count):
        for question in sample("train", number).questions:
            yield question.text
            yield question.answer
