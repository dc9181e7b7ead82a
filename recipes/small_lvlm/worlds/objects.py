"""Shapes of several colors and sizes on a grid of three rows and three columns."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from recipes.small_lvlm.worlds.canvas import COLORS, NUMBERS, Canvas, one_of, origin, place, shape

SHAPES = ["circle", "square", "triangle", "diamond", "cross", "ring"]
PAINTS = list(COLORS)[:6]
RADIUS = {"small": 7, "large": 12}
CELLS = 3
STEP = 32  # pixels
NEXT = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Thing:
    row: int
    column: int
    size: str
    color: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


def describe(rng: random.Random) -> tuple[Thing, ...]:
    cells = sorted(rng.sample(range(CELLS * CELLS), rng.randrange(3, 8)))
    return tuple(Thing(*divmod(cell, CELLS), rng.choice(list(RADIUS)), rng.choice(PAINTS), rng.choice(SHAPES)) for cell in cells)


def draw(things: tuple[Thing, ...], canvas: Canvas, rng: random.Random) -> None:
    left, top = origin(rng, CELLS * STEP)
    for thing in things:
        radius = RADIUS[thing.size]
        x, y = left + thing.column * STEP + STEP // 2 - radius, top + thing.row * STEP + STEP // 2 - radius
        canvas.fill(x, y, shape(thing.shape, radius), thing.color)
        canvas.mark(x, y, x + 2 * radius + 1, y + 2 * radius + 1, f"{thing.size} {thing.shape}", thing.color, thing.row, thing.column)


def caption(things: tuple[Thing, ...]) -> str:
    return ", ".join(f"{place(thing.row, thing.column)} {thing}" for thing in things)


def named(thing: Thing, things: tuple[Thing, ...], rng: random.Random) -> str | None:
    """A name that fits this thing alone, with as few words as possible; None if no name does."""
    for words in ([thing.shape], [thing.color, thing.shape], [thing.size, thing.shape], [thing.size, thing.color, thing.shape]):
        if sum(all(word in str(other).split() for word in words) for other in things) == 1:
            return "the " + " ".join(words)
    return None


def questions(things: tuple[Thing, ...], rng: random.Random) -> Iterator[tuple[str, str, str]]:
    at = {(thing.row, thing.column): thing for thing in things}
    known = [(thing, name) for thing in things if (name := named(thing, things, rng))]
    rng.shuffle(known)
    for thing, name in known[:2]:
        if thing.color not in name:
            yield "attribute", one_of(rng, f"what color is {name}?", f"which color does {name} have?"), thing.color
        if thing.size not in name:
            yield "attribute", one_of(rng, f"is {name} small or large?", f"what size is {name}?"), thing.size
    for color in rng.sample(PAINTS, 3):
        if sum(thing.color == color for thing in things) == 1:
            thing = next(thing for thing in things if thing.color == color)
            yield "attribute", one_of(rng, f"what shape is the {color} thing?", f"which shape is {color}?"), f"{thing.size} {thing.shape}"
    # counting
    color, kind, size = rng.choice(things).color, rng.choice(things).shape, rng.choice(list(RADIUS))
    if rng.random() < 0.3:
        color, kind = rng.choice(PAINTS), rng.choice(SHAPES)
    for what, fits in (
        (f"{color} things", lambda t: t.color == color), (f"{kind} shapes", lambda t: t.shape == kind),
        (f"{size} things", lambda t: t.size == size), ("things", lambda t: True), (f"{size} {color} things", lambda t: (t.size, t.color) == (size, color)),
    ):  # fmt: skip
        yield "counting", one_of(rng, f"how many {what} are there?", f"count the {what}."), NUMBERS[sum(map(fits, things))]
    # spatial
    for thing, name in known[:2]:
        yield "spatial", one_of(rng, f"where is {name}?", f"at which place is {name}?"), place(thing.row, thing.column)
    cells = [(rng.randrange(CELLS), rng.randrange(CELLS)), rng.choice(list(at))]
    for cell in cells:
        yield "spatial", one_of(rng, f"what is at {place(*cell)}?", f"name the thing at {place(*cell)}."), str(at.get(cell, "nothing"))
    if len(known) >= 2:
        (a, first), (b, second) = known[:2]
        if a.column != b.column:
            side = rng.choice(["left", "right"])
            yield "spatial", f"is {first} further {side} than {second}?", "yes" if (a.column < b.column) == (side == "left") else "no"
        if a.row != b.row:
            side = rng.choice(["up", "down"])
            yield "spatial", f"is {first} further {side} than {second}?", "yes" if (a.row < b.row) == (side == "up") else "no"
    # more than one step
    for thing, name in known[:2]:
        same = sum(other.color == thing.color for other in things) - 1
        yield "multistep", one_of(rng, f"how many other things have the color of {name}?", f"how many things share the color of {name}?"), NUMBERS[same]
        where, (down, right) = rng.choice(list(NEXT.items()))
        cell = (thing.row + down, thing.column + right)
        if 0 <= cell[0] < CELLS and 0 <= cell[1] < CELLS and (cell in at or rng.random() < 0.3):
            yield "multistep", one_of(rng, f"what is directly {where} {name}?", f"name the thing directly {where} {name}."), str(at.get(cell, "nothing"))
        yield "multistep", f"how many things are in the row of {name}?", NUMBERS[sum(other.row == thing.row for other in things)]
    one, two = rng.sample(PAINTS, 2)
    counts = [sum(thing.color == c for thing in things) for c in (one, two)]
    if counts[0] != counts[1]:
        yield "multistep", f"are there more {one} or more {two} things?", one if counts[0] > counts[1] else two
