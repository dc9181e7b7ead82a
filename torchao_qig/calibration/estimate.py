"""What a calibration will take, before it runs: peak memory and time, from the shapes of the linears and the number of tokens.

Blocks are calibrated one after the other, so memory is that of the largest block. On the compute device: the block in the dtype of the computation
(twice where the samples also run through the quantized model), and what the steps hold. On the host: the samples' hidden states and what the groups of
one block saw. Each step states its own cost (`Step.cost`). `python -m benchmarks.plan` compares all this with real runs.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from torchao_qig.calibration.job import Job
from torchao_qig.formats import Affine
from torchao_qig.methods.solver import BLOCK, descend
from torchao_qig.methods.step import BlockSize, GroupShape
from torchao_qig.watch.block import KEEP
from torchao_qig.watch.chains import Chain

SAMPLES, LENGTH = 128, 1024  # assumed where no batches are given
FULL_SPEED = 0.5  # share of a matrix product's speed that a block reaches


@dataclass(frozen=True)
class Need:
    """What a calibration needs in addition to the model itself.

    Attributes:
        device_bytes: at the peak, on the device where blocks are computed.
        host_bytes: at the peak, in the host's memory (or in files past `max_host_memory`), the packed weights included.
        seconds: of the whole calibration.
        samples, tokens: the amount of data that this holds for.
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
    """A number of bytes as text, with a unit."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def _groups(block: nn.Module, names: Iterable[str]) -> list[GroupShape]:
    """The shapes of a block's groups, guessed without running it: linears of one module with inputs of the same width nearly always share their input."""
    found: dict[tuple[str, int], list[int]] = {}
    for name in names:
        linear = block.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        found.setdefault((name.rpartition(".")[0], linear.in_features), []).append(linear.out_features)
    return [GroupShape(sum(rows), columns, len(rows) == 1) for (_, columns), rows in found.items()]


def products_per_second(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Multiplications and additions per second of a matrix product on this device, measured in a fraction of a second."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        a = (a @ a) * 1e-3
        float(a[0, 0])  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds[1:])


def seconds_per_column(device: torch.device) -> tuple[float, float]:
    """Seconds for choosing the codes of one column: a fixed part, and a part for each row of the weight. Both are measured here."""
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


def need(model: nn.Module, chains: list[Chain], job: Job, packed: int, samples: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Need:
    """The memory and time of calibrating the job's linears on so many tokens. `dtype`: of the computation; `packed`: bytes of the weights that are chosen."""
    place = torch.device("cpu") if device.type == "meta" else device
    itemsize, rate = dtype.itemsize, FULL_SPEED * products_per_second(place, dtype)
    on_device = on_host = 0
    seconds = 0.0
    columns = column_rows = 0
    streams = 2 if job.two_streams else 1
    for name in (n for chain in chains for n in chain.names):
        block = model.get_submodule(name)
        prefix = f"{name}." if name else ""
        groups = _groups(block, [n.removeprefix(prefix) for n in job.forms if n.startswith(prefix)])
        if not groups:
            continue
        size = BlockSize(sum(p.numel() for p in block.parameters()), tuple(groups), tokens)
        costs = [step.cost(size) for step in job.steps]
        width = min(g.columns for g in groups)
        outputs = min(KEEP, tokens * itemsize * sum(g.rows for g in groups if not g.alone))
        seen = tokens * itemsize * sum(g.columns + (0 if g.alone else width) for g in groups) + outputs
        hidden = streams * tokens * width * itemsize
        held = max((4 * c.floats + itemsize * c.numbers for c in costs), default=0)
        on_device = max(on_device, streams * size.parameters * itemsize + held)
        on_host = max(on_host, seen + hidden)
        forwards = 1 + (1 + len(groups) if job.two_streams else 0) + sum(c.forwards for c in costs)
        seconds += (forwards * 2.0 * size.parameters * tokens + sum(c.products for c in costs)) / rate
        columns, column_rows = columns + sum(c.columns for c in costs), column_rows + sum(c.column_rows for c in costs)
    if columns:
        per_column, per_row = seconds_per_column(place)
        seconds += columns * per_column + column_rows * per_row
    return Need(on_device, on_host + packed, seconds, samples, tokens, device.type)
