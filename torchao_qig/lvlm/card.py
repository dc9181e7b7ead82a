"""The model card (README.md) of a checkpoint that `torchao-qig` wrote, with tables of what was measured. It is made from the files in qig/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchao_qig.calibration.estimate import size_text
from torchao_qig.errors import UserError
from torchao_qig.lvlm.load import auto_class, load_config

BENCH = ("model", "weights", "on disk", "load, s", "warm-up, s", "first token, s", "prefill, tokens/s", "decode, tokens/s", "peak memory")
SHOWN = ("bits", "group_size", "symmetric", "int8_activations", "budget", "modules", "method", "steps", "samples", "seed", "calib")


def _read(directory: Path, name: str) -> Any:
    path = directory / "qig" / name
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise UserError(f"file={str(path)!r}: not JSON ({error}); run the command that wrote it again, or delete it") from error


def _with_interval(value: Any, form: str, factor: float = 1.0) -> str:
    if value is None:
        return ""
    mean, low, high = (factor * v for v in value)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def evaluation_table(found: dict[str, Any]) -> str:
    """The table of an evaluation in Markdown, with 95 % intervals."""
    lines = ["| model | answers right, % | NLL per token | KL to full precision |", "| --- | --- | --- | --- |"]
    for row in found["rows"]:
        cells = [_with_interval(row.get("accuracy"), ".1f", 100), _with_interval(row.get("nll"), ".4f"), _with_interval(row.get("kl"), ".4f")]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bench_table(result: dict[str, Any]) -> str:
    """The table of `bench` in Markdown: a line for each model, and with two models a line of ratios of the first to the second."""
    lines = ["| " + " | ".join(BENCH) + " |", "|" + " --- |" * len(BENCH)]
    for r in result["rows"]:
        cells = [
            str(r["name"]).replace("|", "\\|"), r["dtype"], size_text(r["bytes_on_disk"]), f"{r['load_seconds']:.1f}", f"{r['warm_up_seconds']:.1f}",
            f"{r['first_token_seconds']:.3f}", f"{r['prefill_tokens_per_second']:.0f}", f"{r['decode_tokens_per_second']:.1f}", size_text(r["peak_bytes"]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    if ratio := result["ratios"]:
        shown = ["bytes_on_disk", None, None, "first_token_seconds", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_bytes"]
        lines.append("| ratio |  | " + " | ".join(f"{ratio[key]:.2f}" if key else "" for key in shown) + " |")
    return "\n".join(lines)


def tasks_table(found: dict[str, Any]) -> str:
    """The table of lmms-eval's metrics in Markdown."""
    lines = ["| task | metric | value |", "| --- | --- | --- |"]
    for task, metrics in found["tasks"].items():
        numbers = {name.split(",")[0]: v for name, v in metrics.items() if isinstance(v, (int, float)) and "stderr" not in name}
        lines += [f"| {task} | {name} | {value:.4g} |" for name, value in numbers.items()]
    return "\n".join(lines)


def text(directory: Path, name: str) -> str:
    """The text of the card, made from the files that are in the directory now. `name`: what the directory will be called."""
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
{size_text(plan["bytes_before"])} -> {size_text(plan["bytes_after"])}; the whole model {size_text(plan["model_bytes"])} -> {size_text(after)}.

```python
import torchao_qig  # registers the packed weights
from transformers import {", ".join(sorted(("AutoProcessor", kind)))}

model = {kind}.from_pretrained({json.dumps(name, ensure_ascii=False)})
processor = AutoProcessor.from_pretrained({json.dumps(name, ensure_ascii=False)})
```

## Measured

{(chr(10) * 2).join(measured)}

## How it was made

```bash
{receipt["command"]}
```

{chr(10).join(f"- {key}: {settings[key]}" for key in SHOWN if settings.get(key) is not None)}

All settings: `qig/recipe.yaml`. {receipt["samples"]["used"]} samples, {receipt["seconds"]:.0f} s, peak memory {size_text(receipt["peak_host_bytes"])}.
Versions: {", ".join(f"{name} {version}" for name, version in receipt["versions"].items())}.

`qig/samples/` shows some of the calibration samples, and `qig/receipt.json` names paths: look at them before you publish this directory.

Left as they were:

{left or "- nothing"}
"""


def note(model: str, file: str, found: dict[str, Any]) -> None:
    """If `quantize` wrote the model, store `found` as qig/`file` beside it and bring its card up to date."""
    directory = Path(model).expanduser()
    if (directory / "qig" / "receipt.json").exists():
        (directory / "qig" / file).write_text(json.dumps(found, indent=1, default=float) + "\n")
        (directory / "README.md").write_text(text(directory, directory.name))
