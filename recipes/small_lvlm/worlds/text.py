"""One to three lines of letters and digits to read."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from recipes.small_lvlm.worlds.canvas import COLORS, LETTER, NUMBERS, SIDE, Canvas, one_of

LETTERS = "ABCDEFGHJKLMNPRSTUVXYZ"
DIGITS = "23456789"
WORDS = """
    BREAD MILK SHOP EXIT STOP TAXI HOTEL CAFE BANK PARK ZEBRA LEMON APPLE GRAPE TRAIN METRO STREET MUSEUM POLICE SCHOOL
    MARKET FRESH CLEAN PLEASE PULL PUSH SALE BUS FERRY HARBOR LUNCH SUGAR TEA CAKE FISH RENT LATE EARLY NURSE HEALTH
    PHARMA MAGNET SILVER PLANET JUNE JULY MARCH APRIL MAY SUNDAY EAST NORTH SEVEN
""".split()
PLACES = ["first", "second", "third"]


@dataclass(frozen=True)
class Line:
    text: str
    color: str


def spelled(text: str) -> str:
    """The text with a space between its letters, so that each is a token, as digits are in many tokenizers."""
    return " ".join(text)


def describe(rng: random.Random) -> tuple[Line, ...]:
    lines = []
    for color in rng.sample(list(COLORS), rng.randrange(1, 4)):
        kind = rng.random()
        if kind < 0.4:
            text = rng.choice(WORDS)
        elif kind < 0.7:
            text = "".join(rng.choice(DIGITS) for _ in range(rng.randrange(2, 6)))
        else:
            text = "".join(rng.choice(LETTERS) for _ in range(rng.randrange(2, 4))) + "".join(rng.choice(DIGITS) for _ in range(rng.randrange(1, 4)))
        lines.append(Line(text, color))
    return tuple(lines)


def draw(lines: tuple[Line, ...], canvas: Canvas, rng: random.Random) -> None:
    for i, line in enumerate(lines):
        x = LETTER * rng.randrange(SIDE // LETTER - len(line.text) + 1) + 2
        y = LETTER * (2 * i + rng.randrange(2))
        canvas.text(x, y, line.text, line.color)
        for j, letter in enumerate(line.text):
            canvas.mark(x + LETTER * j, y, x + LETTER * j + 12, y + 16, letter, line.color, i, j)


def caption(lines: tuple[Line, ...]) -> str:
    return ", ".join(f"{PLACES[i]} line {line.color} {spelled(line.text)}" for i, line in enumerate(lines))


def questions(lines: tuple[Line, ...], rng: random.Random) -> Iterator[tuple[str, str, str]]:
    for i, line in enumerate(lines):
        yield "ocr", one_of(rng, f"what does the {line.color} text say?", f"read the {line.color} text."), spelled(line.text)
        yield "ocr", one_of(rng, f"what does the {PLACES[i]} line say?", f"read the {PLACES[i]} line."), spelled(line.text)
        yield "attribute", one_of(rng, f"what color is the {PLACES[i]} line?", f"which color does the {PLACES[i]} line have?"), line.color
    line = rng.choice(lines)
    yield "attribute", f"which color is the text {spelled(line.text)}?", line.color
    yield "counting", one_of(rng, "how many lines are there?", "count the lines."), NUMBERS[len(lines)]
    yield "counting", f"how many characters has the {line.color} text?", NUMBERS[len(line.text)]
    yield "spatial", one_of(rng, f"on which line is the {line.color} text?", f"where is the {line.color} text?"), PLACES[lines.index(line)] + " line"
    yield "multistep", f"what is the last character of the {line.color} text?", line.text[-1]
    other = rng.randrange(len(lines))
    yield "multistep", f"what is the first character of the {PLACES[other]} line?", lines[other].text[0]
    longest = sorted(lines, key=lambda line: -len(line.text))
    if len(lines) > 1 and len(longest[0].text) > len(longest[1].text):
        yield "multistep", one_of(rng, "what does the longest line say?", "read the longest line."), spelled(longest[0].text)
