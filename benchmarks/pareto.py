"""Compares `bits="auto"` with the same mean number of bits spread evenly, on the small LVLM.

    python -m benchmarks.pareto [--budgets 2.5 3 3.25 3.5 4] [--seeds 3] [--pictures 1000] [--method default]

    python -m benchmarks.pareto --blocks          only prints which blocks "auto" leaves at full precision

"uniform" at 3.25 bits gives 4 bits to linears with a fourth of the weights, evenly over the decoder, and 3 bits to the rest. Both are
calibrated and rounded by the same method. Protocol and cache are those of benchmarks/accuracy.py. Writes results/pareto.json, .md and .png.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import nn

from benchmarks.accuracy import Bench, averaged, percent, row
from benchmarks.timing import RESULTS, header, machine, store
from recipes.evaluate import difference, scores
from recipes.methods import METHODS, calibration_batches
from recipes.small_lvlm.model import load
from torchao_qig import QIGWeightOnlyConfig, calibrate

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


def evenly(model: nn.Module, budget: float) -> int | dict[str, int]:
    """The bits for `budget` bits on average, spread evenly over the decoder: one number, or one for each linear."""
    low = math.floor(budget)
    if low == budget:
        return low
    decoder = model.get_submodule("model.language_model.layers")
    sizes = {f"model.language_model.layers.{n}": m.weight.numel() for n, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    bits, spent, seen = {}, 0.0, 0
    for name, size in sizes.items():
        seen += size
        more = spent + size / 2 <= (budget - low) * seen  # nearer to the budget with one more bit than without
        spent += size * more
        bits[name] = low + more
    return bits


def blocks_left(full: nn.Module, tokenizer: Any, budget: float, seed: int) -> list[str]:
    """The decoder's blocks in which "auto" quantizes nothing."""
    config = QIGWeightOnlyConfig(bits="auto", budget=budget, group_size=128, method="rtn", verbose=False)  # without steps, only bits are chosen
    grids = calibrate(full, calibration_batches(tokenizer, seed=seed), config).grids
    layers = "model.language_model.layers"
    return [n for n, _ in full.get_submodule(layers).named_children() if not any(name.startswith(f"{layers}.{n}.") for name in grids)]


def drawn(result: dict[str, Any], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 4))
    for kind in ("uniform", "auto"):
        rows = [r for r in result["rows"] if r["kind"] == kind]
        low, mean, high = ([r["all"]["kl"][i] for r in rows] for i in (1, 0, 2))
        x = [r["bits"] for r in rows]
        axis.plot(x, mean, marker="o", label=kind)
        axis.fill_between(x, low, high, alpha=0.2)
    axis.set(xlabel="mean bits per weight of the decoder's linears", ylabel="KL to full precision", yscale="log")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def markdown(result: dict[str, Any]) -> str:
    lines = [f"`{result['command']}`, {result['date']}, {result['device']}, torch {result['torch']}; method: {result['method']}.", ""]
    head = ("bits", "allocation", "accuracy %", "NLL", "KL to full precision", "KL of the seeds", "KL less uniform's at as many bits (paired)", "calibration s")
    lines += header(head)
    for r in result["rows"]:
        paired = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*r["kl_less_uniform"]) if "kl_less_uniform" in r else ""
        kl = "{:.4f} [{:.4f}, {:.4f}]".format(*r["all"]["kl"])
        seeds = ", ".join(f"{value:.4f}" for value in r["kl_of_seeds"])
        lines.append(
            f"| {r['bits']:g} | {r['kind']} | {percent(r['all']['accuracy'])} | {r['all']['nll'][0]:.4f} | {kl} | {seeds} | {paired} | {r['seconds']:.0f} |"
        )
    difference_of = result.get("auto 3 less uniform 3.25")
    if difference_of:
        lines += ["", "KL of auto at 3 bits less that of uniform at 3.25 bits: {:+.4f} [{:+.4f}, {:+.4f}].".format(*difference_of)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="+", default=[2.5, 3.0, 3.25, 3.5, 4.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--method", default="default", choices=list(METHODS))
    parser.add_argument("--blocks", action="store_true")
    args = parser.parse_args()
    if args.blocks:
        tokenizer, full = load()
        for budget in args.budgets:
            print(f"{budget:g} bits: blocks left, by seed: {[blocks_left(full, tokenizer, budget, seed) for seed in range(args.seeds)]}", flush=True)
        return
    bench = Bench(args.pictures)
    result: dict[str, Any] = {**machine(), "threads": torch.get_num_threads(), "method": args.method, "full precision": scores(bench.base), "rows": []}
    found = {}
    for budget in args.budgets:
        grids: dict[str, dict[str, Any]] = {"uniform": {"bits": evenly(bench.full, budget)}, "auto": {"bits": "auto", "budget": budget}}
        for kind, grid in grids.items():
            # a uniform whole number of bits is a setting of benchmarks/accuracy.py, cached under its name
            name = f"W{budget:g}g128" if isinstance(grid["bits"], int) else f"{kind} {budget:g}"
            runs = [bench.run(name, {**grid, "group_size": 128}, args.method, seed) for seed in range(args.seeds)]
            mean = found[kind, budget] = averaged([run for run, _ in runs])
            one = {"bits": budget, "kind": kind, **row(mean, [run for run, _ in runs], [seconds for _, seconds in runs])}
            if kind == "auto":
                one["kl_less_uniform"] = difference(mean, found["uniform", budget], "kl")
            result["rows"].append(one)
            print(f"{kind} {budget:g}: accuracy {percent(one['all']['accuracy'])} %, KL {one['all']['kl'][0]:.4f}, {one['seconds']:.0f} s", flush=True)
    if ("auto", 3.0) in found and ("uniform", 3.25) in found:
        result["auto 3 less uniform 3.25"] = difference(found["auto", 3.0], found["uniform", 3.25], "kl")
    store("pareto", result, markdown(result))
    drawn(result, RESULTS / "pareto.png")


if __name__ == "__main__":
    main()
