"""Measures the seconds of calibration per block, also in units of one float32 forward of that block over the same samples.

The model is a Qwen2 of a few blocks with heavy-tailed random weights (hidden 896, mlp 4864, 14 heads, 2 of keys and values); there are
8 samples of 256 tokens. Every row runs in a process of its own, which measures its peak memory, and the unit before and after calibration.
The last column is the cost of the row's choices. An exhaustive float32 search (32 Riemann points, all candidates, all samples) gives the
loss of every candidate. In each group, the cost is how far the loss of the row's winner is above the smallest loss. The column shows the
largest cost over groups.

    python -m benchmarks.calibration --threads 2
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import transformers as hf

import torchao_qig
from benchmarks.timing import machine, write
from torchao_qig import QIG, Equalize, QIGWeightOnlyConfig, Running
from torchao_qig.system import peak_host_bytes

HIDDEN, INNER, HEADS, KV_HEADS, VOCABULARY = 896, 4864, 14, 2, 1000
CONFIGS = {
    "paper": QIGWeightOnlyConfig(bits=3, steps=[Equalize(QIG("riemann", 32), search="exhaustive", paper_rules=True)], verbose=False),
    "default": QIGWeightOnlyConfig(bits=3, method="qig", verbose=False),
    "exhaustive": QIGWeightOnlyConfig(
        bits=3, steps=[Equalize(QIG("riemann"), search="exhaustive")], running=Running(compute_dtype=torch.float32), verbose=False
    ),
}


def build(layers: int, dtype: torch.dtype) -> hf.PreTrainedModel:
    """A Qwen2 with heavy-tailed weights and uneven norms, so that scales matter."""
    torch.manual_seed(0)
    config = hf.Qwen2Config(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, vocab_size=VOCABULARY
    )
    model = hf.Qwen2ForCausalLM._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layernorm" in name:
                p.copy_(torch.exp(torch.randn(p.shape) * 0.5))
            elif p.dim() == 2 and "layers" in name:
                p.mul_(torch.distributions.Chi2(5.0).sample(p.shape).div(5).rsqrt())
        model.model.embed_tokens.weight.normal_()
    rotary = model.model.rotary_emb.inv_freq.clone()
    model.to(dtype)
    model.model.rotary_emb.inv_freq.data = rotary  # a cast would coarsen the positions
    return model


def unit(model: hf.PreTrainedModel, ids: torch.Tensor, repeats: int = 5) -> list[float]:
    """The seconds of a block's float32 forward over all samples, once for each repeat."""
    hidden = model.model.embed_tokens(ids)
    positions = model.model.rotary_emb(hidden, torch.arange(ids.shape[1])[None])
    seconds = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            model.model.layers[0](hidden, position_embeddings=positions)
            seconds.append(time.perf_counter() - start)
    return seconds[1:]


def one(mode: str, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one row: its figures, and its choice in each group."""
    torch.set_num_threads(args.threads)
    ids = torch.randint(0, VOCABULARY, (args.samples, args.tokens), generator=torch.Generator().manual_seed(2))
    plain = build(1, torch.float32)
    units = unit(plain, ids)
    model = build(args.layers, dtype)
    before = peak_host_bytes()
    found = torchao_qig.calibrate(model, [{"input_ids": ids}], CONFIGS[mode])
    peak = peak_host_bytes()
    units += unit(plain, ids)
    first, *later = found.stats["block_seconds"]
    groups = {label: {"winner": g.winner, "losses": g.losses} for label, g in found.groups.items()}
    return {
        "mode": mode, "model": str(dtype).removeprefix("torch."), "unit": statistics.median(units), "first": first, "later": statistics.median(later),
        "peak": peak, "grown": peak - before, "device_peak": found.stats.get("peak_device_bytes"), "groups": groups,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--name", default="calibration_cpu_2threads")
    parser.add_argument("--only", nargs=2, metavar=("MODE", "DTYPE"), help="one row, as JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(one(args.only[0], getattr(torch, args.only[1]), args)))
        return
    rows = []
    for dtype in ("float32", "bfloat16"):
        for mode in CONFIGS:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.calibration", *sys.argv[1:], "--only", mode, dtype], capture_output=True, text=True, check=True
            )
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(mode, dtype, f"{rows[-1]['later']:.2f} s per block, {rows[-1]['later'] / rows[-1]['unit']:.1f} units", file=sys.stderr)
    for row in rows:
        truth = next(r for r in rows if r["mode"] == "exhaustive" and r["model"] == row["model"])["groups"]
        costs = {label: truth[label]["losses"][str(g["winner"])] / min(truth[label]["losses"].values()) - 1 for label, g in row["groups"].items()}
        row["cost"] = max(costs.values())
    shown = [
        {
            "mode": r["mode"], "model": r["model"], "s per block": f"{r['later']:.2f}", "units": f"{r['later'] / r['unit']:.1f}",
            "first block, units": f"{r['first'] / r['unit']:.1f}", "unit s": f"{r['unit']:.3f}", "peak host MiB": f"{r['peak'] / 2**20:.0f}",
            "of it for calibration": f"{r['grown'] / 2**20:.0f}", "peak device MiB": f"{r['device_peak'] / 2**20:.0f}" if r["device_peak"] else "none",
            "loss above exhaustive": f"{r['cost']:.2%}",
        }
        for r in rows
    ]  # fmt: skip
    write(args.name, {**machine(), "threads": args.threads, "samples x tokens": f"{args.samples} x {args.tokens}"}, shown)


if __name__ == "__main__":
    main()
