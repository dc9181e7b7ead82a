"""A quantized directory as the commands leave it, of a tiny random LLaVA-OneVision and pictures of noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tests.tiny_dirs import directory
from tests.tiny_models import IMAGE
from torchao_qig import Equalize, QIGWeightOnlyConfig, calibrate
from torchao_qig.lvlm.load import load_model, load_processor

SIZES = [(56, 28), (28, 28), (33, 80)]
QUESTIONS = ["what is this?", "how many?", "which one is it, and why?"]
ANSWERS = ["noise", "none", "none of them"]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def asked(processor: Any, pictures: list[Image.Image], question: str, answer: str | None = None) -> dict[str, Tensor]:
    """One sample as the model takes it; with an answer, labels for it."""
    content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    batch = dict(processor(text=prompt, images=pictures or None, return_tensors="pt"))
    if answer is not None:
        start = batch["input_ids"].shape[1]
        batch = dict(processor(text=prompt + answer + "<|end|>", images=pictures or None, return_tensors="pt"))
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :start] = -100
    return batch


def vision_runs(batch: dict[str, Tensor]) -> list[bool]:
    return (batch["input_ids"][0] == IMAGE).tolist()


def quantized_directory(path: Path) -> Path:
    """Everything that the report reads, with two calibrations that ran."""
    directory("llava_onevision", path)
    model, processor = load_model(str(path), "float32"), load_processor(str(path))
    pictures = [noise(*size, seed=i) for i, size in enumerate(SIZES)]
    batches = [asked(processor, [p], q, a) for p, q, a in zip(pictures, QUESTIONS, ANSWERS, strict=True)]
    folder = path / "qig"
    (folder / "samples").mkdir(parents=True)
    calibrate(model, batches, QIGWeightOnlyConfig(bits=3, group_size=64, verbose=False)).save(folder / "calibration")
    tokens = QIGWeightOnlyConfig(bits=3, group_size=64, steps=[Equalize("qig", grid=1)], verbose=False)
    calibrate(model, batches, tokens).save(folder / "sensitivity")
    samples = []
    for i, (picture, batch) in enumerate(zip(pictures, batches, strict=True)):
        picture.save(folder / "samples" / f"{i}-0.png")
        images = [{"file": f"samples/{i}-0.png", "width": picture.width, "height": picture.height}]
        names = [processor.tokenizer.decode([t]) for t in batch["input_ids"][0].tolist()]
        samples.append({"source": f"noise.jsonl:{i + 1}", "tokens": names, "images": images, "hints": {"tile_tokens": 4}})
    write_json(folder / "samples.json", samples)
    write_json(folder / "receipt.json", receipt())
    interval = {"accuracy": [0.8, 0.7, 0.9], "nll": [0.5, 0.4, 0.6], "kl": None, "bytes": 2_000_000}
    rows = [{"name": "full precision", **interval}, {"name": "quantized", **interval, "kl": [0.01, 0.009, 0.012], "bytes": 700_000}]
    write_json(folder / "evaluation.json", {"rows": rows, "command": "torchao-qig evaluate OUT", "date": "2026-11-21"})
    speed = {"dtype": "float32", "bytes_on_disk": 700_000, "first_token_seconds": 0.03, "prefill_tokens_per_second": 4000.0}
    row = {"name": "quantized", **speed, "decode_tokens_per_second": 100.0, "peak_bytes": 400_000_000}
    write_json(folder / "bench.json", {"rows": [row], "command": "torchao-qig bench OUT", "date": "2026-11-21"})
    return path


def receipt() -> dict[str, Any]:
    sizes = {"bytes_before": 2_000_000, "bytes_after": 700_000, "model_bytes": 3_000_000}
    return {
        "model": "tiny random LLaVA-OneVision",
        "created": "2026-11-21",
        "command": "torchao-qig quantize tiny noise.jsonl --bits 3",
        "versions": {"torch": torch.__version__},
        "device": "CPU",
        "plan": {"quantized": 14, "left": {"not in the decoder's blocks": ["lm_head"]}, **sizes},
        "check": {"kl": 0.0123, "agreement": 0.97, "tokens": 33},
        "seconds": 3.5,
        "peak_host_bytes": 500_000_000,
        "recipe": {"bits": 3, "group_size": 64},
        "samples": {"used": 3, "skipped": {"no picture": 2}},
    }


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
