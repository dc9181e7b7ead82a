"""Where tokens lie: laws of the layouts on any picture, and what seven families' processors and towers really do."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from tests import tiny_models
from tests.report.made import asked, noise, vision_runs
from tests.tiny_dirs import PINPOINTS, PROCESSORS
from torchao_qig.report.patches import Boxes, Seen, cells, placed, raster, runs_of, shared_out

VLMS = [family for family in PROCESSORS if family != "qwen2"]
PICTURES = [(28, 28), (56, 28), (28, 56), (40, 30), (100, 40), (33, 80), (64, 64), (640, 480), (480, 641), (90, 30)]
sides = st.integers(1, 12)


def area(boxes: Boxes) -> NDArray[np.float64]:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def assert_partition(boxes: Boxes, covered: float = 1.0) -> None:
    """Inside the picture, none empty, no two over each other, and so much of it covered."""
    assert boxes.min() >= 0
    assert boxes.max() <= 1
    assert area(boxes).min() > 0
    assert area(boxes).sum() == pytest.approx(covered)
    left, top, right, bottom = (boxes[:, None, i] for i in range(4))
    overlap = np.clip(np.minimum(right, right.T) - np.maximum(left, left.T), 0, None) * np.clip(np.minimum(bottom, bottom.T) - np.maximum(top, top.T), 0, None)
    assert overlap[~np.eye(len(boxes), dtype=bool)].max(initial=0) < 1e-9


def only(seen: Seen) -> Boxes:
    found = placed([seen])[0]
    assert found is not None
    assert len(found) == seen.tokens
    return found


@given(sides, sides)
def test_a_grid_is_a_partition_in_reading_order(rows: int, columns: int) -> None:
    boxes = cells(rows, columns)
    assert_partition(boxes)
    assert len(boxes) == rows * columns
    order = np.lexsort((boxes[:, 0].round(9), boxes[:, 1].round(9)))
    np.testing.assert_array_equal(order, np.arange(len(boxes)))


@given(sides, sides, st.integers(1, 3), st.floats(0.2, 5))
def test_a_told_grid(rows: int, columns: int, merge: int, aspect: float) -> None:
    seen = Seen(aspect, 1, (rows * columns,), grid=(1, rows * merge, columns * merge), merge=merge)
    np.testing.assert_array_equal(only(seen), cells(rows, columns))
    assert placed([Seen(aspect, 1, (rows * columns + 1,), grid=seen.grid, merge=merge)]) == [None]


@given(st.integers(2, 6), st.integers(1, 6), st.integers(1, 6))
def test_tiles_and_the_whole_picture(side: int, rows: int, columns: int) -> None:
    """In one run: tiles of a picture of just their aspect ratio are a partition, and so is the last view."""
    if rows * columns == 1:
        rows = 2
    seen = Seen(columns, rows, ((rows * columns + 1) * side**2,), tile=side**2)
    boxes = only(seen)
    assert_partition(boxes[: -(side**2)])
    np.testing.assert_array_equal(boxes[-(side**2) :], cells(side, side))
    assert boxes[0, 2] == pytest.approx(1 / columns / side)
    assert boxes[0, 3] == pytest.approx(1 / rows / side)


@given(st.integers(2, 5), st.integers(2, 6), st.integers(2, 6), st.floats(0.2, 5), st.booleans())
def test_gaps_between_runs_tell_the_rows(side: int, rows: int, columns: int, aspect: float, first: bool) -> None:
    """A longer gap ends a row, whatever the aspect ratio; the longest stands beside the whole picture."""
    between = [3 if i % columns == 0 else 2 for i in range(1, rows * columns)]
    gaps = (5, *between) if first else (*between, 4)
    boxes = only(Seen(aspect, 1, (side**2,) * (rows * columns + 1), gaps, tile=side**2))
    tiles = boxes[side**2 :] if first else boxes[: -(side**2)]
    assert_partition(tiles)
    assert tiles[0, 2] == pytest.approx(1 / columns / side)


@given(st.integers(2, 9), st.integers(1, 3), st.integers(1, 3), st.floats(0.3, 3))
def test_line_breaks_have_no_place(side: int, high: int, wide: int, aspect: float) -> None:
    """The rule of LLaVA's unpadding, in plain lines; line breaks are every row's last token."""
    rows, columns = high * side, wide * side
    if aspect > wide / high:
        rows -= 2 * ((rows - int(round(columns / aspect, 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(rows * aspect, 7))) // 2)
    if rows < 1 or columns < 1:
        return
    tokens = side**2 + rows * (columns + 1)
    boxes = only(Seen(aspect, 1, (tokens,), tile=side**2)) if tokens % side**2 else None
    if boxes is None:
        return  # could as well be tiles
    np.testing.assert_array_equal(boxes[: side**2], cells(side, side))
    fine = boxes[side**2 :]
    breaks = np.isnan(fine[:, 0])
    where = fine[~breaks]
    assert len(where) + breaks.sum() == len(fine)
    assert_partition(where, covered=(where[:, 2].max() - where[:, 0].min()) * (where[:, 3].max() - where[:, 1].min()))
    np.testing.assert_array_equal(np.diff(np.flatnonzero(breaks)), len(fine) // breaks.sum())
    assert breaks[-1]


@given(st.lists(st.booleans(), max_size=40))
def test_runs_are_what_they_are(vision: list[bool]) -> None:
    found = runs_of(vision)
    again = np.zeros(len(vision), dtype=bool)
    for start, stop in found:
        assert start < stop
        again[start:stop] = True
    assert again.tolist() == vision
    assert all(after[0] > before[1] for before, after in itertools.pairwise(found))


@given(st.lists(st.integers(1, 400), min_size=1, max_size=4), st.floats(0.1, 10))
def test_any_counts_give_places_or_nothing(counts: list[int], aspect: float) -> None:
    seen = Seen(aspect, 1, tuple(counts), (2,) * (len(counts) - 1))
    found = placed([seen])[0]
    if found is not None:
        assert len(found) == sum(counts)
        here = found[~np.isnan(found[:, 0])]
        assert here.min() >= 0
        assert here.max() <= 1
        assert area(here).min() > 0


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 3), st.integers(0, 10**6))
def test_a_raster_of_one_grid_is_its_weights(rows: int, columns: int, views: int, seed: int) -> None:
    weights = np.random.default_rng(seed).random((views, rows * columns))
    np.testing.assert_allclose(raster(cells(rows, columns), weights), weights.reshape(views, rows, columns))


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 10**6))
def test_a_raster_of_two_views_is_their_mean(side: int, factor: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    coarse, fine = generator.random((side, side)), generator.random((side * factor, side * factor))
    boxes = np.concatenate([cells(side, side), cells(side * factor, side * factor), np.full((2, 4), np.nan)])
    found = raster(boxes, np.concatenate([coarse.ravel(), fine.ravel(), [9.0, 9.0]])[None])[0]
    np.testing.assert_allclose(found, (np.kron(coarse, np.ones((factor, factor))) + fine) / 2)


def test_a_raster_shrinks_to_means_and_leaves_holes() -> None:
    weights = np.arange(16.0)[None]
    np.testing.assert_allclose(raster(cells(4, 4), weights, largest=2)[0], [[2.5, 4.5], [10.5, 12.5]])
    assert np.isnan(raster(cells(2, 2)[:3], weights[:, :3])[0, 1, 1])


def test_real_sizes() -> None:
    """Numbers of tokens that the large models have."""
    onevision = [Seen(640, 480, (729 + 40 * 55,)), Seen(384, 384, (729 + 27 * 28,)), Seen(1000, 300, (729 + 24 * 82,))]
    assert all(boxes is not None for boxes in placed(onevision))
    internvl = placed([Seen(900, 448, (768,), tile=256), Seen(1000, 1000, (1280,), tile=256), Seen(448, 448, (256,), tile=256)])
    assert [None if b is None else len(b) for b in internvl] == [768, 1280, 256]
    many = placed([Seen(2000, 2000, (729 + 54 * 55 * 4 // 4,))])[0]  # two by two tiles
    assert many is not None


def test_too_many_tiles_are_shrunk() -> None:
    """OneVision interpolates where the picture takes more than nine tiles."""
    rows = columns = 6 * 8
    kept = int(rows // math.sqrt(rows * columns / (9 * 8**2)))
    boxes = only(Seen(2304, 2304, (8**2 + kept * (kept + 1),)))
    assert kept == 24
    assert_partition(boxes[8**2 :][~np.isnan(boxes[8**2 :, 0])])


def seen_by(family: str, processor: Any, pictures: list[Image.Image], hints: bool = True) -> tuple[dict[str, Any], list[tuple[Any, Seen]]]:
    """A sample's inputs, and its pictures as the report sees them."""
    batch = asked(processor, pictures, "what?")
    grids = [tuple(g) for g in batch["image_grid_thw"].tolist()] if "image_grid_thw" in batch else []
    tile = 4 if hints and not grids else None
    found = shared_out(runs_of(vision_runs(batch)), [p.size for p in pictures], grids, 2 if grids else 1, tile)
    assert found is not None, family
    return batch, found


