"""Trains the small LVLM and writes it to `weights/`, or verifies the model that is there.

    python -m recipes.small_lvlm.build             # half an hour on a CPU; a killed run continues
    python -m recipes.small_lvlm.build --verify    # recomputes the shipped model's test accuracy and its data's checksum
    python -m recipes.small_lvlm.build --seed 1 --output /tmp/rebuilt    # another model, elsewhere

`weights/` then holds the checkpoint that transformers loads (bfloat16), the training log, and card.json: the accuracy, the checksum of
the test data, the command, the time and the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from benchmarks.timing import machine
from recipes.evaluate import answer, batches, scores, table
from recipes.small_lvlm.data import FAMILIES, chosen
from recipes.small_lvlm.model import ROW, WEIGHTS, load, new_model, new_tokenizer, pack
from recipes.small_lvlm.training import check, train
from recipes.small_lvlm.worlds.canvas import SIDE

PICTURES = 1000  # pictures of the test split
TOLERANCE = 0.003  # tolerance of the accuracy: other processors round differently


def checksum(count: int = PICTURES) -> str:
    """The checksum of the test pictures, questions and answers."""
    digest = hashlib.sha256()
    for sample in chosen("test", count):
        digest.update(sample.pixels.tobytes())
        digest.update(repr(sample.questions).encode())
    return digest.hexdigest()


def image_processor() -> LlavaOnevisionImageProcessorPil:
    return LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=[[SIDE, SIDE]])


def save(model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Everything that `from_pretrained` of the model, the tokenizer and (with torchvision) the processor reads."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    settings = {"processor_class": "LlavaOnevisionProcessor", "num_image_tokens": ROW * ROW, "vision_feature_select_strategy": "full"}
    (folder / "processor_config.json").write_text(json.dumps({**settings, "vision_aspect_ratio": "anyres_max_9"}, indent=2) + "\n")


def measured(folder: Path) -> dict[str, Any]:
    """The test accuracy, and the NLL if every question is asked about another picture."""
    tokenizer, model = load(folder)
    asked = batches(chosen("test", PICTURES), tokenizer)
    right = scores(answer(model, asked))
    print(table({"full precision": right}))
    wrong = scores(answer(model, asked, shuffle=True))
    return {"scores": right, "nll_with_wrong_pictures": wrong["all"]["nll"], "checksum": checksum()}


def verify(folder: Path) -> None:
    card = json.loads((folder / "card.json").read_text())
    found = measured(folder)
    faults = [f"the test data's checksum is {found['checksum']}, not {card['checksum']}"] if found["checksum"] != card["checksum"] else []
    for name in (*FAMILIES, "all"):
        now, then = (result["scores"][name]["accuracy"][0] for result in (found, card))
        if abs(now - then) > TOLERANCE:
            faults.append(f"{name}: accuracy {now:.4f}, not {then:.4f}")
    print("\n".join(faults) or "as recorded in card.json")
    if faults:
        raise SystemExit(1)


def build(tower_steps: int, steps: int, seed: int, folder: Path) -> None:
    tokenizer = new_tokenizer()
    model = new_model(tokenizer, seed)
    check(model, pack(list(chosen("train", 4)), tokenizer))
    run = folder.parent / "training_run"
    run.mkdir(parents=True, exist_ok=True)
    train(model, tokenizer, run, tower_steps=tower_steps, steps=steps)
    save(model, tokenizer, folder)
    shutil.copy(run / "log.jsonl", folder / "log.jsonl")
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    seconds = {stage: max(line["seconds"] for line in log if line["stage"] == stage) for stage in ("tower", "answers")}
    card = {
        **machine(), "threads": torch.get_num_threads(), "transformers": transformers.__version__, "tower_steps": tower_steps, "steps": steps, "seed": seed,
        "seconds": seconds, "parameters": sum(p.numel() for p in model.parameters()), **measured(folder),
    }  # fmt: skip
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--tower-steps", type=int, default=700)
    parser.add_argument("--steps", type=int, default=3300)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="folder of the checkpoint; training's own state lies beside it")
    args = parser.parse_args()
    verify(args.output) if args.verify else build(args.tower_steps, args.steps, args.seed, args.output)


if __name__ == "__main__":
    main()
