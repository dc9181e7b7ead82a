"""Make the page: draw the figures, colour the samples, and put everything into one HTML file that loads no other file."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from torchao_qig.calibration.result import Calibration
from torchao_qig.report import colours, figures, tables
from torchao_qig.report.cards import SAMPLES, SPAN, cards
from torchao_qig.report.names import place, rows
from torchao_qig.report.read import FOLDER, Found, read
from torchao_qig.report.weights import KINDS, View, by_modality, samples, views

FIGURES = ("sensitivity", "errors", "ratios", "bits", "size", "time")
MEASURES = {"accuracy": "accuracy", "kl": "KL to full precision", "nll": "NLL per token"}


def write(directory: Path, output: Path | None = None) -> Path:
    """Read the checkpoint in `directory` and write its page; see `torchao_qig.report.write`."""
    found = read(directory)
    path = output or directory / FOLDER / "report" / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(found, path.parent), encoding="utf-8")
    return path


def render(found: Found, directory: Path) -> str:
    """The page as HTML. The figures are also written into `directory`, as files of their own."""
    weighted = found.sensitivity if found.sensitivity and found.sensitivity.tokens else None
    chosen = views(weighted) if weighted else []
    weighed = samples(weighted, chosen, SAMPLES) if weighted else []
    reach = colours.reach([s.weights for s in weighed])
    shown = cards(found, chosen, weighed, reach)
    style, script, page = (files("torchao_qig.report").joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js", "html"))
    shades = [colours.css(i) for i in range(colours.LEVELS)]
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(page).render(
        name=found.name,
        created=found.receipt.get("created"),
        command=found.receipt.get("command"),
        facts=tables.facts(found),
        lacks=found.lacks,
        cards=shown,
        views=chosen,
        ticks=colours.ticks(reach),
        colours=shades,
        data={"views": _choices(chosen), "weights": [c.weights for c in shown], "colours": shades, "reach": reach, "span": SPAN} if chosen else None,
        **_decided(found, weighted, directory),
        **_measured(found),
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _choices(chosen: list[View]) -> dict[str, list[tuple[str, int]]]:
    """Kind of group -> (layer, number of the view) of each of its views, for the page's controls."""
    found: dict[str, list[tuple[str, int]]] = {}
    for number, view in enumerate(chosen):
        found.setdefault(view.kind, []).append((view.layer, number))
    return found


def _decided(found: Found, weighted: Calibration | None, directory: Path) -> dict[str, Any]:
    """The parts of the page that come from calibrations."""
    calibration = found.calibration
    means = by_modality(weighted) if weighted else {}
    drawn: dict[str, figures.Drawn] = {}
    text = dict.fromkeys(("error_text", "ratio_text", "bits_text"), "")
    fold = None
    if means:
        kinds = {kind: {label: m[kind] for label, m in means.items() if kind in m} for kind in KINDS}
        drawn["sensitivity"] = figures.sensitivity({kind: tables.cells(values) for kind, values in kinds.items() if values}, directory)
    if calibration:
        errors, what, text["error_text"] = tables.before_after(calibration)
        if errors:
            before, after = ({label: pair[i] for label, pair in errors.items()} for i in (0, 1))
            drawn["errors"] = figures.errors(tables.cells(before), tables.cells(after), what, directory)
        if tables.searched(calibration):
            drawn["ratios"] = figures.ratios(tables.cells({label: g.ratio for label, g in calibration.groups.items()}), directory)
            fold = tables.folds(calibration)
            moved = sum(g.ratio != 0 for g in calibration.groups.values())
            text["ratio_text"] = f"Scales were searched for {len(calibration.groups)} groups; {moved} of them take one."
        elif calibration.groups or calibration.squared_errors:
            text["ratio_text"] = "No scales were searched."
        text["bits_text"] = tables.bits_text(calibration)
        if _uneven(calibration):
            drawn["bits"] = figures.bits(tables.cells({name: float(grid[0]) for name, grid in calibration.grids.items()}), directory)
        if per_block := calibration.stats.get("block_seconds"):
            drawn["time"] = figures.seconds(per_block, directory)
    for measure, what in MEASURES.items():
        measured = [row for row in found.evaluation.get("rows", []) if row.get("bytes") and isinstance(row.get(measure), list)]
        if measured:
            drawn["size"] = figures.against_size(measured, measure, what, directory)
            break
    return {"figures": {**dict.fromkeys(FIGURES), **drawn}, "folds": fold, "groups": tables.groups(calibration, means), **text}


def _uneven(calibration: Calibration) -> bool:
    """Whether a figure of the bits is of use: bits differ, or some layer lacks a linear that others have."""
    kinds: dict[str, set[str]] = {}
    for name, layer in rows(calibration.grids).items():
        kinds.setdefault(layer, set()).add(place(name).kind)
    return len({grid[0] for grid in calibration.grids.values()}) > 1 or len({frozenset(k) for k in kinds.values()}) > 1


def _measured(found: Found) -> dict[str, Any]:
    """The parts of the page that come from the receipt, the evaluation and the benchmark."""
    return {
        "evaluation": tables.evaluation(found),
        "evaluation_by": tables.by(found.evaluation),
        "bench": tables.bench(found),
        "bench_by": tables.by(found.bench),
        "time_text": tables.time_text(found),
        "plan_text": tables.plan_text(found.receipt),
        "sample_text": tables.sample_text(found.receipt),
        "left": sorted(((found.receipt.get("plan") or {}).get("left") or {}).items()),
        "lists": tables.settings(found),
    }
