"""Compares the speed of packed linears with that of bf16 and fp32 `F.linear`, all compiled, in one run.

    python -m benchmarks.kernels --threads 2 --name kernels_cpu_2threads
    python -m benchmarks.kernels --threads 2 --int8-activations --name kernels_w4a8_cpu_2threads    # integer products, one scale per row

A call's overhead is amortised over a chain of linears in one compiled graph, each feeding the next, as in a model. The
chain's weights rotate through so many copies that no cache holds them (`--rotate` bytes of packed weights). Every figure
is the median over paired repeats. `bandwidth` is the packed bytes per second over the machine's measured read bandwidth.
"""

import argparse
import statistics
from collections.abc import Callable
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import timing
from torchao_qig import PackedIntTensor

SHAPES = [(896, 896), (4864, 896), (896, 4864), (3584, 3584), (18944, 3584), (3584, 18944)]


def chained(x: Tensor, *weights: Tensor) -> Tensor:
    """A chain of linears: the input of each depends on the one before. The operations between them are the same for every kind of weight."""
    for w in weights:
        y = F.linear(x, w)
        missing = x.shape[1] - y.shape[1]
        x = x + (F.pad(y, (0, missing)) if missing > 0 else y[:, : x.shape[1]]) * 1e-4
    return x


def rotating(run: Callable[..., Tensor], x: Tensor, weights: list[Tensor], length: int) -> Callable[[], None]:
    """A function that runs `run` on x and the next `length` weights, over and over."""
    turns = cycle([weights[i : i + length] for i in range(0, len(weights), length)])

    def step() -> None:
        with torch.no_grad():
            run(x, *next(turns))

    return step


def copies_of(w: Tensor, count: int) -> list[Tensor]:
    return [w, *(w.clone() for _ in range(count - 1))]


def measure(
    shape: tuple[int, int], bits: int, m: int, group_size: int, int8: bool, rotate: float, repeats: int, device: str, bandwidth: float
) -> dict[str, object]:
    n, k = shape
    length = 1 if m > 64 else 2 if m > 1 else 8
    x = torch.randn(m, k, device=device).bfloat16()
    dense = torch.randn(n, k, device=device).bfloat16()
    packed = PackedIntTensor.from_hp(dense, bits, group_size, symmetric=int8, int8_activations=int8)
    nbytes = packed.nbytes_packed()
    sets = max(1, round(rotate / (nbytes * length))) if m <= 64 else 1
    runs: dict[str, Callable[[], object]] = {}
    torch._dynamo.reset()
    for name, weight, inputs in (("bf16", dense, x), ("fp32", dense.float(), x.float()), ("packed", packed, x)):
        step = torch.compile(chained, fullgraph=True, dynamic=False)
        runs[name] = rotating(step, inputs, copies_of(weight, sets * length), length)
    error = float((F.linear(x, packed) - torch.compile(F.linear, dynamic=False)(x, packed)).abs().max() / F.linear(x, packed).abs().max())
    with torch.no_grad():
        seconds = timing.paired_seconds(runs, repeats, device)
    ours = statistics.median(seconds["packed"]) / length
    return {
        "N": n, "K": k, "bits": bits, "M": m,
        "ms": round(ours * 1e3, 3),
        "bf16 ms": round(statistics.median(seconds["bf16"]) / length * 1e3, 3),
        "speed over bf16": round(timing.median_ratio(seconds["bf16"], seconds["packed"]), 2),
        "speed over fp32": round(timing.median_ratio(seconds["fp32"], seconds["packed"]), 2),
        "bandwidth": round(nbytes / ours / bandwidth, 2),
        "error": f"{error:.0e}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--int8-activations", action="store_true")
    parser.add_argument("--bits", type=int, nargs="+", help="by default 3 and 4, or 4 with int8 activations")
    parser.add_argument("--rows", type=int, nargs="+", help="by default 1, 4, 16, 128 and 512, or 1, 16, 128, 512 and 2048 with int8 activations")
    parser.add_argument("--shapes", type=lambda s: tuple(map(int, s.split("x"))), nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--group-size", type=int, help="by default 128, or -1 (one scale per row) with int8 activations")
    parser.add_argument("--rotate", type=float, default=2.0e8, help="bytes of packed weights to rotate through")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--name", default="kernels")
    args = parser.parse_args()
    int8 = args.int8_activations
    args.bits = args.bits or ([4] if int8 else [3, 4])
    args.rows = args.rows or ([1, 16, 128, 512, 2048] if int8 else [1, 4, 16, 128, 512])
    args.group_size = args.group_size or (-1 if int8 else 128)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    bandwidth = timing.read_bandwidth(args.device)
    about = {
        **timing.machine(args.device),
        "threads": args.threads,
        "read bandwidth GB/s": round(bandwidth / 1e9, 1),
        "activations": "bf16, rounded to int8" if int8 else "bf16",
        "group": args.group_size,
    }
    print(about, flush=True)
    rows = []
    for shape in args.shapes:
        for bits in args.bits:
            for m in args.rows:
                repeats = args.repeats if m <= 64 else max(5, args.repeats // 3)
                rows.append(measure(shape, bits, m, args.group_size, int8, args.rotate, repeats, args.device, bandwidth))
                print(rows[-1], flush=True)
                timing.write(args.name, about, rows)


if __name__ == "__main__":
    main()
