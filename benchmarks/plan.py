"""Compares what `torchao_qig.plan` says a calibration will take with what it took: memory beyond the model, and seconds.

The models are Qwen2s of two blocks with random weights. Every row runs in a process of its own, whose memory before calibration is subtracted.

    python -m benchmarks.plan --threads 2
"""

import argparse
import json
import mmap
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import torchao_qig
from benchmarks.timing import machine, write
from torchao_qig import QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig
from torchao_qig.system import peak_host_bytes

SHAPES = {"512 / 1408": (512, 1408), "896 / 4864": (896, 4864)}
AMOUNTS = {"8 x 256": (8, 256), "32 x 512": (32, 512)}
CONFIGS: dict[str, Any] = {
    "W3 default": lambda calib: QIGWeightOnlyConfig(bits=3, calib=calib, verbose=False),
    "W3 QIG scales": lambda calib: QIGWeightOnlyConfig(bits=3, method="qig", calib=calib, verbose=False),
    "W4A8 default": lambda calib: QIGInt8DynamicActivationConfig(bits=4, calib=calib, verbose=False),
}


def resident() -> int:
    """The bytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def one(shape: str, amount: str, name: str, threads: int) -> dict[str, Any]:
    """Measure one row: what the plan says, and what the calibration takes."""
    torch.set_num_threads(threads)
    (hidden, inner), (samples, tokens) = SHAPES[shape], AMOUNTS[amount]
    config = hf.Qwen2Config(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=2, num_attention_heads=hidden // 64, num_key_value_heads=2, vocab_size=1000
    )
    torch.manual_seed(0)
    model = hf.Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    batches = [{"input_ids": torch.randint(0, 1000, (8, tokens))} for _ in range(samples // 8)]
    with torch.no_grad():
        model(**batches[0])  # memory that any use of the model takes is not counted
    chosen = CONFIGS[name](batches)
    said = torchao_qig.plan(model, chosen).need
    assert said is not None
    before, start = resident(), time.perf_counter()
    torchao_qig.calibrate(model, batches, chosen)
    took = time.perf_counter() - start
    grown = max(0, peak_host_bytes() - before)
    return {"said_bytes": said.device_bytes + said.host_bytes, "bytes": grown, "said_seconds": said.seconds, "seconds": took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--name", default="plan_cpu_2threads")
    parser.add_argument("--only", nargs=3, metavar=("SHAPE", "AMOUNT", "CONFIG"), help="one row, as JSON")
    args = parser.parse_args()
    if args.only:
        print(json.dumps(one(*args.only, args.threads)))
        return
    rows = []
    for shape in SHAPES:
        for amount in AMOUNTS:
            for name in CONFIGS:
                command = [sys.executable, "-m", "benchmarks.plan", "--threads", str(args.threads), "--only", shape, amount, name]
                r = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
                rows.append({
                    "hidden / inner": shape, "samples x tokens": amount, "config": name, "MiB said": f"{r['said_bytes'] / 2**20:.0f}",
                    "MiB taken": f"{r['bytes'] / 2**20:.0f}", "memory, said / taken": f"{r['said_bytes'] / r['bytes']:.2f}",
                    "s said": f"{r['said_seconds']:.1f}",
                    "s taken": f"{r['seconds']:.1f}", "time, said / taken": f"{r['said_seconds'] / r['seconds']:.2f}",
                })  # fmt: skip
                print(list(rows[-1].values()), file=sys.stderr)
    write(args.name, {**machine(), "threads": args.threads}, rows)


if __name__ == "__main__":
    main()
