"""Runs lmms-eval on the small LVLM and its own task, offline. `torchao-qig evaluate --tasks` does the same for any LVLM.

    python -m recipes.lmms [--bits 3] [--method default] [--limit 200]

Needs lmms-eval (recipes/requirements-eval.txt).
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch import Tensor

from benchmarks.timing import machine
from recipes.methods import METHODS, quantized
from recipes.small_lvlm.data import chosen
from recipes.small_lvlm.model import inputs, load
from torchao_qig.lvlm.harness import InMemory
from torchao_qig.lvlm.messages import Messages, pictures_of

TASK = Path(__file__).parent / "small_lvlm" / "lmms"


def export(folder: Path, pictures: int) -> Path:
    """Write the task into `folder`: the test questions as a parquet file, and the YAML that reads it. Returns `folder`."""
    rows: list[dict[str, Any]] = []
    for one in chosen("test", pictures):
        buffer = io.BytesIO()
        Image.fromarray(one.pixels).save(buffer, "PNG")
        image = {"bytes": buffer.getvalue(), "path": None}
        rows += [{"image": image, "question": q.text, "answer": q.answer, "family": q.family} for q in one.questions if q.family != "caption"]
    features = datasets.Features({"image": datasets.Image(), **{name: datasets.Value("string") for name in ("question", "answer", "family")}})
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "small_lvlm_test.parquet")
    (folder / "utils.py").write_text((TASK / "utils.py").read_text())
    text = (TASK / "small_lvlm.yaml").read_text()
    (folder / "small_lvlm.yaml").write_text(text.replace("small_lvlm_test.parquet", str(folder / "small_lvlm_test.parquet")))
    return folder


def main() -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--limit", type=int, help="questions")
    parser.add_argument("--bits", type=int, help="quantize the model first")
    parser.add_argument("--method", default="default", choices=list(METHODS), help="with --bits")
    parser.add_argument("--output", type=Path, help="file for the results, JSON")
    args = parser.parse_args()
    tokenizer, model = load()
    if args.bits:
        model = quantized(model, tokenizer, args.method, bits=args.bits, group_size=128)[0]

    def prepare(chats: list[Messages]) -> dict[str, Tensor]:
        return inputs(tokenizer, [np.asarray(pictures_of(chat)[0]) for chat in chats], [chat[-1]["content"][-1]["text"] for chat in chats])

    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder), args.pictures)
        lm = InMemory(model, prepare, lambda row: tokenizer.decode(row, skip_special_tokens=True), batch_size=16)
        manager = TaskManager(include_path=folder, include_defaults=False)
        results = simple_evaluate(lm, tasks=["small_lvlm"], task_manager=manager, limit=args.limit, bootstrap_iters=0)
    shown = json.dumps({**machine(), "lmms_eval": metadata.version("lmms-eval"), "results": results["results"]}, indent=1, default=float)
    print(shown)
    if args.output:
        args.output.write_text(shown + "\n")


if __name__ == "__main__":
    main()
