"""What the report shows of a few samples: their pictures, their tokens, and each token's weight by quantization-aware integrated gradients."""

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
MARKS = "marks.json"  # fingerprints of the model and the data that the token weights were computed from
BITS = 4  # used if the recipe's bits are no number
HINTS = ("num_image_tokens", "image_seq_length", "image_seq_len")  # attributes of processors that hold the number of tokens of one tile


def token_weights(model: nn.Module, wanted: Recipe, samples: Sequence[Sample], processor: Any, directory: Path) -> Path | None:
    """Compute the token weights of these samples; write sensitivity/, samples.json and samples/ into `directory`.

    If an interrupted run has already done so with the same model and samples, nothing is computed. Returns `directory`, or None without samples.
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
        first = 0  # number of the sample's first picture among the batch's
        for at, row in enumerate(rows):
            pictures = slice(first, first := first + len(samples[row].images))
            shown.append(_shown(samples[row], row, batch, at, pictures, processor, unfinished))
    (unfinished / "samples.json").write_text(json.dumps(shown, indent=1))
    os.replace(unfinished, directory)
    return directory


def _weights_alone(wanted: Recipe) -> Any:
    """The config of a calibration that computes token weights and nothing else."""
    kept = {k: v for k, v in wanted.settings.items() if k in ("group_size", "symmetric", "modules", "compute_dtype", "micro_batch", "max_host_memory")}
    bits = wanted.config().bits
    one_candidate = {"equalize": {"sensitivity": "qig", "grid": 1}}  # with one candidate, nothing is searched: only token weights are computed
    settings = kept | {"bits": bits if isinstance(bits, int) else BITS}
    return Recipe(device=wanted.device, int8_activations=wanted.int8_activations, steps=[one_candidate], settings=settings).config(verbose=False)


def _shown(sample: Sample, number: int, batch: dict[str, Tensor], row: int, pictures: slice, processor: Any, directory: Path) -> dict[str, Any]:
    """A sample's entry in samples.json. Also writes thumbnails of its pictures into `directory`/samples."""
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
