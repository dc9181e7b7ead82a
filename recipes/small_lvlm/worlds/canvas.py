"""Drawing by hand in numpy, so that a picture is the same bytes on every machine and with every release of an imaging library."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field

import numpy as np
from PIL import ImageFont

SIDE = 112  # pixels
PATCH = 16
LETTER = 16  # pixels from one letter to the next
COLORS = {
    "red": (220, 50, 47), "green": (60, 170, 70), "blue": (50, 100, 220), "yellow": (235, 205, 50),
    "purple": (150, 70, 180), "orange": (240, 130, 30), "white": (240, 240, 240), "pink": (245, 150, 190),
}  # fmt: skip
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@dataclass(frozen=True)
class Mark:
    """What a patch shows, and the row and column of that thing in the scene, counted from 0."""

    what: str = "nothing"
    color: str = "nothing"
    row: int = -1
    column: int = -1


@dataclass
class Canvas:
    """A picture, and `marks` that say what is where in it. Only the training of the vision tower reads the marks."""

    pixels: np.ndarray
    marks: list[tuple[tuple[int, int, int, int], Mark]] = field(default_factory=list)  # (x0, y0, x1, y1), what is there

    @classmethod
    def blank(cls, rng: random.Random) -> Canvas:
        """A dark background with a tint and noise."""
        tint = np.array([rng.randrange(20, 60) for _ in range(3)], np.int16)
        noise = np.frombuffer(rng.randbytes(SIDE * SIDE), np.uint8).reshape(SIDE, SIDE, 1) % 16
        return cls((tint + noise).astype(np.uint8))

    def fill(self, x: int, y: int, mask: np.ndarray, color: str | tuple[int, int, int]) -> None:
        """Color the pixels where `mask` is True. The upper left corner of the mask is at (x, y)."""
        height, width = mask.shape
        self.pixels[y : y + height, x : x + width][mask] = COLORS[color] if isinstance(color, str) else color

    def box(self, x0: int, y0: int, x1: int, y1: int, color: str | tuple[int, int, int]) -> None:
        self.pixels[y0:y1, x0:x1] = COLORS[color] if isinstance(color, str) else color

    def text(self, x: int, y: int, letters: str, color: str | tuple[int, int, int]) -> None:
        for i, letter in enumerate(letters):
            self.fill(x + LETTER * i, y, glyph(letter), color)

    def mark(self, x0: int, y0: int, x1: int, y1: int, what: str, color: str, row: int, column: int) -> None:
        self.marks.append(((x0, y0, x1, y1), Mark(what, color, row, column)))

    def patches(self) -> list[Mark]:
        """For each patch in reading order, the mark that covers the patch's middle, or whose own middle lies in the patch."""
        n = SIDE // PATCH
        shown = [Mark()] * (n * n)
        for (x0, y0, x1, y1), mark in self.marks:
            inside = {(r, c) for r in range(n) for c in range(n) if x0 <= c * PATCH + 8 < x1 and y0 <= r * PATCH + 8 < y1}
            inside.add((min((y0 + y1) // 2 // PATCH, n - 1), min((x0 + x1) // 2 // PATCH, n - 1)))
            for r, c in inside:
                shown[r * n + c] = mark
        return shown


@functools.cache
def glyph(letter: str) -> np.ndarray:
    """A letter of Pillow's built-in bitmap font at twice its size: 12 pixels wide, 16 high."""
    mask = ImageFont.load_default_imagefont().getmask(letter)
    grid = np.array(mask, np.uint8).reshape(mask.size[::-1])[2:10] > 0
    return grid.repeat(2, 0).repeat(2, 1)


@functools.cache
def shape(name: str, radius: int) -> np.ndarray:
    """A shape as a mask of (2 radius + 1) squared pixels."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1] / radius
    if name == "circle":
        return x * x + y * y <= 1
    if name == "square":
        return np.maximum(abs(x), abs(y)) <= 0.85
    if name == "triangle":
        return (y <= 0.9) & (2 * abs(x) <= y + 1.0)
    if name == "diamond":
        return abs(x) + abs(y) <= 1
    if name == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 0.95)
    if name == "ring":
        return (x * x + y * y <= 1) & (x * x + y * y >= 0.35)
    raise ValueError(f"no shape is called {name!r}")


def place(row: int, column: int) -> str:
    """The name of a cell, numbered as in a matrix: cell 23 is in row two and column three."""
    return f"cell {row + 1}{column + 1}"


def origin(rng: random.Random, size: int) -> tuple[int, int]:
    """Left and top of a square of `size` pixels at a random place of the patch grid."""
    return rng.randrange(0, SIDE - size + 1, PATCH), rng.randrange(0, SIDE - size + 1, PATCH)


def one_of(rng: random.Random, *texts: str) -> str:
    """One of the texts, at random: questions have several wordings."""
    return texts[rng.randrange(len(texts))]
