"""Compares all methods at several settings on the small LVLM: accuracy, NLL, and KL to full precision, with paired intervals.

    python -m benchmarks.accuracy [--settings W3g128 ...] [--methods rtn awq ...] [--seeds 3] [--pictures 1000] [--name accuracy]
    python -m benchmarks.accuracy --beyond      # each piece of the default method, alone and together: results/beyond.*

Each method but rounding is calibrated on `--seeds` different sets of 128 samples of the calibration split. Answers to each question
are kept in benchmarks/cache, with the seconds of the run that made them, so that a killed run continues and further methods can be
added. results/NAME.json and .md hold the table. Differences are paired: they are taken question by question, averaged over the seeds,
and bootstrapped over pictures.
"""

from __future__ import annotations

import argparse
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.timing import header, machine, store
from recipes.evaluate import Answers, answer, batches, difference, scores
from recipes.methods import BEYOND, INT8_METHODS, METHODS, PAPERS, quantized
from recipes.small_lvlm.data import FAMILIES, chosen
from recipes.small_lvlm.model import WEIGHTS, load

HERE = Path(__file__).parent
SETTINGS = {
    "W3g128": {"bits": 3, "group_size": 128}, "W3g64": {"bits": 3, "group_size": 64}, "W4g128": {"bits": 4, "group_size": 128},
    "W3 per channel": {"bits": 3, "group_size": -1}, "W2g64": {"bits": 2, "group_size": 64},
    "W4A8": {"bits": 4, "int8_activations": True},
}  # fmt: skip
COLUMNS = ("picture", "tokens", "correct", "nll", "kl")


def averaged(runs: list[Answers]) -> Answers:
    """The mean over the seeds, question by question."""
    first = runs[0]
    mean = {name: torch.stack([getattr(run, name).double() for run in runs]).mean(0) for name in ("correct", "nll", "kl")}
    return Answers(first.family, first.picture, first.tokens, **mean)


class Bench:
    """The full-precision model, its answers to the test questions, and a cache of the answers of quantized models."""

    def __init__(self, pictures: int) -> None:
        self.tokenizer, self.full = load()
        self.asked = batches(chosen("test", pictures), self.tokenizer)
        self.reference: list[Tensor] = []
        self.base = answer(self.full, self.asked, keep=self.reference)
        weights = zlib.crc32((WEIGHTS / "model.safetensors").read_bytes())
        self.cache = HERE / "cache" / f"{weights:08x}-{pictures}"  # another model or test set has a cache of its own
        self.cache.mkdir(parents=True, exist_ok=True)

    def run(self, setting: str, grid: dict[str, Any], method: str, seed: int) -> tuple[Answers, float]:
        """The answers of one quantized model, and the seconds that quantizing took."""
        file = self.cache / f"{setting} {method} {seed}.safetensors".replace(" ", "-")
        if not file.exists():
            model, seconds = quantized(self.full, self.tokenizer, method, seed=seed, **grid)
            found = answer(model, self.asked, self.reference, progress=False)
            stored = {name: getattr(found, name) for name in COLUMNS} | {"seconds": torch.tensor(seconds)}
            save_file(stored, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
        stored = load_file(file)
        return Answers(self.base.family, **{name: stored[name] for name in COLUMNS}), float(stored["seconds"])


def row(mean: Answers, runs: list[Answers], seconds: list[float]) -> dict[str, Any]:
    result = {key: value for key, value in scores(mean).items() if isinstance(value, dict)}
    asked = [run.of(FAMILIES) for run in runs]
    kls = [float(run.kl.sum() / run.tokens.sum()) for run in asked]
    return {**result, "kl_of_seeds": kls, "seconds": sorted(seconds)[len(seconds) // 2]}


def percent(interval: tuple[float, float, float]) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in interval))


HEAD = (
    "method", "accuracy %", "lowest family %", "NLL", "KL to full precision", "KL of the seeds", "KL less QIG's (paired)", "accuracy less QIG's (paired)",
    "calibration s",
)  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """A table for each setting, in which the methods are compared with QIG."""
    full = result["full precision"]["all"]
    lines = [f"`{result['command']}`, {result['date']}, {result['device']}, {result['threads']} threads, torch {result['torch']}.", ""]
    lines += [f"Full precision: accuracy {percent(full['accuracy'])} %, NLL {full['nll'][0]:.4f} per token.", ""]
    for setting, methods in result["settings"].items():
        lines += [f"### {setting}", "", *header(HEAD)]
        for method, r in methods.items():
            worst = min(FAMILIES, key=lambda family: r[family]["accuracy"][0])
            values = [
                method, percent(r["all"]["accuracy"]), f"{worst} {100 * r[worst]['accuracy'][0]:.1f}",
                f"{r['all']['nll'][0]:.4f}", "{:.4f} [{:.4f}, {:.4f}]".format(*r["all"]["kl"]), ", ".join(f"{kl:.4f}" for kl in r["kl_of_seeds"]),
                "{:+.4f} [{:+.4f}, {:+.4f}]".format(*r["kl_less_qig"]) if "kl_less_qig" in r else "",
                percent(r["accuracy_less_qig"]) if "accuracy_less_qig" in r else "", f"{r['seconds']:.0f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(values) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", choices=sorted({*METHODS, *INT8_METHODS}), help="by default those of the paper, and ours")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--name", default="accuracy")
    parser.add_argument("--beyond", action="store_true")
    args = parser.parse_args()
    if args.beyond:
        args.settings, args.methods, args.name = ["W3g128", "W2g64"], list(BEYOND), "beyond"

    bench = Bench(args.pictures)
    result: dict[str, Any] = {
        **machine(), "threads": torch.get_num_threads(), "full precision": scores(bench.base), "settings": {},
    }  # fmt: skip
    for setting in args.settings:
        found: dict[str, Answers] = {}
        rows: dict[str, Any] = {}
        known = INT8_METHODS if "int8_activations" in SETTINGS[setting] else METHODS
        methods = [m for m in args.methods or (PAPERS if known is METHODS else known) if m in known]
        for method in methods:
            runs = [bench.run(setting, SETTINGS[setting], method, seed) for seed in range(1 if method == "rtn" else args.seeds)]
            found[method] = averaged([run for run, _ in runs])
            rows[method] = row(found[method], [run for run, _ in runs], [seconds for _, seconds in runs])
            every = rows[method]["all"]
            print(f"{setting} {method}: accuracy {percent(every['accuracy'])} %, KL {every['kl'][0]:.4f}, {rows[method]['seconds']:.0f} s", flush=True)
        for method in methods:
            if method != "qig" and "qig" in found:
                rows[method]["kl_less_qig"] = difference(found[method], found["qig"], "kl")
                rows[method]["accuracy_less_qig"] = difference(found[method], found["qig"], "correct")
        result["settings"][setting] = rows
        store(args.name, result, markdown(result))


if __name__ == "__main__":
    main()
