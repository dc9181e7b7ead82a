"""The calibration samples as the page shows them: pictures under a map of their tokens' weights, texts coloured token by token.

The page shows one view at a time (`weights.View`). Every picture has one image with the maps of all views, and every token of a text has its
weights in all views.
"""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from torchao_qig.methods.per_sample import MODALITIES
from torchao_qig.report import colours
from torchao_qig.report.patches import Boxes, Seen, cells, nowhere, placed, raster, runs_of, shared_out
from torchao_qig.report.read import Found
from torchao_qig.report.weights import KINDS, Sample, View

SAMPLES = 8
PIXELS = 3_000_000  # largest number of pixels of all maps together, so that the page has a few megabytes
THUMBNAIL = 448
PER_ROW = 32  # tokens in a row of a map, if their places are not known
SPAN = 6  # the byte of a weight covers so many powers of two on either side of 1
CODES = {code: kind for kind, code in MODALITIES.items()}


class _Drawing(NamedTuple):
    """How maps are drawn. `largest`: most pixels along a side. `reach`: that of the colours (`colours.reach`)."""

    largest: int
    reach: float


@dataclass
class Token:
    """One token of a text, or a run of `count` picture tokens that is shown as one."""

    text: str
    kind: str  # of MODALITIES
    title: str
    level: int
    count: int = 1


@dataclass
class Picture:
    """A picture of a sample.

    Attributes:
        image: data URI of the picture.
        maps: data URI of the maps of all views, one below the other.
        strip: the aspect ratio of maps that are shown beside the picture; empty if they lie over it.
    """

    image: str
    maps: str
    width: float
    height: float
    strip: str
    caption: str
    alt: str


@dataclass
class Card:
    """A sample as the page shows it. `weights`: for each view, the weights of the shown tokens in base64 (see `packed`)."""

    source: str
    tokens: list[Token]
    pictures: list[Picture]
    notes: list[str]
    count: int
    weights: list[str]


def cards(found: Found, chosen: list[View], samples: list[Sample], reach: float) -> list[Card]:
    """A card for every sample. Without token weights, the cards show only what samples.json has. `reach`: that of the colours."""
    described = [*found.samples[: len(samples) or SAMPLES], *[{}] * (len(samples) - len(found.samples))]
    shared = [_shared(d, s) for d, s in zip(described, samples, strict=True)] if samples else [None] * len(described)
    every = [seen for one in shared if one for _, seen in one]
    places = iter(placed(every))
    largest = int(min(64, max(8, math.sqrt(PIXELS / max(1, len(chosen) * sum(len(d.get("images") or []) for d in described))))))
    made = []
    for number, (one, pictures) in enumerate(zip(described, shared, strict=True)):
        sample = samples[number] if samples else None
        boxes = [(positions, next(places)) for positions, _ in pictures or []]
        made.append(_card(found, one, sample, boxes, number, _Drawing(largest, reach)))
    return made


def _shared(described: dict[str, Any], sample: Sample) -> list[tuple[NDArray[np.int64], Seen]] | None:
    """The token positions of each of the sample's pictures, and how the model sees the picture; None if that is not known."""
    hints = described.get("hints") or {}
    images = described.get("images") or []
    sizes = [(float(i["width"]), float(i["height"])) for i in images if i.get("width") and i.get("height")]
    if len(sizes) < len(images):
        return None
    grids = [(int(t), int(h), int(w)) for t, h, w in hints.get("image_grid_thw") or []]
    return shared_out(runs_of(sample.modality == MODALITIES["vision"]), sizes, grids, int(hints.get("merge") or 1), hints.get("tile_tokens"))


def _card(
    found: Found, described: dict[str, Any], sample: Sample | None, boxes: list[tuple[NDArray[np.int64], Boxes | None]], number: int, drawing: _Drawing
) -> Card:
    images = described.get("images") or []
    names = [str(t) for t in described.get("tokens") or []]
    source = str(described.get("source") or f"sample {number}")
    if sample is None:
        pictures = [_picture(found, image, f"picture {i + 1} of {source}", None, None, drawing) for i, image in enumerate(images)]
        return Card(source, [Token(name, "", "", -1) for name in names], pictures, [], len(names), [])
    notes = []
    if names and len(names) != len(sample.modality):
        notes.append(f"samples.json names {len(names)} tokens, the weights are of {len(sample.modality)}: tokens are shown by their numbers")
        names = []
    vision = np.flatnonzero(sample.modality == MODALITIES["vision"])
    pictures = []
    if len(vision) and not boxes:
        notes.append("which of the vision tokens belong to which picture is not known" if images else "the pictures of this sample are missing")
        pictures = [_picture(found, image, f"picture {i + 1} of {source}", None, None, drawing) for i, image in enumerate(images)]
        pictures.append(_picture(found, {}, f"all vision tokens of {source}", None, sample.weights[:, vision], drawing))
    for i, (positions, where) in enumerate(boxes):
        pictures.append(_picture(found, images[i], f"picture {i + 1} of {source}", where, sample.weights[:, positions], drawing))
    tokens, shown = _tokens(sample, names, drawing.reach)
    return Card(source, tokens, pictures, notes, len(sample.modality), [packed(view) for view in shown])


