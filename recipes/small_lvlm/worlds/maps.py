"""Small maps: five rows and five columns of terrain, some places with a letter."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from recipes.small_lvlm.worlds.canvas import NUMBERS, Canvas, one_of, origin, place

CELLS = 5
STEP = 16  # pixels
TERRAIN = {"water": (40, 90, 200), "forest": (30, 120, 50), "sand": (215, 190, 110), "rock": (120, 120, 125)}
TOWNS = "ABCDEFGH"
WAYS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


@dataclass(frozen=True)
class Map:
    terrain: tuple[tuple[str, ...], ...]
    towns: tuple[tuple[str, int, int], ...]  # letter, row, column


def describe(rng: random.Random) -> Map:
    terrain = [[rng.choice(list(TERRAIN)) for _ in range(CELLS)] for _ in range(CELLS)]
    for _ in range(12):  # neighbours tend to be alike
        r, c = rng.randrange(CELLS), rng.randrange(1, CELLS)
        terrain[r][c] = terrain[r][c - 1]
    cells = sorted(rng.sample(range(CELLS * CELLS), rng.randrange(2, 5)))
    letters = rng.sample(TOWNS, len(cells))
    return Map(tuple(map(tuple, terrain)), tuple((letter, *divmod(cell, CELLS)) for letter, cell in zip(letters, cells, strict=True)))


def draw(chart: Map, canvas: Canvas, rng: random.Random) -> None:
    left, top = origin(rng, CELLS * STEP)
    for r, row in enumerate(chart.terrain):
        for c, name in enumerate(row):
            x, y = left + c * STEP, top + r * STEP
            cell = canvas.pixels[y : y + STEP, x : x + STEP]
            cell[...] = cell // 3 + np.array(TERRAIN[name], np.uint8)
            canvas.mark(x, y, x + STEP, y + STEP, "cell", name, r, c)
    for letter, r, c in chart.towns:
        x, y = left + c * STEP, top + r * STEP
        canvas.text(x + 2, y, letter, "white")
        canvas.mark(x, y, x + STEP, y + STEP, letter, chart.terrain[r][c], r, c)


def caption(chart: Map) -> str:
    towns = ", ".join(f"{letter} at {place(r, c)}" for letter, r, c in chart.towns)
    return towns + ", " + ", ".join(f"row {NUMBERS[r + 1]} " + " ".join(row) for r, row in enumerate(chart.terrain))


def questions(chart: Map, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    for letter, r, c in rng.sample(chart.towns, 2):
        yield "spatial", one_of(rng, f"where is {letter}?", f"at which place is {letter}?"), place(r, c)
        yield "attribute", one_of(rng, f"what terrain is at {letter}?", f"on which terrain is {letter}?"), chart.terrain[r][c]
        way, (down, right) = rng.choice(list(WAYS.items()))
        if 0 <= r + down < CELLS and 0 <= c + right < CELLS:
            yield (
                "multistep",
                one_of(rng, f"start at {letter} and go one {way}. which terrain?", f"what terrain is one {way} from {letter}?"),
                chart.terrain[r + down][c + right],
            )
        other, (down2, right2) = rng.choice([(w, d) for w, d in WAYS.items() if w != way and abs(d[0]) != abs(down)])
        if 0 <= r + down + down2 < CELLS and 0 <= c + right + right2 < CELLS:
            yield "multistep", f"start at {letter} and go one {way} and one {other}. which terrain?", chart.terrain[r + down + down2][c + right + right2]
    r, c = rng.randrange(CELLS), rng.randrange(CELLS)
    yield "spatial", one_of(rng, f"what terrain is at {place(r, c)}?", f"which terrain has {place(r, c)}?"), chart.terrain[r][c]
    yield "counting", one_of(rng, "how many towns are there?", "count the towns."), NUMBERS[len(chart.towns)]
    row, name = rng.randrange(CELLS), rng.choice(list(TERRAIN))
    yield "counting", f"how many {name} cells are in row {NUMBERS[row + 1]}?", NUMBERS[chart.terrain[row].count(name)]
    (a, ra, ca), (b, rb, cb) = rng.sample(chart.towns, 2)
    if ra != rb:
        yield "spatial", f"which is further up, {a} or {b}?", a if ra < rb else b
    if ca != cb:
        yield "spatial", f"which is further left, {a} or {b}?", a if ca < cb else b
    yield "ocr", one_of(rng, "which towns are on the map?", "read all towns."), " ".join(letter for letter, _, _ in chart.towns)
    row = rng.randrange(CELLS)
    yield "ocr", f"read row {NUMBERS[row + 1]} of the map.", " ".join(chart.terrain[row])
