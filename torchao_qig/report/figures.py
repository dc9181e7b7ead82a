"""The figures. Each is drawn with matplotlib, written as SVG and PNG, and returned as SVG for the page.

In the page's copy, the colour INK becomes the page's text colour, so that the figure is legible on light and dark pages. Identifiers get the
figure's name as a prefix, so that several figures can be in one document.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import NDArray

from torchao_qig.report.weights import KINDS

INK, PAPER = "#010203", "#ffffff"  # nothing else has the colour INK, so that the page can replace it
BLUE, ORANGE, GREY = "#2f7ed8", "#e9540c", "#8a8f98"
SERIES = (BLUE, ORANGE, "#1a9e77", "#a463d6", "#c79a00", "#d6498f", "#6b7785", "#00a3b4")
WIDTH = 7.2  # inches; 72 points each
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "font.family": "sans-serif", "axes.titlesize": 9,
    "axes.spines.top": False, "axes.spines.right": False,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlecolor": INK,
    "legend.frameon": False, "axes.facecolor": "none", "figure.facecolor": "none", "lines.linewidth": 1.4, "lines.markersize": 4,
}  # fmt: skip
Values = Mapping[str, Mapping[str, float]]  # column -> row -> value


@dataclass
class Drawn:
    """A figure. `svg`: its copy for the page. `alt`: a description in words of what it shows."""

    name: str
    svg: Markup
    alt: str


@contextmanager
def _drawing(name: str, height: float, width: float = WIDTH) -> Iterator[Figure]:
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        yield Figure(figsize=(width, height), layout="constrained")


def _written(figure: Figure, name: str, alt: str, directory: Path) -> Drawn:
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, for both files
    data = io.StringIO()
    figure.savefig(data, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = data.getvalue()
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    opened = svg.index(">", svg.index("<svg")) + 1
    (directory / f"{name}.svg").write_text(svg[:opened] + ground + svg[opened:], encoding="utf-8")
    figure.savefig(directory / f"{name}.png", dpi=150, facecolor=PAPER)
    inline = svg[svg.index("<svg") :].replace(INK, "currentColor")
    inline = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", inline)
    inline = re.sub(r"<style.*?</style>", "", inline, flags=re.DOTALL)  # a style in it would apply to the whole page
    said = f'<svg role="img" aria-label="{html.escape(alt)}" style="stroke-linejoin:round;stroke-linecap:butt" '
    return Drawn(name, Markup(inline.replace("<svg ", said, 1)), alt)


def _grid(values: Values) -> tuple[list[str], list[str], NDArray[np.float64]]:
    columns = list(values)
    rows = list(dict.fromkeys(row for column in values.values() for row in column))
    return columns, rows, np.array([[values[c].get(r, math.nan) for c in columns] for r in rows])


def _heat(axis: Any, values: NDArray[np.float64], columns: Sequence[str], rows: Sequence[str] | None, text: Callable[[float], str], **colours: Any) -> Any:
    """Draw a heat map: cells with their numbers, the first row on top."""
    mesh = axis.pcolormesh(np.ma.masked_invalid(values), edgecolors="face", linewidth=0.4, **colours)
    axis.invert_yaxis()
    axis.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
    axis.set_yticks(np.arange(len(values)) + 0.5, rows if rows is not None else [], fontsize=8)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    if len(values) <= 48:
        shades = mesh.cmap(mesh.norm(values))
        for (i, j), value in np.ndenumerate(values):
            if not math.isnan(value):
                dark = shades[i, j, :3] @ (0.299, 0.587, 0.114) < 0.55
                axis.text(j + 0.5, i + 0.5, text(value), ha="center", va="center", fontsize=7, color="#ffffff" if dark else "#101010")
    return mesh


def sensitivity(values: Mapping[str, Values], directory: Path) -> Drawn:
    """Heat maps of token weights. `values`: kind of token -> kind of group -> layer -> mean weight."""
    name, kinds = "sensitivity", [kind for kind in KINDS if kind in values]
    columns, rows, _ = _grid(values[kinds[0]])
    blend = LinearSegmentedColormap.from_list("weights", [BLUE, "#f4f4f2", ORANGE])
    every = np.concatenate([_grid(values[kind])[2].ravel() for kind in kinds])
    reach = float(max(0.5, np.nanmax(np.abs(np.log2(np.maximum(every, 1e-6))))))
    with _drawing(name, 1.6 + 0.19 * len(rows)) as figure:
        axes = figure.subplots(1, len(kinds), squeeze=False)[0]
        for axis, kind in zip(axes, kinds, strict=True):
            norm = TwoSlopeNorm(0, -reach, reach)
            grid = np.log2(np.maximum(_grid(values[kind])[2], 1e-6))
            mesh = _heat(axis, grid, columns, rows if axis is axes[0] else None, lambda v: f"{2**v:.2f}", cmap=blend, norm=norm)
            axis.set_title(KINDS[kind])
        axes[0].set_ylabel("layer")
        bar = figure.colorbar(mesh, ax=list(axes), shrink=0.9, aspect=30, pad=0.01)
        ticks = [t for t in (-3, -2, -1, 0, 1, 2, 3) if abs(t) <= reach] if reach >= 1 else [-reach, 0, reach]
        bar.set_ticks(ticks, labels=[f"{2**t:.2g}" for t in ticks])
        bar.outline.set_visible(False)
        bar.solids.set(rasterized=False, edgecolor="face")  # type: ignore[union-attr]
        means = {kind: float(np.nanmean(_grid(values[kind])[2])) for kind in kinds}
        alt = f"Mean weight of a token by layer and module, 1 being uniform. Over all: {', '.join(f'{KINDS[k]} {m:.2f}' for k, m in means.items())}."
        return _written(figure, name, alt, directory)


def _panels(name: str, kinds: Sequence[str], height: float = 1.75) -> Any:
    return _drawing(name, 0.5 + height * math.ceil(len(kinds) / 2))


def errors(before: Values, after: Values, what: str, directory: Path) -> Drawn:
    """Errors by layer before and after, one panel for each kind of group.

    Args:
        before, after: kind of group -> layer -> error.
        what: the name of the error.
        directory: where the figure is written.
    """
    name, kinds = "errors", list(before)
    _, rows, _ = _grid(before)
    with _panels(name, kinds) as figure:
        axes = figure.subplots(math.ceil(len(kinds) / 2), 2 if len(kinds) > 1 else 1, squeeze=False).ravel()
        for axis, kind in zip(axes, kinds, strict=False):
            for values, label, colour in ((before, "rounded to nearest", GREY), (after, "as chosen", ORANGE)):
                axis.plot([values[kind].get(r, math.nan) for r in rows], color=colour, marker="o", label=label)
            axis.set_title(kind)
            if any(v > 0 for values in (before, after) for v in values[kind].values()):
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
                axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.yaxis.set_minor_locator(NullLocator())
            _layers(axis, rows)
        for axis in axes[len(kinds) :]:
            axis.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=2)
        figure.supylabel(what, fontsize=9)
        left = [a / b for kind in kinds for r, b in before[kind].items() if b > 0 for a in [after[kind].get(r, math.nan)] if not math.isnan(a)]
        alt = f"{what} by layer, before and after." + (f" Of the error of rounding {min(left):.1%} to {max(left):.1%} is left." if left else "")
        return _written(figure, name, alt, directory)


def ratios(values: Values, directory: Path) -> Drawn:
    """Chosen ratios by layer. `values`: kind of group -> layer -> ratio."""
    name, (_, rows, grid) = "ratios", _grid(values)
    with _drawing(name, 2.6) as figure:
        axis = figure.subplots()
        for i, (kind, found) in enumerate(values.items()):
            axis.plot([found.get(r, math.nan) for r in rows], marker="o", color=SERIES[i % len(SERIES)], label=kind)
        axis.set(ylabel="ratio (0: no scale)", ylim=(-0.04, max(1.04, float(np.nanmax(grid)) + 0.04)))
        _layers(axis, rows)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
        alt = f"Chosen ratio by layer and module, {np.nanmin(grid):.2f} to {np.nanmax(grid):.2f}, on average {np.nanmean(grid):.2f}."
        return _written(figure, name, alt, directory)


def bits(values: Values, directory: Path) -> Drawn:
    """A heat map of bits. `values`: kind of linear -> layer -> bits."""
    name, (columns, rows, grid) = "bits", _grid(values)
    blend = LinearSegmentedColormap.from_list("bits", ["#0b3c6f", "#dbe8f6"])
    with _drawing(name, 1.4 + 0.19 * len(rows)) as figure:
        axis = figure.subplots()
        _heat(axis, grid, columns, rows, lambda v: f"{v:g}", cmap=blend, vmin=1, vmax=8)
        axis.set_ylabel("layer")
        return _written(figure, name, f"Bits by layer and linear, {np.nanmin(grid):g} to {np.nanmax(grid):g}; empty cells are not quantized.", directory)


def against_size(rows: Sequence[Mapping[str, Any]], measure: str, what: str, directory: Path) -> Drawn:
    """A measure of each model, with its interval, against the model's size. `measure`: its key in the rows. `what`: its name."""
    name = "size"
    with _drawing(name, 2.8) as figure:
        axis = figure.subplots()
        for i, row in enumerate(rows):
            mean, low, high = (float(v) for v in row[measure])
            size, colour = row["bytes"] / 2**20, SERIES[i % len(SERIES)]
            axis.errorbar(size, mean, [[max(0.0, mean - low)], [max(0.0, high - mean)]], fmt="o", color=colour, capsize=4)
            axis.annotate(str(row.get("name", i)), (size, mean), xytext=(7, 5), textcoords="offset points")
        axis.set(xlabel="MiB on disk", ylabel=what)
        axis.set_xlim(0, 1.25 * max(row["bytes"] for row in rows) / 2**20)
        axis.margins(y=0.25)
        if measure == "accuracy":
            axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        told = "; ".join(f"{row.get('name', i)}: {row['bytes'] / 2**20:.1f} MiB, {row[measure][0]:.4g}" for i, row in enumerate(rows))
        return _written(figure, name, f"{what} against size. {told}.", directory)


def seconds(per_block: Sequence[float], directory: Path) -> Drawn:
    """The seconds of each block."""
    name = "time"
    with _drawing(name, 2.0) as figure:
        axis = figure.subplots()
        axis.bar(range(len(per_block)), per_block, color=BLUE, width=0.7)
        axis.set(xlabel="block, in the order of the calibration", ylabel="seconds")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        alt = f"Seconds for each of {len(per_block)} blocks, {min(per_block):.2g} to {max(per_block):.2g}."
        return _written(figure, name, alt, directory)


def _layers(axis: Any, rows: Sequence[str]) -> None:
    step = math.ceil(len(rows) / 12)
    axis.set_xticks(range(0, len(rows), step), rows[::step])
    axis.set_xlabel("layer")
    axis.grid(axis="y", alpha=0.25, linewidth=0.6)
