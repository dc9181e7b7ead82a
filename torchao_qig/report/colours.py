"""Colours of token weights: blue below 1, orange above 1, none at 1. Colours differ in opacity, which grows with the distance from 1, because
they lie over pictures and over light and dark pages."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LEVELS = 33  # odd, so that the level in the middle is 1
REACHES = (0.5, 1.0, 2.0, 3.0)  # possible ranges of the colours, in powers of two on either side of 1
LOW, HIGH = (38, 112, 200), (233, 84, 12)
MOST = 0.8  # opacity of the first and the last level


def reach(weights: list[NDArray[np.float64]]) -> float:
    """The smallest of REACHES whose range covers nine tenths of the weights."""
    if not weights:
        return REACHES[0]
    most = np.quantile(np.abs(np.log2(np.maximum(np.concatenate([w.ravel() for w in weights]), 1e-9))), 0.9)
    return next((r for r in REACHES if most <= r), REACHES[-1])


def ticks(reach: float) -> list[str]:
    """The weights at evenly spaced places of the legend, as text."""
    return [f"{2 ** (reach * share):.2g}" for share in (-1, -0.5, 0, 0.5, 1)]


def level(weights: NDArray[np.float64], reach: float) -> NDArray[np.uint8]:
    """The level of each weight, where 1 is the uniform weight. Weights beyond the reach get the first or the last level."""
    share = np.log2(np.maximum(weights, 1e-9)) / reach
    return np.round((np.clip(share, -1, 1) + 1) / 2 * (LEVELS - 1)).astype(np.uint8)


def rgba(number: int) -> tuple[int, int, int, float]:
    """A level's colour and opacity (0 to 1)."""
    share = 2 * number / (LEVELS - 1) - 1
    return (*(HIGH if share > 0 else LOW), round(MOST * abs(share) ** 0.6, 3))


def css(number: int) -> str:
    red, green, blue, alpha = rgba(number)
    return f"rgba({red},{green},{blue},{alpha:g})"


def palette() -> bytes:
    """The palette of an indexed picture: four bytes per level, and a transparent colour after the levels."""
    found = b"".join(bytes([r, g, b, round(255 * a)]) for r, g, b, a in map(rgba, range(LEVELS)))
    return found + bytes(4)
