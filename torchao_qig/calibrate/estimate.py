"""What a calibration will take, before it runs: peak memory and time, from the shapes of the linears and the number of tokens.

Blocks are calibrated one after the other, so memory is that of the largest block. On the compute device: the block in the dtype
of the computation (twice with `compensate`: as it is, and as it becomes), and what choosing one group's integers takes. On the
host: the samples' hidden states and what the groups of one block saw. `python -m benchmarks.plan` compares all this with real runs.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from torchao_qig.calibrate.chains import Chain
from torchao_qig.calibrate.compensate import BLOCK, descend
from torchao_qig.calibrate.work import KEEP
from torchao_qig.config import QIGWeightOnlyConfig
from torchao_qig.formats import Affine

SAMPLES, LENGTH = 128, 1024  # assumed where no batches are given
SEARCH = {"coarse": 19, "exhaustive": 100}  # forward passes of a block over its samples: benchmarks/results/calibration.md
AT_ONCE = 2048  # tokens that are computed at once, about
FULL_SPEED = 0.5  # share of a matrix product's speed that a block reaches
SOLVING = 2  # how much slower factors and triangular systems are than products
GRAMS, WEIGHTS = 8, 7  # copies of a group's Gram matrix and of its weights that choosing integers holds at once


@dataclass(frozen=True)
class Need:
    """Beyond the model itself.

    Attributes:
        device_bytes: at the peak, on the device where blocks are computed.
        host_bytes: at the peak, in the host's memory (or in files past `max_host_memory`), the packed weights included.
        seconds: all in all.
        samples, tokens: what that is for.
        device: where blocks are computed.
    """

    device_bytes: int
    host_bytes: int
    seconds: float
    samples: int
    tokens: int
    device: str

    def __str__(self) -> str:
        host = f"{size_text(self.device_bytes + self.host_bytes)} of memory" if self.device in ("cpu", "meta") else (
            f"{size_text(self.device_bytes)} on {self.device} and {size_text(self.host_bytes)} of host memory"
        )  # fmt: skip
        return f"{self.samples} samples, {self.tokens:,} tokens: about {_time(self.seconds)} and {host} beyond the model itself"


def size_text(count: float) -> str:
    """Bytes for a person."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


@dataclass(frozen=True)
class _Group:
    """Linears of one module with inputs of the same width: nearly always those that share an input."""

    rows: int
    columns: int
    alone: bool


def _groups(block: nn.Module, names: Iterable[str]) -> list[_Group]:
    found: dict[tuple[str, int], list[int]] = {}
    for name in names:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        found.setdefault((name.rpartition(".")[0], linear.in_features), []).append(linear.out_features)
    return [_Group(sum(rows), columns, len(rows) == 1) for (_, columns), rows in found.items()]


def products_per_second(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Multiplications and additions per second of a matrix product here, measured for a fraction of a second."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        a = (a @ a) * 1e-3
        float(a[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def seconds_per_column(device: torch.device) -> tuple[float, float]:
    """Of choosing the integers of one column: in any case, and for each row of the weight. Measured likewise."""
    rows, columns = 64, BLOCK
    weight, gram = torch.ones(rows, columns, device=device), torch.eye(columns, device=device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        codes, _ = descend(weight, weight.clone(), weight.clone(), gram, Affine(3, -1), (weight, weight))
        float(codes[0, 0])
        seconds.append((time.perf_counter() - start) / columns)
    ahead = torch.zeros(4096, columns // 2, device=device)  # half a block lies ahead on average
    column, row = torch.ones(4096, device=device), torch.ones(columns // 2, device=device)
    passes = []
    for _ in range(5):
        start = time.perf_counter()
        float(ahead.addr_(column, row)[0, 0])
        passes.append((time.perf_counter() - start) / 4096)
    return min(seconds), min(passes)


def need(
    model: nn.Module, chains: list[Chain], linears: set[str], config: QIGWeightOnlyConfig, packed: int, samples: int, tokens: int, device: torch.device,
    dtype: torch.dtype,
) -> Need:  # fmt: skip
    """For a calibration of these linears on so many tokens; `packed`: bytes of the weights that it chooses."""
    place = torch.device("cpu") if device.type == "meta" else device
    itemsize, rate = dtype.itemsize, FULL_SPEED * products_per_second(place, dtype)
    on_device = on_host = 0
    seconds = 0.0
    column, row = seconds_per_column(place) if config.compensates else (0.0, 0.0)
    streams = 2 if config.compensates or config.on_quantized_inputs else 1
    for name in (n for chain in chains for n in chain.names):
        block = model.get_submodule(name)
        prefix = f"{name}." if name else ""
        groups = _groups(block, [n.removeprefix(prefix) for n in linears if n.startswith(prefix)])
        if not groups:
            continue
        size = sum(p.numel() for p in block.parameters())
        width = min(g.columns for g in groups)
        outputs = min(KEEP, tokens * itemsize * sum(g.rows for g in groups if not g.alone))
        seen = tokens * itemsize * sum(g.columns + (0 if g.alone else width) for g in groups) + outputs
        hidden = streams * tokens * width * itemsize
        choosing = max(4 * (GRAMS * g.columns**2 + WEIGHTS * g.rows * g.columns) for g in groups) if config.rounds else 0
        searching = itemsize * (size + 4 * min(tokens, AT_ONCE) * sum(g.rows for g in groups)) if config.equalizes else 0  # rounded weights, graphs
        on_device = max(on_device, (2 if streams > 1 else 1) * size * itemsize + max(choosing, searching))
        on_host = max(on_host, seen + hidden)
        seconds += _products(size, groups, tokens, config) / rate
        if config.compensates:
            seconds += sum(g.columns * (1 + config.sweeps) * (column + g.rows * row) for g in groups)
    return Need(on_device, on_host + packed, seconds, samples, tokens, device.type)


def _products(size: int, groups: list[_Group], tokens: int, config: QIGWeightOnlyConfig) -> float:
    """Multiplications and additions that one block takes."""
    forward = 2.0 * size * tokens
    total = forward
    if config.equalizes and config.smoothing is None:
        total += SEARCH[config.search] * forward
    if config.compensates or config.on_quantized_inputs:
        total += (1 + len(groups)) * forward
    if config.rounds:
        for g in groups:
            total += 4.0 * tokens * g.columns**2  # its two Gram matrices
            solved = SOLVING * 2.0 * g.columns**3 + 2.0 * g.rows * g.columns**2 * (3 + 4 * config.sweeps)
            total += solved if config.compensates else 0.0
    return total
