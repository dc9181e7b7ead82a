"""Shows why the methods that search equalization scales end so near to each other: how token weights look, and what they change.

    python -m benchmarks.why [--setting W3g128] [--samples 128]

The small LVLM is calibrated once for each method and not evaluated. The figures of a method are how few tokens carry the weights, in
how many groups its choice differs from that of uniform weights, and what the choice of uniform weights would cost by the method's own
loss. Writes results/why.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy import SETTINGS
from benchmarks.timing import RESULTS, machine
from recipes.methods import calibration_batches
from recipes.small_lvlm.model import load
from torchao_qig import Calibration, Equalize, QIGWeightOnlyConfig, calibrate
from torchao_qig.methods.presets import preset

SCALES = {
    **{name: preset(name)[0] for name in ("awq", "mbq", "qig-paper", "qig")},
    "qig, squared error": Equalize("qig", loss="mse"),
    "awq, absolute error": Equalize("uniform", loss="mae"),
}


def effective_share(calibration: Calibration, label: str) -> float:
    """The effective number of tokens as a share of all tokens, (sum w)^2 / (n sum w^2): 1 if all weights are equal, 1 / n if one has everything."""
    w = torch.cat([w[m > 0] for w, m in zip(calibration.token_weights(label).weights, calibration.modality, strict=True)]).double()
    return float(w.sum() ** 2 / (w.square().sum() * len(w)))


def compared(found: Calibration, uniform: Calibration) -> dict[str, Any]:
    groups = found.groups
    moved = [label for label, group in groups.items() if group.ratio != uniform.groups[label].ratio]
    # the method's loss with the uniform choice relative to its own choice, for groups in which it computed the loss of that candidate
    cost = [
        group.losses[uniform.groups[label].winner] / group.loss - 1 for label, group in groups.items() if uniform.groups[label].winner in group.losses
    ]  # fmt: skip
    gain = [1 - group.loss / group.rounding_loss for group in groups.values()]
    distance = [abs(group.ratio - uniform.groups[label].ratio) for label, group in groups.items()]
    shares = [effective_share(found, label) for label in found.tokens]
    return {
        "groups": len(groups), "choices_that_differ": len(moved), "mean_difference_of_ratio": float(np.mean(distance)),
        "cost_of_the_uniform_choice": {"median": float(np.median(cost)), "largest": float(np.max(cost)), "groups": len(cost)},
        "gain_over_rounding": {"median": float(np.median(gain)), "mean": float(np.mean(gain))},
        "effective_share_of_tokens": {"median": float(np.median(shares)), "least": float(np.min(shares))} if shares else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", default="W3g128", choices=list(SETTINGS))
    parser.add_argument("--samples", type=int, default=128)
    args = parser.parse_args()
    tokenizer, model = load()
    batches = calibration_batches(tokenizer, args.samples)
    found = {}
    for name, scales in SCALES.items():
        config = QIGWeightOnlyConfig(**SETTINGS[args.setting], steps=[replace(scales, search="exhaustive")])
        found[name] = calibrate(model, batches, config)
    rows = {name: compared(calibration, found["awq"]) for name, calibration in found.items()}
    for name, row in rows.items():
        print(f"{name}: {json.dumps(row)}")
    (RESULTS / "why.json").write_text(json.dumps({**machine(), "setting": args.setting, "methods": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
