"""What the report shows of a few samples: their pictures, their tokens, and how much quantization-aware integrated gradients make of each."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor, nn

from torchao_qig import calibrate
from torchao_qig.calibration.resume import fingerprint_of_data, fingerprint_of_model
from torchao_qig.lvlm.data import calibration_batches
from torchao_qig.lvlm.pictures import opened
from torchao_qig.lvlm.recipe import Recipe
from torchao_qig.lvlm.samples import Sample

LARGEST = 512  # pixels of a shown picture's longer side
MARKS = "marks.json"  # of what it was computed from
BITS = 4  # where the recipe has no number
HINTS = ("num_image_tokens", "image_seq_length", "image_seq_len")  # of processors: tokens of one tile


def token_weights(model: nn.Module, wanted: Recipe, samples: Sequence[Sample], processor: Any, directory: Path) -> Path | None:
    """Calibrate for token weights alone, on these samples; write sensitivity/, samples.json and samples/ into `directory`.

    Where an interrupted run has done so already, with the same weights and samples, nothing is computed.
    """
    if not samples:
        return None
    batches = calibration_batches(samples, processor, tokens=wanted.tokens, max_length=wanted.max_length)
    marks = json.dumps([fingerprint_of_model(model), fingerprint_of_data([t for batch in batches for t in batch.values()])])
    if (directory / MARKS).exists() and (directory / MARKS).read_text() == marks:
        return directory
    shutil.rmtree(directory, ignore_errors=True)
    unfinished = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    calibrate(model, list(batches), _weights_alone(wanted)).save(unfinished / "sensitivity")
    (unfinished / MARKS).write_text(marks)
    shown = []
    for batch, rows in zip(batches, batches.rows, strict=True):
        first = 0  # of the sample's pictures among the batch's
        for at, row in enumerate(rows):
            pictures = slice(first, first := first + len(samples[row].images))
            shown.append(_shown(samples[row], row, batch, at, pictures, processor, unfinished))
    (unfinished / "samples.json").write_text(json.dumps(shown, indent=1))
    os.replace(unfinished, directory)
    return directory


def _weights_alone(wanted: Recipe) -> Any:
    kept = {k: v for k, v in wanted.settings.items() if k in ("group_size", "symmetric", "modules", "compute_dtype", "micro_batch", "max_host_memory")}
    bits = wanted.config().bits
    one_candidate = {"equalize": {"sensitivity": "qig", "grid": 1}}  # nothing to choose: token weights are all that is computed
    settings = kept | {"bits": bits if isinstance(bits, int) else BITS}
    return Recipe(device=wanted.device, int8_activations=wanted.int8_activations, steps=[one_candidate], settings=settings).config(verbose=False)


def _shown(sample: Sample, number: int, batch: dict[str, Tensor], row: int, pictures: slice, processor: Any, directory: Path) -> dict[str, Any]:
    tokenizer = getattr(processor, "tokenizer", processor)
    kept = batch["input_ids"][row] if "attention_mask" not in batch else batch["input_ids"][row][batch["attention_mask"][row] != 0]
    images = []
    (directory / "samples").mkdir(exist_ok=True)
    for i, value in enumerate(sample.images):
        picture: Image.Image = opened(value).convert("RGB")
        width, height = picture.size
        picture.thumbnail((LARGEST, LARGEST))
        file = f"samples/{number}-{i}.png"
        picture.save(directory / file)
        images.append({"file": file, "width": width, "height": height})
    return {"source": sample.source, "tokens": [tokenizer.decode([i]) for i in kept.tolist()], "images": images, "hints": _hints(batch, pictures, processor)}


def _hints(batch: dict[str, Tensor], pictures: slice, processor: Any) -> dict[str, Any]:
    """What the processor says about how a picture becomes tokens."""
    hints: dict[str, Any] = {}
    grid = batch.get("image_grid_thw")
    if grid is not None:
        hints |= {"image_grid_thw": grid[pictures].tolist(), "merge": getattr(getattr(processor, "image_processor", None), "merge_size", 1)}
    tile = next((getattr(processor, name) for name in HINTS if isinstance(getattr(processor, name, None), int)), None)
    return hints if tile is None else hints | {"tile_tokens": tile}
