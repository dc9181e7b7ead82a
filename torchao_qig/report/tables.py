"""Numbers as the page shows them: in sentences, short facts and tables. Numbers that are missing are left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torchao_qig.calibration.result import Calibration
from torchao_qig.report.names import place, rows
from torchao_qig.report.read import Found


class Table(NamedTuple):
    head: list[str]
    rows: list[list[str]]
    numeric: list[bool]


class Fact(NamedTuple):
    name: str
    value: str
    more: str = ""


def number(value: Any, form: str = ".3g") -> str:
    """A number as text; "-" if it is missing or not finite."""
    return format(value, form) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else "-"


def size(value: Any) -> str:
    """A number of bytes as text, with a unit."""
    if not isinstance(value, (int, float)):
        return "-"
    power = 0
    while abs(value) >= 1000 and power < 4:
        value, power = value / 1024, power + 1
    return f"{value:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def duration(value: Any) -> str:
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def table(head: Sequence[str], found: Iterable[Sequence[str]], text: int = 1) -> Table | None:
    """A table; None without rows. `text`: how many of the first columns hold text, not numbers. Columns of numbers without a value are left out."""
    lines = [list(line) for line in found]
    kept = [i for i in range(len(head)) if i < text or any(line[i] != "-" for line in lines)]
    return Table([head[i] for i in kept], [[line[i] for i in kept] for line in lines], [i >= text for i in kept]) if lines else None


def facts(found: Found) -> list[Fact]:
    """The facts at the head of the page."""
    result = []
    if found.calibration and found.calibration.grids:
        result.append(Fact("weights", *_bits(found.calibration)))
    plan, check = found.receipt.get("plan") or {}, found.receipt.get("check") or {}
    before, after, whole = (plan.get(key) for key in ("bytes_before", "bytes_after", "model_bytes"))
    if before and after:
        name = "model" if whole else "quantized weights"
        before, after = (whole, whole - before + after) if whole else (before, after)
        result.append(Fact(name, f"{size(before)} to {size(after)}", f"{after / before:.0%} of full precision"))
    if "kl" in check:
        form = ".1e" if isinstance(check["kl"], float) and check["kl"] < 0.001 else ".4f"
        among = f" of {check['tokens']} tokens" if "tokens" in check else ""
        kept = f"full precision's first choice kept at {number(check['agreement'], '.1%')}{among}" if "agreement" in check else ""
        result.append(Fact("KL to full precision", number(check["kl"], form), kept))
    if "seconds" in found.receipt:
        peak = f"peak memory {size(found.receipt['peak_host_bytes'])}" if "peak_host_bytes" in found.receipt else ""
        result.append(Fact("made in", duration(found.receipt["seconds"]), peak))
    return result


def _bits(calibration: Calibration) -> tuple[str, str]:
    every = sorted({grid[0] for grid in calibration.grids.values()})
    groups = sorted({grid[1] for grid in calibration.grids.values()})
    value = f"{every[0]} bits" if len(every) == 1 else f"{every[0]} to {every[-1]} bits"
    return value, ", ".join("a scale per row" if g == -1 else f"groups of {g}" for g in groups)


def bits_text(calibration: Calibration) -> str:
    """Sentences about the bits and the grids of the linears."""
    counts = Counter((grid[0], grid[1], bool(grid[2]), "int8 activations" in grid[3:]) for grid in calibration.grids.values())
    parts = []
    for (bits, group, symmetric, int8), count in counts.most_common():
        form = ["a scale per row" if group == -1 else f"groups of {group}", "symmetric" if symmetric else "asymmetric", *["int8 activations"] * int8]
        parts.append(f"{count} linears at {bits} bits, {', '.join(form)}")
    text = "; ".join(parts) + "." if parts else ""
    weights = {name: w.rows * w.columns for name, w in calibration.weights.items()}
    if len({grid[0] for grid in calibration.grids.values()}) > 1 and weights.keys() >= calibration.grids.keys():
        mean = sum(calibration.grids[name][0] * n for name, n in weights.items() if name in calibration.grids) / sum(
            weights[name] for name in calibration.grids
        )
        text += f" On average {mean:.2f} bits per weight."
    return text


def before_after(calibration: Calibration) -> tuple[dict[str, tuple[float, float]], str, str]:
    """Errors before and after: label -> error of rounding to nearest and error of the chosen weights; the error's name; a sentence about it."""
    if calibration.squared_errors:
        sentence = "The integers were chosen: each group's weighted squared error at its outputs, over the calibration tokens."
        return dict(calibration.squared_errors), "squared error", sentence
    loss = str(_of_scales(calibration).get("loss", "loss"))
    found = {label: (g.rounding_loss, g.loss) for label, g in calibration.groups.items() if math.isfinite(g.rounding_loss)}
    chosen = "as QIG's scales leave it" if searched(calibration) else "which no scales were searched to reduce"
    return found, f"loss ({loss})", f"The loss ({loss}) at the output of the module that each group feeds, {chosen}." if found else ""


def _of_scales(calibration: Calibration) -> dict[str, Any]:
    """The settings of the step that chose scales. In a calibration from before there were steps, all settings are searched for them."""
    steps = calibration.settings.get("steps")
    every = [own for step in steps if isinstance(step, dict) for own in step.values()] if isinstance(steps, list) else [calibration.settings]
    return next((own for own in every if isinstance(own, dict) and "loss" in own), {})


def searched(calibration: Calibration) -> bool:
    """Whether there was more than one candidate for any scale."""
    return any(len(g.losses) > 1 or g.ratio != 0 for g in calibration.groups.values())


