"""Bar charts of colored bars and line charts of numbered points, values one to nine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from recipes.small_lvlm.worlds.canvas import COLORS, NUMBERS, Canvas, one_of, shape

GROUND = 104  # the y of value 0
UNIT = 10  # pixels
GRAY = (110, 110, 110)


@dataclass(frozen=True)
class Chart:
    bars: bool
    colors: tuple[str, ...]  # one for each bar, or that of the line
    values: tuple[int, ...]


def describe(rng: random.Random) -> Chart:
    bars = rng.random() < 0.6
    count = rng.randrange(3, 6)
    colors = tuple(rng.sample(list(COLORS), count if bars else 1))
    return Chart(bars, colors, tuple(rng.randrange(1, 10) for _ in range(count)))


def draw(chart: Chart, canvas: Canvas, rng: random.Random) -> None:
    for value in (0, 3, 6, 9):
        canvas.box(4, GROUND - UNIT * value, 108, GROUND - UNIT * value + 1, GRAY)
    canvas.box(4, 8, 6, GROUND + 1, GRAY)
    step = 100 // len(chart.values)
    middles = [8 + step * i + step // 2 for i in range(len(chart.values))]
    heights = [GROUND - UNIT * value for value in chart.values]
    if chart.bars:
        half = min(8, step // 2 - 1)
        for i, (x, y, color, value) in enumerate(zip(middles, heights, chart.colors, chart.values, strict=True)):
            canvas.box(x - half, y, x + half, GROUND, color)
            canvas.mark(x - half, 0, x + half, GROUND + 8, f"bar {value}", color, 0, i)
        return
    color = chart.colors[0]
    for (x0, y0), (x1, y1) in zip(list(zip(middles, heights, strict=True)), list(zip(middles, heights, strict=True))[1:], strict=False):
        for x in range(x0, x1):
            y = y0 + round((y1 - y0) * (x - x0) / (x1 - x0))
            canvas.box(x, y - 1, x + 1, y + 1, color)
    for i, (x, y, value) in enumerate(zip(middles, heights, chart.values, strict=True)):
        canvas.fill(x - 4, y - 4, shape("circle", 4), color)
        canvas.mark(x - 8, 0, x + 8, GROUND + 8, f"point {value}", color, 0, i)


def caption(chart: Chart) -> str:
    if chart.bars:
        return "bars " + ", ".join(f"{color} {NUMBERS[value]}" for color, value in zip(chart.colors, chart.values, strict=True))
    return f"{chart.colors[0]} line " + ", ".join(f"point {NUMBERS[i + 1]} {NUMBERS[value]}" for i, value in enumerate(chart.values))


def questions(chart: Chart, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    values, count = chart.values, len(chart.values)
    order = np.argsort([-value for value in values], kind="stable")
    names = [f"the {color} bar" for color in chart.colors] if chart.bars else [f"point {NUMBERS[i + 1]}" for i in range(count)]
    short = list(chart.colors) if chart.bars else names
    for i in rng.sample(range(count), 3):
        yield "chart", one_of(rng, f"what is the value of {names[i]}?", f"how high is {names[i]}?"), NUMBERS[values[i]]
    things = "bars" if chart.bars else "points"
    if values[order[0]] > values[order[1]]:
        yield "chart", one_of(rng, f"which of the {things} is the highest?", f"where is the maximum of the {things}?"), short[order[0]]
    if values[order[-1]] < values[order[-2]]:
        yield "chart", one_of(rng, f"which of the {things} is the lowest?", f"where is the minimum of the {things}?"), short[order[-1]]
    level = rng.randrange(2, 8)
    yield "counting", one_of(rng, f"how many {things} are there?", f"count the {things}."), NUMBERS[count]
    yield "counting", f"how many {things} are higher than {NUMBERS[level]}?", NUMBERS[sum(value > level for value in values)]
    a, b = rng.sample(range(count), 2)
    if values[a] != values[b]:
        yield "chart", f"which is higher, {names[a]} or {names[b]}?", short[a] if values[a] > values[b] else short[b]
    if values[order[0]] > values[order[1]]:
        yield "multistep", "what is the highest value?", NUMBERS[values[order[0]]]
    if not chart.bars:
        i = rng.randrange(count - 1)
        trend = "up" if values[i + 1] > values[i] else "down" if values[i + 1] < values[i] else "flat"
        yield "chart", f"does the line go up or down after {names[i]}?", trend
        yield "attribute", one_of(rng, "what color is the line?", "which color does the line have?"), chart.colors[0]
    else:
        i = rng.randrange(count)
        yield "spatial", f"what color is bar {NUMBERS[i + 1]} from the left?", chart.colors[i]
        if i + 1 < count:
            yield "spatial", f"which bar is right of {names[i]}?", chart.colors[i + 1]