def _tokens(sample: Sample, names: list[str], reach: float) -> tuple[list[Token], NDArray[np.float64]]:
    """The tokens that the text shows, and their weights (views, shown). A run of vision tokens is shown as one token with their mean weight."""
    runs = dict(runs_of(sample.modality == MODALITIES["vision"]))
    tokens, columns, at = [], [], 0
    while at < len(sample.modality):
        stop = runs.get(at, at + 1)
        weights = sample.weights[:, at:stop].mean(axis=1)
        kind = CODES.get(int(sample.modality[at]), "text")
        what = f"{stop - at} picture tokens, mean " if at in runs else f"{KINDS.get(kind, kind)}: "
        text = f"picture, {stop - at} tokens" if at in runs else names[at] if names else f"#{at}"
        tokens.append(Token(text, kind, f"{what}{weights[0]:.2f}", int(colours.level(weights[:1], reach)[0]), stop - at))
        columns.append(weights)
        at = stop
    return tokens, np.stack(columns, axis=1) if columns else np.zeros((len(sample.weights), 0))


def packed(weights: NDArray[np.float64]) -> str:
    """Weights in base64, a byte each: 255 steps of the weight's logarithm, from 1/64 to 64. The page's script decodes it."""
    steps = np.clip(np.round((np.log2(np.maximum(weights, 1e-9)) / SPAN + 1) / 2 * 254), 0, 254)
    return base64.b64encode(steps.astype(np.uint8).tobytes()).decode()


def _picture(found: Found, image: dict[str, Any], alt: str, where: Boxes | None, weights: NDArray[np.float64] | None, drawing: _Drawing) -> Picture:
    width, height = float(image.get("width") or 1), float(image.get("height") or 1)
    path = found.picture(str(image["file"])) if image.get("file") else None
    uri, caption, maps = "", [], ""
    try:
        uri = _thumbnail(path) if path else ""
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # whatever PIL raises for damaged files
        path = None
    if image and not uri:
        caption.append(f"{image.get('file', 'its thumbnail')} is missing")
    if weights is not None:
        count = weights.shape[1]
        if where is None:
            where = _strip(count)
            caption.append(f"{count} tokens in the order of the sample: where they lie on the picture is not known")
            rows = math.ceil(count / PER_ROW)
            return Picture(
                uri, _sprite(raster(where, weights, max(PER_ROW, rows)), drawing.reach), width, height, f"{PER_ROW} / {rows}", "; ".join(caption), alt
            )
        unplaced = int(np.isnan(where[:, 0]).sum())
        caption.append(f"{count} tokens" + (f", {unplaced} of them line breaks without a place" if unplaced else ""))
        maps = _sprite(raster(where, weights, drawing.largest), drawing.reach)
    return Picture(uri, maps, width, height, "", "; ".join(caption), alt)


def _strip(count: int) -> Boxes:
    """Boxes for `count` tokens in rows of `PER_ROW`."""
    rows = math.ceil(count / PER_ROW)
    return cells(rows, PER_ROW)[:count] if rows else nowhere(0)


def _sprite(grids: NDArray[np.float64], reach: float) -> str:
    """Maps (views, rows, columns), one below the other, as an indexed PNG."""
    levels = np.where(np.isnan(grids), colours.LEVELS, colours.level(np.nan_to_num(grids, nan=1.0), reach)).astype(np.uint8)
    image = Image.fromarray(levels.reshape(-1, levels.shape[2]))
    image.putpalette(colours.palette(), "RGBA")
    return _uri(image, "PNG", optimize=True)


def _thumbnail(path: Any) -> str:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return min(_uri(image, "JPEG", quality=82), _uri(image, "PNG", optimize=True), key=len)


def _uri(image: Image.Image, form: str, **options: Any) -> str:
    data = io.BytesIO()
    image.save(data, form, **options)
    return f"data:image/{form.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"