def cells(values: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Values by name, arranged for a figure: kind -> layer -> mean value."""
    parts: dict[str, dict[str, list[float]]] = {}
    for name, layer in rows(values).items():
        parts.setdefault(place(name).kind, {}).setdefault(layer, []).append(values[name])
    return {kind: {layer: sum(v) / len(v) for layer, v in column.items()} for kind, column in parts.items()}


def folds(calibration: Calibration) -> Table | None:
    """A table of how many scales were folded into what."""
    counts = Counter((place(g.label).kind, g.fold_kind) for g in calibration.groups.values() if g.ratio != 0)
    named = {"act_pre_scale": "kept: the kernel multiplies it in (act_pre_scale)", "norm": "into the norm before", "linear": "into the linear before"}
    return table(["module", "its scale went", "groups"], ([kind, named.get(where, where), str(n)] for (kind, where), n in counts.items()), 2)


def groups(calibration: Calibration | None, weights: Mapping[str, Mapping[str, float]]) -> Table | None:
    """The table of all groups: errors, mean weights by kind of token, and scales."""
    errors = before_after(calibration)[0] if calibration else {}
    found = calibration.groups if calibration else {}
    scaled = calibration is not None and searched(calibration)
    lines = []
    for label in rows([*errors, *(k for k in found if k not in errors), *(k for k in weights if k not in errors and k not in found)]):
        before, after = errors.get(label, (math.nan, math.nan))
        group, means = found.get(label), weights.get(label, {})
        share = number(after / before, ".1%") if before > 0 else "-"
        scale = [number(group.ratio, ".2f"), group.fold_into or group.fold_kind] if group and scaled else ["-", "-"]
        lines.append([label, number(before), number(after), share, *(number(means.get(k), ".2f") for k in ("text", "vision", "answer")), *scale])
    return table(["group", "rounded", "chosen", "left", "weight: text", "picture", "answer", "ratio", "scale in"], lines)


def evaluation(found: Found) -> Table | None:
    def interval(row: Mapping[str, Any], key: str, form: str) -> str:
        value = row.get(key)
        return f"{number(value[0], form)} ({number(value[1], form)} to {number(value[2], form)})" if isinstance(value, list) and len(value) == 3 else "-"

    lines = [
        [str(r.get("name", "")), interval(r, "accuracy", ".1%"), interval(r, "nll", ".4f"), interval(r, "kl", ".4f"), size(r.get("bytes"))]
        for r in found.evaluation.get("rows", [])
    ]
    return table(["", "accuracy", "NLL per token", "KL to full precision", "size"], lines)


def bench(found: Found) -> Table | None:
    lines = [
        [
            str(r.get("name", "")), str(r.get("dtype") or "-"), size(r.get("bytes_on_disk")), duration_of_token(r.get("first_token_seconds")),
            number(r.get("prefill_tokens_per_second"), ",.0f"), number(r.get("decode_tokens_per_second"), ",.1f"), size(r.get("peak_bytes")),
        ]
        for r in found.bench.get("rows", [])
    ]  # fmt: skip
    return table(["", "dtype", "on disk", "first token", "prefill tokens/s", "decode tokens/s", "peak memory"], lines)


def duration_of_token(value: Any) -> str:
    return f"{1000 * value:.0f} ms" if isinstance(value, (int, float)) and value < 10 else duration(value)


def by(part: Mapping[str, Any]) -> str:
    """The command that made a table, and the date."""
    return ", ".join(str(part[k]) for k in ("command", "date") if part.get(k))


def time_text(found: Found) -> str:
    parts = []
    pairs = [("Calibration", found.calibration), ("Token weights", found.sensitivity if found.sensitivity is not found.calibration else None)]
    for what, calibration in pairs:
        stats = calibration.stats if calibration else {}
        if "seconds" in stats:
            detail = f"{stats['samples']} samples of {stats['tokens']} tokens together" if {"samples", "tokens"} <= stats.keys() else ""
            memory = f"peak memory {size(stats['peak_host_bytes'])}" if "peak_host_bytes" in stats else ""
            device = f"{size(stats['peak_device_bytes'])} on the device" if "peak_device_bytes" in stats else ""
            parts.append(f"{what}: {', '.join(p for p in (duration(stats['seconds']), detail, memory, device) if p)}.")
    return " ".join(parts)


def plan_text(receipt: Mapping[str, Any]) -> str:
    plan = receipt.get("plan") or {}
    left = sum(len(names) for names in (plan.get("left") or {}).values())
    return f"{plan['quantized']} linears were quantized, {left} were left." if "quantized" in plan else ""


def sample_text(receipt: Mapping[str, Any]) -> str:
    samples = receipt.get("samples") or {}
    skipped = ", ".join(f"{n} ({reason})" for reason, n in (samples.get("skipped") or {}).items())
    return f"{samples['used']} samples were used" + (f"; skipped: {skipped}." if skipped else ".") if "used" in samples else ""


def settings(found: Found) -> list[tuple[str, list[tuple[str, str]]]]:
    """The lists of settings and versions, each with its title and its pairs of name and value."""
    recipe = found.receipt.get("recipe") or (found.calibration.settings if found.calibration else {})
    device = {"device": found.receipt["device"]} if found.receipt.get("device") else {}
    parts = {"Settings": recipe, "Versions": {**(found.receipt.get("versions") or {}), **device}}
    return [(title, [(str(k), "-" if v is None else str(v)) for k, v in part.items()]) for title, part in parts.items() if part]
