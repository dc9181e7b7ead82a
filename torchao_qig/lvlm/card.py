"""The model card (README.md) of a checkpoint that `torchao-qig` wrote: from what lies in its qig/ folder, measured tables included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchao_qig.lvlm.load import auto_class, load_config

SHOWN = ("bits", "group_size", "symmetric", "int8_activations", "budget", "modules", "sensitivity", "compensate", "samples", "seed", "calib")


def _read(directory: Path, name: str) -> Any:
    path = directory / "qig" / name
    return json.loads(path.read_text()) if path.exists() else None


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _with_interval(value: Any, form: str, factor: float = 1.0) -> str:
    if value is None:
        return ""
    mean, low, high = (factor * v for v in value)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def evaluation_table(found: dict[str, Any]) -> str:
    """Markdown, with 95 % intervals."""
    lines = ["| model | answers right, % | NLL per token | KL to full precision |", "| --- | --- | --- | --- |"]
    for row in found["rows"]:
        cells = [_with_interval(row.get("accuracy"), ".1f", 100), _with_interval(row.get("nll"), ".4f"), _with_interval(row.get("kl"), ".4f")]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bench_table(found: dict[str, Any]) -> str:
    lines = ["| model | size on disk | first token, s | prefill, tokens/s | decode, tokens/s | peak memory |", "| --- | --- | --- | --- | --- | --- |"]
    for row in found["rows"]:
        cells = [_size(row["bytes_on_disk"]), f"{row['first_token_seconds']:.3f}", f"{row['prefill_tokens_per_second']:.0f}"]
        cells += [f"{row['decode_tokens_per_second']:.1f}", _size(row["peak_bytes"])]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tasks_table(found: dict[str, Any]) -> str:
    """lmms-eval's metrics."""
    lines = ["| task | metric | value |", "| --- | --- | --- |"]
    for task, metrics in found["tasks"].items():
        numbers = {name.split(",")[0]: v for name, v in metrics.items() if isinstance(v, (int, float)) and "stderr" not in name}
        lines += [f"| {task} | {name} | {value:.4g} |" for name, value in numbers.items()]
    return "\n".join(lines)


def text(directory: Path, name: str) -> str:
    """The card, from what is in the directory now; `name` is what the directory will be called."""
    receipt, *others = (_read(directory, f"{name}.json") for name in ("receipt", "evaluation", "tasks", "bench"))
    plan, settings, found = receipt["plan"], receipt["recipe"], receipt["check"]
    kind = auto_class(load_config(str(directory))).__name__
    left = "\n".join(f"- {why}: {len(names)}" for why, names in plan["left"].items())
    after = plan["model_bytes"] - plan["bytes_before"] + plan["bytes_after"]
    measured = [f"KL to full precision on {found['tokens']} tokens of calibration samples: {found['kl']:.4f} nats per token; the same likeliest token at"
                f" {found['agreement']:.1%} of them."]  # fmt: skip
    for other, table in zip(others, (evaluation_table, tasks_table, bench_table), strict=True):
        measured += [table(other), f"`{other['command']}`, {other['date']}"] if other is not None else []
    return f"""---
base_model: {json.dumps(receipt["model"])}
library_name: transformers
tags: [torchao, torchao_qig, quantized]
---

# {Path(receipt["model"]).name}, {settings["bits"]} bits

Quantized with torchao_qig {receipt["versions"]["torchao_qig"]} on {receipt["created"]}: {plan["quantized"]} linears,
{_size(plan["bytes_before"])} -> {_size(plan["bytes_after"])}; the whole model {_size(plan["model_bytes"])} -> {_size(after)}.

```python
import torchao_qig  # registers the packed weights
from transformers import {", ".join(sorted(("AutoProcessor", kind)))}

model = {kind}.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```

## Measured

{(chr(10) * 2).join(measured)}

## How it was made

```bash
{receipt["command"]}
```

{chr(10).join(f"- {key}: {settings[key]}" for key in SHOWN if settings.get(key) is not None)}

All settings: `qig/recipe.yaml`. {receipt["samples"]["used"]} samples, {receipt["seconds"]:.0f} s, peak memory {_size(receipt["peak_host_bytes"])}.
Versions: {", ".join(f"{name} {version}" for name, version in receipt["versions"].items())}.

`qig/samples/` shows some of the calibration samples, and `qig/receipt.json` names paths: look at them before you publish this directory.

Left as they were:

{left or "- nothing"}
"""


def rewrite(directory: Path) -> None:
    """After something new has been measured."""
    (directory / "README.md").write_text(text(directory, directory.name))
