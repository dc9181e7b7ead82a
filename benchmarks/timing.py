"""What the benchmarks share: paired timings, the machine's description, results as JSON and Markdown."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def paired_seconds(runs: dict[str, Callable[[], object]], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """The seconds of every repeat of each run. The runs take turns, so that a noisy moment hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            wait(device)
            start = time.perf_counter()
            run()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """The median of slow / fast over paired repeats."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def read_bandwidth(device: str = "cpu", size: int = 2**29) -> float:
    """Bytes per second of summing a buffer larger than the caches."""
    data = torch.ones(size // 4, device=device)
    return size / statistics.median(paired_seconds({"sum": data.sum}, 9, device)["sum"])


def machine(device: str = "cpu") -> dict[str, Any]:
    """The date, the command, the device and the versions with which figures were measured."""
    import torchao

    from torchao_qig.lvlm.bench import device_name

    name, isa = device_name(torch.device(device)), torch.backends.cpu.get_cpu_capability()
    return {"date": date.today().isoformat(), "command": "python -m " + " ".join([_module(), *sys.argv[1:]]), "device": name, "cpu_capability": isa,
            "torch": torch.__version__, "torchao": torchao.__version__, "python": platform.python_version()}  # fmt: skip


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def header(columns: Sequence[str]) -> list[str]:
    """The two lines that open a Markdown table."""
    return ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]


def store(name: str, result: dict[str, Any], markdown: str) -> None:
    """Write results/<name>.json and .md."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(markdown)


def write(name: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Store rows as a table without further changes, with `about` (the command, the machine) above it."""
    columns = list(rows[0])
    table = [columns, ["---"] * len(columns), *[[str(row.get(c, "")) for c in columns] for row in rows]]
    head = "\n".join(f"- {key}: {value}" for key, value in about.items())
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    store(name, {**about, "rows": rows}, f"# {name}\n\n{head}\n\n{body}\n")
