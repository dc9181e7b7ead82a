"""What a first-order term would add to compensation: the gradient of the model's own loss, as a further shift of each weight's target.

    python -m benchmarks.first_order [--settings W3g128 W2g64] [--seeds 3] [--pictures 600]

Before a block is rounded, the model whose earlier blocks are rounded already is asked for the KL of its answers to full precision
on the calibration samples. Its gradient G at a weight, divided by both factors of the loss's curvature (K-FAC, arXiv 1503.05671:
inputs' and output gradients' Gram matrices A and S), gives the direction S^-1 G A^-1; all weights of the block go along it as far
as that lowers the KL, and what they arrive at is rounded. Validation questions, not those of the tables. Writes
results/first_order.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import quantize_

from benchmarks.accuracy import SETTINGS
from benchmarks.timing import header, machine, store
from recipes.evaluate import answer, batches, scores
from recipes.methods import METHODS, calibration_batches
from recipes.small_lvlm.data import chosen
from recipes.small_lvlm.model import load
from torchao_qig.calibrate import run
from torchao_qig.calibrate.compensate import damped
from torchao_qig.calibrate.groups import join
from torchao_qig.calibrate.rounding import Rounding

STEPS = (0.0025, 0.005, 0.01, 0.02, 0.04)  # lengths tried, as part of the weights' own outputs


class Live:
    """The model with its blocks rounded so far, and what full precision says about the answers."""

    def __init__(self, model: nn.Module, data: list[dict[str, Tensor]]) -> None:
        self.model, self.data = copy.deepcopy(model).eval().requires_grad_(False), data
        with torch.no_grad():
            self.reference = [self.logp(batch) for batch in data]

    def logp(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits[:, :-1]
        return logits[batch["labels"][:, 1:] != -100].float().log_softmax(-1)

    def divergence(self, number: int) -> Tensor:
        reference = self.reference[number]
        return (reference.exp() * (reference - self.logp(self.data[number]))).sum()

    def average(self) -> float:
        with torch.no_grad():
            return sum(float(self.divergence(i)) for i in range(len(self.data))) / sum(map(len, self.reference))

    def directions(self, linears: dict[str, nn.Linear]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """S^-1 G A^-1 of each linear, and A."""
        gradients = {name: torch.zeros_like(linear.weight) for name, linear in linears.items()}
        inputs = {name: torch.zeros(linear.in_features, linear.in_features) for name, linear in linears.items()}
        outputs = {name: torch.zeros(linear.out_features, linear.out_features) for name, linear in linears.items()}
        rows = dict.fromkeys(linears, 0)
        sampling = False

        def watch(name: str, x: Tensor, out: Tensor) -> None:
            x = x.detach().flatten(0, -2)

            def back(g: Tensor) -> None:
                g = g.flatten(0, -2)
                if sampling:  # answers drawn from full precision: the curvature's gradients
                    inputs[name] += x.T @ x
                    outputs[name] += g.T @ g
                    rows[name] += len(x)
                else:
                    gradients[name] += g.T @ x

            out.register_hook(back)

        hooks = [m.register_forward_hook(lambda _, args, out, name=name: watch(name, args[0], out)) for name, m in linears.items()]
        for linear in linears.values():
            linear.weight.requires_grad_(True)
        draw = torch.Generator().manual_seed(0)
        for number, reference in enumerate(self.reference):
            sampling = False
            torch.autograd.backward(self.divergence(number))
            sampling = True
            likely = torch.multinomial(reference.exp(), 1, generator=draw)
            torch.autograd.backward(-self.logp(self.data[number]).gather(1, likely).sum())
        for hook in hooks:
            hook.remove()
        for linear in linears.values():
            linear.weight.requires_grad_(False).grad = None
        found = {}
        for name, g in gradients.items():
            by_output = torch.linalg.solve(damped(outputs[name] / rows[name], 0.1), g)
            found[name] = torch.linalg.solve(damped(inputs[name], 0.01), by_output.T).T
        return found, inputs

    def shifts(self, block: nn.Module) -> dict[str, Tensor]:
        """How far each weight of the block goes."""
        linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        with torch.enable_grad():
            directions, grams = self.directions(linears)
        weights = {n: m.weight.clone() for n, m in linears.items()}
        size, reach = (sum(float(((w[n] @ grams[n]) * w[n]).sum()) for n in linears) ** 0.5 for w in (weights, directions))
        best, chosen_length = self.average(), 0.0
        for step in STEPS:
            for name, linear in linears.items():
                linear.weight.copy_(weights[name] - step * size / reach * directions[name])
            now = self.average()
            if now >= best:
                break
            best, chosen_length = now, step * size / reach
        for name, linear in linears.items():
            linear.weight.copy_(weights[name])
        return {name: -chosen_length * d for name, d in directions.items()}


def pulled(live: Live) -> type[Rounding]:
    class Pulled(Rounding):
        before: Rounding | None = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.shift: dict[str, Tensor] = {}
            super().__init__(*args, **kwargs)
            if Pulled.before is not None:
                live.model.get_submodule(Pulled.before.name).load_state_dict(Pulled.before.bent.state_dict())
            Pulled.before = self
            mine = live.model.get_submodule(self.name)
            mine.load_state_dict(self.bent.state_dict())
            with torch.no_grad():
                self.shift = live.shifts(mine)

        def _scaled(self, inner: str) -> tuple[Tensor, Tensor | None]:
            weight, bias = super()._scaled(inner)
            before = self.scales.before.get(join(self.name, inner))
            if inner in self.shift:
                weight = weight + (self.shift[inner] if before is None else self.shift[inner] / before.to(weight))
            return weight, bias

    return Pulled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["W3g128", "W2g64"], choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=600)
    args = parser.parse_args()
    tokenizer, full = load()
    asked = batches(chosen("validation", args.pictures), tokenizer)
    reference: list[Tensor] = []
    answer(full, asked, keep=reference, progress=False)
    rows = []
    for setting in args.settings:
        for first_order in (False, True):
            for seed in range(args.seeds):
                data, model, start = calibration_batches(tokenizer, seed=seed), copy.deepcopy(full), time.perf_counter()
                run.Rounding = pulled(Live(full, data)) if first_order else Rounding  # type: ignore[misc]
                quantize_(model, METHODS["default"](**SETTINGS[setting], calib=data, verbose=False))
                seconds = time.perf_counter() - start
                there = Live(full, data)
                there.model = model
                found = scores(answer(model.eval(), asked, reference, progress=False))["all"]
                kl = there.average()
                rows.append({"setting": setting, "first_order": first_order, "seed": seed, "seconds": seconds, "calibration_kl": kl, **found})
                print(setting, "with" if first_order else "without", f"KL {found['kl'][0]:.4f}, on the calibration samples {kl:.5f}", flush=True)
    result = {**machine(), "rows": rows}
    lines = [f"`{result['command']}`, {result['date']}, {result['device']}, torch {result['torch']}.", ""]
    lines += header(("setting", "first-order term", "seed", "KL, validation", "KL, calibration samples", "accuracy %", "s"))
    for r in rows:
        term = "yes" if r["first_order"] else "no"
        kl, accuracy = r["kl"][0], 100 * r["accuracy"][0]
        lines.append(f"| {r['setting']} | {term} | {r['seed']} | {kl:.4f} | {r['calibration_kl']:.5f} | {accuracy:.1f} | {r['seconds']:.0f} |")
    store("first_order", result, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
