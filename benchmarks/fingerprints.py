"""Computes checksums of what calibration decides, to show that a change of the code changes no result.

    python -m benchmarks.fingerprints --output before.json      at the older commit
    python -m benchmarks.fingerprints --against before.json     at the newer one, on the same machine

Seven configs are calibrated on the small LVLM with 16 pictures. Checksums are of scales, token weights, losses, chosen integers, bits and
errors. Sums of floating-point numbers depend on the processor's vector units and on the number of threads, so checksums of two machines need
not agree.
"""

from __future__ import annotations

import argparse
import json
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recipes.methods import calibration_batches
from recipes.small_lvlm.model import load
from torchao_qig import QIG, Calibration, Compensate, Equalize, Modality, QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig, calibrate

QUICK = partial(QIGWeightOnlyConfig, verbose=False)
EVERYTHING = [Equalize(Modality(0.5), grid=4, propagate_error=True), Compensate(Modality(0.5), clip=True)]
PAPER = Equalize(QIG("riemann", points=4, warmup_groups=5), grid=4, search="exhaustive", pre_scale=False, paper_rules=True)
CONFIGS = {
    "default": QUICK(bits=3),
    "qig": QUICK(bits=3, group_size=64, steps=[Equalize("qig", grid=6)]),
    "everything": QUICK(bits=2, group_size=64, steps=EVERYTHING),
    "paper": QUICK(bits=3, steps=[PAPER]),
    "int8 activations": QIGInt8DynamicActivationConfig(bits=4, verbose=False),
    "int8 qig": QIGInt8DynamicActivationConfig(bits=4, steps=[Equalize("qig", grid=4)], verbose=False),
    "auto, more parts": QUICK(bits="auto", budget=3.0, group_size=64, modules=["language_model.layers", "lm_head", "multi_modal_projector"]),
}


def checksum(values: Any) -> int:
    """A checksum of numbers, texts and tensors in any nesting, bit for bit."""
    if isinstance(values, Tensor):
        return zlib.crc32(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()) if values.numel() else 0
    if isinstance(values, dict):
        values = sorted(values.items(), key=lambda item: str(item[0]))
    if isinstance(values, (list, tuple)):
        return zlib.crc32(" ".join(str(checksum(value)) for value in values).encode())
    return zlib.crc32(repr(values).encode())


def fingerprint(found: Calibration) -> dict[str, int]:
    """A checksum of what a calibration decided, for each kind of decision."""
    groups = [[g.label, g.linears, g.fold_kind, g.fold_into, g.winner, g.losses, g.scale, g.x_mean] for g in found.groups.values()]
    weights = {name: [w.bits, *w.data_tensors()] for name, w in found.weights.items()}
    parts = {"groups": groups, "tokens": found.tokens, "weights": weights, "grids": found.grids, "errors": found.squared_errors}
    return {name: checksum(part) for name, part in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--against", type=Path)
    args = parser.parse_args()
    tokenizer, full = load()
    data = calibration_batches(tokenizer, 16)
    made = {}
    for name, config in CONFIGS.items():
        made[name] = fingerprint(calibrate(full, data, config))
        print(f"{name:18}", *(f"{kind} {value:08x}" for kind, value in made[name].items()), flush=True)
    if args.output:
        args.output.write_text(json.dumps(made, indent=1) + "\n")
    if args.against:
        before = json.loads(args.against.read_text())
        differing = [f"{name}: {kind}" for name in made for kind in made[name] if before[name][kind] != made[name][kind]]
        print(f"{len(made)} calibrations, {len(differing)} differences", *differing, sep="\n")
        raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
