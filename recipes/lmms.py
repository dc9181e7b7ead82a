"""lmms-eval on a model in memory: any transformers LVLM, quantized or not, on any of lmms-eval's tasks.

    lm = InMemory(model, from_processor(processor), partial(processor.decode, skip_special_tokens=True))
    results = lmms_eval.evaluator.simple_evaluate(lm, tasks=["vizwiz_vqa_val", "chartqa"])

The small LVLM on its own task, offline:

    python -m recipes.lmms [--bits 3] [--method default] [--limit 200]

Needs lmms-eval (extra `eval`).
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.timing import machine
from recipes.methods import METHODS, quantized
from recipes.small_lvlm.data import chosen
from recipes.small_lvlm.model import inputs, load

Prepare = Callable[[list[list[Image.Image]], list[str]], dict[str, Tensor]]  # pictures and question of each sample -> the model's keywords
TASK = Path(__file__).parent / "small_lvlm" / "lmms"


def from_processor(processor: Any) -> Prepare:
    """Batches as a Hugging Face processor makes them, through its chat template."""

    def prepare(pictures: list[list[Image.Image]], questions: list[str]) -> dict[str, Tensor]:
        chats = []
        for shown, question in zip(pictures, questions, strict=True):
            content = [*({"type": "image", "image": picture} for picture in shown), {"type": "text", "text": question}]
            chats.append([{"role": "user", "content": content}])
        processor.tokenizer.padding_side = "left"
        options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True)
        return dict(processor.apply_chat_template(chats, **options))

    return prepare


class InMemory(lmms):
    """Greedy answers of a model; lmms-eval's tasks that generate are supported, those of log-likelihoods are not."""

    def __init__(self, model: nn.Module, prepare: Prepare, decode: Callable[[Tensor], str], batch_size: int = 16) -> None:
        super().__init__()
        self.model, self.prepare, self.decode, self.batch_size = model, prepare, decode, batch_size

    @torch.no_grad()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        answers: list[str] = []
        for i in tqdm(range(0, len(requests), self.batch_size), "answering"):
            pictures, questions = [], []
            for request in requests[i : i + self.batch_size]:
                question, options, visual, number, task, split = request.args
                pictures.append(visual(self.task_dict[task][split][number]))
                questions.append(question)
            batch = {k: v.to(self.model.device) for k, v in self.prepare(pictures, questions).items()}  # type: ignore[arg-type]
            limit = int(options.get("max_new_tokens", 128))
            new = self.model.generate(**batch, max_new_tokens=limit, do_sample=False)[:, batch["input_ids"].shape[1] :]  # type: ignore[operator]
            answers += [self.until(self.decode(row), options.get("until")) for row in new]
        return answers

    @staticmethod
    def until(text: str, stops: str | list[str] | None) -> str:
        for stop in [stops] if isinstance(stops, str) else stops or []:
            text = text.split(stop)[0] if stop else text
        return text

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("InMemory answers tasks of output_type generate_until; this task asks for log-likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("InMemory answers tasks of output_type generate_until; this task has several rounds")


def export(folder: Path, pictures: int) -> Path:
    """The test questions as a parquet file and the task's YAML that reads it."""
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

    def prepare(pictures: list[list[Image.Image]], questions: list[str]) -> dict[str, Tensor]:
        return inputs(tokenizer, [np.asarray(shown[0]) for shown in pictures], questions)

    with tempfile.TemporaryDirectory() as folder:
        export(Path(folder), args.pictures)
        lm = InMemory(model, prepare, lambda row: tokenizer.decode(row, skip_special_tokens=True))
        manager = TaskManager(include_path=folder, include_defaults=False)
        results = simple_evaluate(lm, tasks=["small_lvlm"], task_manager=manager, limit=args.limit, bootstrap_iters=0)
    shown = json.dumps({**machine(), "lmms_eval": metadata.version("lmms-eval"), "results": results["results"]}, indent=1, default=float)
    print(shown)
    if args.output:
        args.output.write_text(shown + "\n")


if __name__ == "__main__":
    main()