@pytest.mark.parametrize("family", VLMS)
def test_every_family_and_size_has_places(family: str) -> None:
    """All tokens of all pictures, and the finest view covers nearly all of each."""
    processor = PROCESSORS[family]()
    seen = [seen_by(family, processor, [noise(*size)])[1][0][1] for size in PICTURES]
    for one, boxes in zip(seen, placed(seen), strict=True):
        assert boxes is not None, one
        assert len(boxes) == one.tokens
        here = boxes[~np.isnan(boxes[:, 0])]
        assert here.min() >= 0
        assert here.max() <= 1
        assert not np.isnan(raster(boxes, np.ones((1, len(boxes))))).any()


@pytest.mark.parametrize("family", VLMS)
def test_several_pictures(family: str) -> None:
    processor = PROCESSORS[family]()
    _, found = seen_by(family, processor, [noise(56, 28), noise(56, 28, seed=1)])
    assert len(found) == 2
    assert len(set(np.concatenate([positions for positions, _ in found]))) == sum(seen.tokens for _, seen in found)
    assert all(boxes is not None for boxes in placed([seen for _, seen in found]))


def tokens_of(family: str, model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """What the model puts at its vision tokens."""
    heard: list[torch.Tensor] = []
    blocks = tiny_models.language_model(model).layers if family != "gemma3" else model.model.language_model.layers
    handle = blocks[0].register_forward_pre_hook(lambda _, args, kwargs: heard.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return heard[0][0][torch.tensor(vision_runs(batch))]


@pytest.mark.parametrize("family", VLMS)
@pytest.mark.parametrize("size", [(56, 28), (28, 56), (112, 112)], ids=str)
def test_places_are_where_the_model_looks(family: str, size: tuple[int, int]) -> None:
    """Changing the picture within a token's box changes that token more than the other tokens of its view, for each token of each view."""
    model, _ = getattr(tiny_models, family)()
    if hasattr(model.config, "image_grid_pinpoints"):
        model.config.image_grid_pinpoints = PINPOINTS
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2 and not p.any():  # a projection that starts at zero shows nothing
                torch.nn.init.orthogonal_(p, generator=torch.Generator().manual_seed(0))
    processor = PROCESSORS[family]()
    picture = noise(*size)
    batch, [(_, seen)] = seen_by(family, processor, [picture])
    boxes = placed([seen, *([Seen(1, 1, (10,), tile=4)] if family == "llava_onevision" else [])])[0]
    assert boxes is not None
    before = tokens_of(family, model, batch)
    views = np.cumsum(np.isnan(boxes[:, 0]) | (np.arange(len(boxes)) % 4 == 0)) if family != "llava_onevision" else (np.arange(len(boxes)) >= 4).astype(int)
    if seen.grid:
        views = np.zeros(len(boxes), dtype=int)
    right = []
    for token, box in enumerate(boxes):
        if np.isnan(box[0]):
            continue
        left, top, far, low = (round(v * s) for v, s in zip(box, (*size, *size), strict=True))
        moved = np.zeros(len(boxes))
        for colour in ((0, 0, 0), (255, 255, 255)):
            changed = picture.copy()
            changed.paste(colour, (left, top, far, low))
            moved += (tokens_of(family, model, asked(processor, [changed], "what?")) - before).norm(dim=-1).numpy()
        rivals = np.flatnonzero((views == views[token]) & ~np.isnan(boxes[:, 0]))
        right.append(rivals[moved[rivals].argmax()] == token)
    assert all(right), right


def test_crops_after_the_whole_picture() -> None:
    """Gemma 3's pan and scan shows the whole picture first."""
    processor = PROCESSORS["gemma3"]()
    content = [{"type": "image"}, {"type": "text", "text": "what?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pan = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 10, "pan_and_scan_max_num_crops": 4, "pan_and_scan_min_ratio_to_activate": 1.2}
    batch = dict(processor(text=prompt, images=[noise(90, 30)], return_tensors="pt", images_kwargs=pan))
    assert len(batch["pixel_values"]) == 4
    found = shared_out(runs_of(vision_runs(batch)), [(90, 30)], tile=4)
    assert found is not None
    boxes = placed([found[0][1]])[0]
    assert boxes is not None
    np.testing.assert_array_equal(boxes[:4], cells(2, 2))
    np.testing.assert_allclose(boxes[4:8], cells(2, 2, (0, 0, 1 / 3, 1)))
