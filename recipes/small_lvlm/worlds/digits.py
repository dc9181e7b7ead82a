"""Handwritten digits (scikit-learn's) on a grid of three rows and three columns. The training split has other images than the other splits."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from recipes.small_lvlm.worlds.canvas import NUMBERS, Canvas, one_of, origin, place

CELLS = 3
STEP = 32  # pixels


@dataclass(frozen=True)
class Digit:
    row: int
    column: int
    image: int  # number in scikit-learn's set
    value: int


@functools.cache
def images() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.uint8), data.target


def describe(rng: random.Random, held_out: bool) -> tuple[Digit, ...]:
    cells = sorted(rng.sample(range(CELLS * CELLS), rng.randrange(2, 6)))
    _, values = images()
    chosen = [rng.choice([i for i in (rng.randrange(len(values)) for _ in range(64)) if (i % 5 == 0) == held_out]) for _ in cells]
    return tuple(Digit(*divmod(cell, CELLS), image, int(values[image])) for cell, image in zip(cells, chosen, strict=True))


def draw(digits: tuple[Digit, ...], canvas: Canvas, rng: random.Random) -> None:
    left, top = origin(rng, CELLS * STEP)
    for digit in digits:
        ink = images()[0][digit.image].repeat(4, 0).repeat(4, 1).astype(np.int16) * 15
        x, y = left + digit.column * STEP, top + digit.row * STEP
        region = canvas.pixels[y : y + 32, x : x + 32]
        np.maximum(region, ink[..., None].astype(np.uint8), out=region)
        canvas.mark(x, y, x + 32, y + 32, f"digit {digit.value}", "white", digit.row, digit.column)


def caption(digits: tuple[Digit, ...]) -> str:
    return ", ".join(f"{place(digit.row, digit.column)} digit {NUMBERS[digit.value]}" for digit in digits)


def questions(digits: tuple[Digit, ...], rng: random.Random) -> Iterator[tuple[str, str, str]]:
    at = {(digit.row, digit.column): digit for digit in digits}
    values = [digit.value for digit in digits]
    for digit in rng.sample(digits, 2):
        where = place(digit.row, digit.column)
        yield "ocr", one_of(rng, f"which digit is at {where}?", f"read the digit at {where}."), NUMBERS[digit.value]
    yield "ocr", one_of(rng, "read all digits.", "which digits are there?"), " ".join(NUMBERS[value] for value in values)
    single = [digit for digit in digits if values.count(digit.value) == 1]
    if single:
        digit = rng.choice(single)
        yield "spatial", one_of(rng, f"where is the {NUMBERS[digit.value]}?", f"at which place is the {NUMBERS[digit.value]}?"), place(digit.row, digit.column)
    cell = (rng.randrange(CELLS), rng.randrange(CELLS))
    yield "spatial", f"is there a digit at {place(*cell)}?", "yes" if cell in at else "no"
    row = rng.randrange(CELLS)
    yield "counting", one_of(rng, "how many digits are there?", "count the digits."), NUMBERS[len(digits)]
    yield "counting", f"how many digits are in row {NUMBERS[row + 1]}?", NUMBERS[sum(digit.row == row for digit in digits)]
    level = rng.randrange(2, 8)
    yield "counting", f"how many digits are higher than {NUMBERS[level]}?", NUMBERS[sum(value > level for value in values)]
    yield "multistep", "what is the highest digit?", NUMBERS[max(values)]
    yield "multistep", "what is the lowest digit?", NUMBERS[min(values)]
    a, b = rng.sample(digits, 2)
    if a.value != b.value:
        yield "multistep", f"is the digit at {place(a.row, a.column)} higher than the digit at {place(b.row, b.column)}?", "yes" if a.value > b.value else "no"
