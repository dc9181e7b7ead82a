"""Where each vision token of a sample lies on its picture.

Processors lay out pictures in few ways, and the number of tokens tells which: one grid over the whole picture; tiles of a square grid each,
in one run of tokens or in a run per tile, with one more view of the whole picture; or the whole picture followed by a grid that keeps the
picture's aspect ratio and ends each row with a token for the line break. All pictures of a model are laid out in the same way, so the layout
that fits most of them is taken (`placed`). Pictures that it does not fit have no places, rather than wrong ones.

A place is (left, top, right, bottom) in shares of the picture's width and height; tokens that lie nowhere have NaN.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]  # (tokens, 4)
Grid = tuple[int, int, tuple[float, ...]]  # rows, columns, the box that they cover
MOST_TILES = 64
MOST_PER_SIDE = 12  # tiles along one side of a picture


@dataclass(frozen=True)
class Seen:
    """One picture as the model sees it.

    Attributes:
        width, height: of the picture as it was given, in any unit.
        runs: length of each run of consecutive vision tokens.
        gaps: number of other tokens between one run and the next.
        grid: (frames, rows, columns) of patches, of which `merge` x `merge` become one token; None if the processor does not give it.
        tile: number of tokens of one square view; None if the processor does not give it.
    """

    width: float
    height: float
    runs: tuple[int, ...]
    gaps: tuple[int, ...] = ()
    grid: tuple[int, int, int] | None = None
    merge: int = 1
    tile: int | None = None

    @property
    def tokens(self) -> int:
        return sum(self.runs)

    @property
    def aspect(self) -> float:
        return self.width / self.height


def cells(rows: int, columns: int, box: tuple[float, ...] = (0.0, 0.0, 1.0, 1.0)) -> Boxes:
    """The cells of a grid over a box, row after row."""
    left, top, right, bottom = box
    x, y = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
    row, column = (index.ravel() for index in np.indices((rows, columns)))
    return np.stack([x[column], y[row], x[column + 1], y[row + 1]], axis=1)


def nowhere(tokens: int) -> Boxes:
    return np.full((tokens, 4), np.nan)


def side_of(tokens: int) -> int | None:
    """The side of a square of so many tokens; None if they form no square."""
    side = math.isqrt(tokens)
    return side if side > 0 and side * side == tokens else None


def by_grid(seen: Seen) -> Boxes | None:
    """The grid that the processor gives."""
    if seen.grid is None:
        return None
    frames, rows, columns = seen.grid
    if frames != 1 or rows % seen.merge or columns % seen.merge or rows * columns != seen.tokens * seen.merge**2:
        return None
    return cells(rows // seen.merge, columns // seen.merge)


def whole(seen: Seen, tile: int) -> Boxes | None:
    """One square grid over the whole picture, whatever its aspect ratio."""
    side = side_of(seen.tokens)
    return cells(side, side) if side and len(seen.runs) == 1 else None


def tiles(seen: Seen, tile: int) -> Boxes | None:
    """Tiles of `tile` tokens each, then (rarely before them) a view of the whole picture; or that view alone."""
    side = side_of(tile)
    one_run = len(seen.runs) == 1
    if not side or seen.tokens % tile or not (one_run or set(seen.runs) == {tile}):
        return None
    count = seen.tokens // tile - 1
    if count == 0:
        return cells(side, side)
    if count == 1 or count > MOST_TILES:
        return None
    first = not one_run and len(seen.gaps) > 1 and seen.gaps[0] > max(seen.gaps[1:])  # the whole picture stands apart from its tiles
    between = () if one_run else seen.gaps[1:] if first else seen.gaps[:-1]
    rows, columns = _arrangement(count, seen.aspect, between)
    parts = [cells(side, side, (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows)) for r in range(rows) for c in range(columns)]
    parts.insert(0 if first else len(parts), cells(side, side))
    return np.concatenate(parts)


def _arrangement(count: int, aspect: float, between: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of tiles. Of all arrangements that the gaps between tiles allow, the one nearest to the picture's aspect ratio."""
    every = [(count // columns, columns) for columns in range(1, count + 1) if count % columns == 0]
    allowed = every
    if len(set(between)) == 2:  # a longer gap where a row ends
        ends = [i + 1 for i, gap in enumerate(between) if gap == max(between)]
        allowed = [(rows, columns) for rows, columns in every if ends == list(range(columns, count, columns))] or every
    return min(allowed, key=lambda found: abs(aspect - found[1] / found[0]))


def lines(seen: Seen, tile: int) -> Boxes | None:
    """A square grid over the whole picture, then rows of a finer one, each followed by a token for the line break."""
    side, rest = side_of(tile), seen.tokens - tile
    if not side or len(seen.runs) != 1 or rest < 1:
        return None
    if rest == 1:  # a single view, and one line break
        return np.concatenate([cells(side, side), nowhere(1)])
    found = _unpadded(seen.aspect, side, rest) or _limited(seen.aspect, side, rest)
    if not found:
        return None
    rows, columns, box = min(found, key=lambda grid: abs(math.log(grid[1] / grid[0] / seen.aspect)))
    fine = np.full((rows, columns + 1, 4), np.nan)
    fine[:, :-1] = np.clip(cells(rows, columns, box), 0, 1).reshape(rows, columns, 4)
    return np.concatenate([cells(side, side), fine.reshape(-1, 4)])


def _cut(aspect: float, side: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """What is left if a picture is fitted into tiles and the padding is cut off again: for every number of tiles, the rows and columns of tokens
    and the box that they cover. The box is slightly larger or smaller than the picture, since whole tokens are cut off."""
    rows, columns = ((index.ravel() + 1) * side for index in np.indices((MOST_PER_SIDE, MOST_PER_SIDE)))
    flat = aspect > columns / rows
    padded, inside = np.where(flat, rows, columns), np.where(flat, columns / aspect, rows * aspect)
    off = (padded - np.floor(np.round(inside, 7)).astype(np.int64)) // 2
    kept = padded - 2 * off
    start, extent = (off - (padded - inside) / 2) / inside, kept / inside
    zero, one = np.zeros_like(start), np.ones_like(start)
    boxes = np.where(flat[:, None], np.stack([zero, start, one, start + extent], 1), np.stack([start, zero, start + extent, one], 1))
    return np.where(flat, kept, rows), np.where(flat, columns, kept), boxes


def _unpadded(aspect: float, side: int, rest: int) -> list[Grid]:
    """The grids of `_cut` that have `rest` tokens, line breaks included."""
    rows, columns, boxes = _cut(aspect, side)
    return [(int(rows[i]), int(columns[i]), tuple(boxes[i])) for i in np.flatnonzero((columns > 0) & (rows * (columns + 1) == rest))]


def _limited(aspect: float, side: int, rest: int) -> list[Grid]:
    """The grids of `_cut` that have `rest` tokens after shrinking: grids with more tokens than some number of tiles holds are shrunk to it."""
    rows, columns, boxes = _cut(aspect, side)
    found: list[Grid] = []
    for most in range(max(1, rest // side**2 - 1), rest // side**2 + 2):
        ratio = np.sqrt(rows * columns / (most * side**2))
        shrunk_rows, shrunk_columns = (np.floor_divide(n, np.maximum(ratio, 1e-9)).astype(np.int64) for n in (rows, columns))
        fits = (ratio > 1.1) & (shrunk_columns > 0) & (shrunk_rows * (shrunk_columns + 1) == rest)
        found += [(int(shrunk_rows[i]), int(shrunk_columns[i]), tuple(boxes[i])) for i in np.flatnonzero(fits)]
    return found


def placed(pictures: Sequence[Seen]) -> list[Boxes | None]:
    """The places of each picture's tokens. One layout is assumed for all pictures; pictures that it does not fit get None."""
    told = [p.grid is not None for p in pictures]
    layout, tile = _layout([p for p, known in zip(pictures, told, strict=True) if not known])
    return [by_grid(p) if known else layout(p, tile) for p, known in zip(pictures, told, strict=True)]


def _layout(pictures: Sequence[Seen]) -> tuple[Callable[[Seen, int], Boxes | None], int]:
    """The layout that fits most pictures, and the tokens of its tiles. Of equally good ones, the first in the order below, with the largest tiles."""
    hints = sorted({p.tile for p in pictures if p.tile}, reverse=True)
    runs = [run for p in pictures for run in p.runs]
    if hints:
        tries: list[tuple[Any, int]] = [(layout, tile) for layout in (tiles, lines, whole) for tile in hints]
    else:
        common = math.gcd(*runs) if runs else 0
        dividing = [s * s for s in range(math.isqrt(common), 1, -1) if common % (s * s) == 0][:1]
        squares = [s * s for s in range(math.isqrt(max(runs, default=0)), 1, -1)]
        tries = [(whole, 0), *((tiles, tile) for tile in dividing), *((lines, tile) for tile in squares)]
    return max(tries, key=lambda one: sum(one[0](p, one[1]) is not None for p in pictures))  # max takes the first of equals


def runs_of(vision: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, stop) of each run of vision tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], np.asarray(vision, dtype=bool), [False]]).astype(int)))
    return [(int(start), int(stop)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]


def shared_out(
    runs: Sequence[tuple[int, int]], sizes: Sequence[tuple[float, float]], grids: Sequence[tuple[int, int, int]] = (), merge: int = 1, tile: int | None = None
) -> list[tuple[NDArray[np.int64], Seen]] | None:
    """Divide runs of vision tokens among pictures: each picture's token positions and its `Seen`. None if the counts leave the division open.

    `sizes`: (width, height) of each picture, in order.
    """
    count = len(sizes)
    positions = [np.arange(start, stop) for start, stop in runs]
    groups: list[list[NDArray[np.int64]]] | None = None
    if not count or not runs:
        return None
    if len(runs) == count:
        groups = [[part] for part in positions]
    elif count == 1:
        groups = [positions]
    elif len(runs) % count == 0 and len(set(sizes)) == 1:  # equal pictures have equally many tiles
        each = len(runs) // count
        groups = [positions[i * each : (i + 1) * each] for i in range(count)]
    elif len(runs) == 1:  # nothing between the pictures
        every = positions[0]
        if len(grids) == count and sum(math.prod(g) // merge**2 for g in grids) == len(every):
            groups = [[part] for part in np.split(every, np.cumsum([math.prod(g) // merge**2 for g in grids])[:-1])]
        elif len(every) % count == 0 and (len(set(sizes)) == 1 or side_of(len(every) // count) or side_of(len(every) // count - 1)):
            groups = [[part] for part in np.split(every, count)]
    if groups is None:
        return None
    found = []
    for i, (parts, (width, height)) in enumerate(zip(groups, sizes, strict=True)):
        gaps = tuple(int(after[0] - before[-1] - 1) for before, after in itertools.pairwise(parts))
        grid = grids[i] if len(grids) == count else None
        found.append((np.concatenate(parts), Seen(width, height, tuple(len(part) for part in parts), gaps, grid, merge, tile)))
    return found


def raster(boxes: Boxes, weights: NDArray[np.float64], largest: int = 64) -> NDArray[np.float64]:
    """Weights (views, tokens) as maps (views, rows, columns): each point has the mean over the tokens that cover it, NaN where none does."""
    here = ~np.isnan(boxes[:, 0])
    boxes, weights = boxes[here], weights[:, here]
    columns, rows = (_resolution(boxes[:, a + 2] - boxes[:, a], largest) for a in (0, 1))
    x, y = (_overlap(boxes[:, a], boxes[:, a + 2], n) for a, n in ((0, columns), (1, rows)))
    total = np.stack([(w[:, None] * y).T @ x for w in weights])
    cover = y.T @ x
    return np.divide(total, cover, out=np.full_like(total, np.nan), where=cover > 1e-9)


def _resolution(extents: NDArray[np.float64], largest: int) -> int:
    """The number of pixels along a side: as many as the finest cells that fit side by side.

    The lower quartile of the extents is taken for that of fine cells, since cells that the picture's edge cuts are fewer than a quarter.
    """
    return max(1, min(largest, round(1 / float(np.quantile(extents, 0.25)))))


def _overlap(start: NDArray[np.float64], stop: NDArray[np.float64], pixels: int) -> NDArray[np.float64]:
    """The share of each pixel that each token covers along one side: (tokens, pixels)."""
    edges = np.linspace(0, 1, pixels + 1)
    return np.clip(np.minimum(stop[:, None], edges[1:]) - np.maximum(start[:, None], edges[:-1]), 0, None) * pixels
