"""Evaluates the small LVLM, or a checkpoint of it, on its test questions, and compares it with the shipped full-precision model.

    python -m recipes.evaluate                               # the shipped model
    python -m recipes.evaluate --bits 3 --method qig         # quantized, with the divergence from the shipped one
    python -m recipes.evaluate FOLDER --pictures 200         # a saved checkpoint of it

One forward pass per picture gives all measures. The questions about a picture share it without seeing each other
(small_lvlm/model.py). "Accuracy" is that of greedy decoding with exact match: greedy decoding answers exactly right if and only if
every token of the answer is the likeliest one after the tokens before it. Intervals are 95 %, bootstrapped over pictures, since
questions about one picture are not independent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from recipes.small_lvlm.data import FAMILIES, Sample, chosen
from recipes.small_lvlm.model import WEIGHTS, Packed, load, pack, pixel_values
from torchao_qig.lvlm.evaluate import interval


@dataclass
class Answers:
    """A model's results on some questions, one entry per question. `nll` and `kl` are sums over the answer's tokens, in nats."""

    family: list[str]
    picture: Tensor
    tokens: Tensor
    correct: Tensor
    nll: Tensor
    kl: Tensor  # to the reference; NaN without one

    def of(self, families: Sequence[str]) -> Answers:
        """The results on questions of these families alone."""
        keep = torch.tensor([family in families for family in self.family])
        return Answers([f for f in self.family if f in families], *(getattr(self, name)[keep] for name in ("picture", "tokens", "correct", "nll", "kl")))


def batches(samples: Iterable[Sample], tokenizer: PreTrainedTokenizerFast, size: int = 16) -> list[tuple[list[Sample], Packed]]:
    """Packed batches of one length, so that a compiled model is compiled once."""
    every = list(samples)
    whole = pack(every, tokenizer)
    return [(every[i : i + size], whole.rows(i, i + size)) for i in range(0, len(every), size)]


@torch.no_grad()
def answer(
    model: nn.Module,
    packed: list[tuple[list[Sample], Packed]],
    reference: list[Tensor] | None = None,
    keep: list[Tensor] | None = None,
    shuffle: bool = False,
    progress: bool = True,
) -> Answers:
    """Ask a model all questions of packed batches.

    Args:
        reference: another model's log-probabilities, which the KL is computed to.
        keep: a list that collects this model's log-probabilities, for use as a `reference`.
        shuffle: show every question with a wrong picture.
    """
    columns: dict[str, list[Tensor]] = {name: [] for name in ("picture", "tokens", "correct", "nll", "kl")}
    family: list[str] = []
    first = 0
    for i, (samples, batch) in enumerate(tqdm(packed, "evaluating", disable=not progress)):
        keywords = batch.keywords()
        if shuffle:
            keywords["pixel_values"] = pixel_values(batch.pictures.roll(1, 0))
        logp = model(**keywords).logits[batch.answer].float().log_softmax(-1)
        target, counts = batch.target[batch.answer], torch.tensor([len(sample.questions) for sample in samples])
        starts = counts.cumsum(0) - counts
        picture = torch.arange(len(samples))[:, None].expand_as(batch.segment)[batch.answer]
        question = starts[picture] + batch.segment[batch.answer] - 1
        total = int(counts.sum())

        def add(values: Tensor, question: Tensor = question, total: int = total) -> Tensor:
            return torch.zeros(total, dtype=torch.float64).index_add(0, question, values.double())

        hit = logp.argmax(-1) == target
        columns["tokens"].append(add(torch.ones(len(target))))
        columns["correct"].append(add(~hit) == 0)
        columns["nll"].append(add(-logp.gather(1, target[:, None])[:, 0]))
        columns["kl"].append(add((reference[i].exp() * (reference[i] - logp)).sum(-1)) if reference else torch.full((total,), torch.nan))
        columns["picture"].append(first + torch.arange(len(samples)).repeat_interleave(counts))
        family += [question.family for sample in samples for question in sample.questions]
        first += len(samples)
        if keep is not None:
            keep.append(logp)
    return Answers(family, **{name: torch.cat(values) for name, values in columns.items()})


def scores(answers: Answers) -> dict[str, Any]:
    """Accuracy, and NLL and KL per token of the answers, each with its interval: by family, and over all questions but captions ("all")."""
    asked = answers.of(FAMILIES)
    result: dict[str, Any] = {"questions": len(asked.family), "pictures": len(asked.picture.unique())}
    for name, part in (*((family, answers.of([family])) for family in (*FAMILIES, "caption")), ("all", asked)):
        result[name] = {"questions": len(part.family)}
        if part.family:
            result[name]["accuracy"] = interval(part.correct, torch.ones(len(part.family)), part.picture)
            result[name]["nll"] = interval(part.nll, part.tokens, part.picture)
            if not part.kl.isnan().any():
                result[name]["kl"] = interval(part.kl, part.tokens, part.picture)
    return result


def difference(a: Answers, b: Answers, measure: str, families: Sequence[str] = FAMILIES) -> tuple[float, float, float]:
    """a - b of "correct" (per question), "nll" or "kl" (per token) on the same questions, with its paired interval."""
    a, b = a.of(families), b.of(families)
    per = torch.ones(len(a.family)) if measure == "correct" else a.tokens
    return interval(getattr(a, measure).double() - getattr(b, measure).double(), per, a.picture)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown: one row per model."""
    shown = [*FAMILIES, "all", "caption"]
    head = "| model | " + " | ".join(f"{name} %" for name in shown) + " | NLL | KL |"
    lines = [head, "|" + " --- |" * (len(shown) + 3)]
    for name, result in rows.items():

        def cell(family: str, measure: str, form: Callable[[float], str], result: dict[str, Any] = result) -> str:
            if measure not in result[family]:
                return ""
            mean, low, high = result[family][measure]
            return f"{form(mean)} [{form(low)}, {form(high)}]"

        cells = [cell(family, "accuracy", lambda v: f"{100 * v:.1f}") for family in shown]
        cells += [cell("all", measure, lambda v: f"{v:.4f}") for measure in ("nll", "kl")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    from recipes.methods import quantized

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=WEIGHTS, help="folder of a checkpoint of the small LVLM")
    parser.add_argument("--pictures", type=int, default=1000, help="test pictures, about four questions and a caption each")
    parser.add_argument("--bits", type=int, help="quantize the model first")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--method", default="default", help="with --bits: a name in recipes/methods.py")
    parser.add_argument("--seed", type=int, default=0, help="with --bits: which 128 calibration samples")
    parser.add_argument("--compile", action="store_true", help="pays from some thousand pictures on")
    parser.add_argument("--output", type=Path, help="folder for scores.json and scores.md")
    args = parser.parse_args()

    tokenizer, full = load()
    asked = batches(chosen("test", args.pictures), tokenizer)
    compiled = (lambda m: torch.compile(m, dynamic=False)) if args.compile else (lambda m: m)
    reference: list[Tensor] = []
    rows = {"full precision": scores(answer(compiled(full), asked, keep=reference))}
    if args.bits or args.model != WEIGHTS:
        model = load(args.model)[1]
        name = args.model.name
        if args.bits:
            name = f"{args.method} W{args.bits}"
            model = quantized(model, tokenizer, args.method, bits=args.bits, group_size=args.group_size, seed=args.seed)[0]
        rows[name] = scores(answer(compiled(model), asked, reference))
    print(table(rows))
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "scores.json").write_text(json.dumps(rows, indent=1))
        (args.output / "scores.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
