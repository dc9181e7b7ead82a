"""Where figures put a module, told by its name: its row is its layer, its column is its kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Place(NamedTuple):
    """The parts of a module's name: model.layers.3.mlp.up_proj is ("model.layers", 3, "mlp.up_proj"). Without a number, the layer is None."""

    stack: str
    layer: int | None
    kind: str


def place(name: str) -> Place:
    """The place of the module with this name: its first number is the layer."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            within = ("*" if p.isdecimal() else p for p in parts[i + 1 :])  # all experts of a layer are one kind
            return Place(".".join(parts[:i]), int(part), ".".join(within) or "layer")
    return Place("", None, name)


def row(name: str, several: bool) -> str:
    """The label of a module's row. `several`: whether there are layers of more than one stack."""
    stack, layer, _ = place(name)
    if layer is None:
        return "-"
    return f"{stack} {layer}" if several else str(layer)


def rows(names: Iterable[str]) -> dict[str, str]:
    """Name of a module -> label of its row, ordered by stack and layer."""
    found = {name: place(name) for name in names}
    stacks = list(dict.fromkeys(p.stack for p in found.values() if p.layer is not None))
    order = sorted(
        found, key=lambda name: (found[name].layer is None, stacks.index(found[name].stack) if found[name].layer is not None else 0, found[name].layer or 0)
    )
    return {name: row(name, len(stacks) > 1) for name in order}
