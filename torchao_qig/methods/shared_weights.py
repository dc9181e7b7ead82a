"""Linears that hold the very same weight: what is decided for one of them holds for all, so that they go on sharing it.

The first of them that calibration reaches decides: its integers are chosen on its own inputs, and the others take them over. A scale
over input channels would fit the inputs of one linear and change the others, so groups with a shared weight get none.
"""

from collections.abc import Iterable

from torch import Tensor, nn


class SharedWeights:
    """Which of these linears share a weight."""

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        by_weight: dict[int, list[str]] = {}
        for name in names:
            by_weight.setdefault(id(model.get_submodule(name).weight), []).append(name)
        self.families = [family for family in by_weight.values() if len(family) > 1]
        self._family = {name: family for family in self.families for name in family}

    def __contains__(self, name: object) -> bool:
        return name in self._family

    def family(self, name: str) -> list[str]:
        """The linear and all that share its weight."""
        return self._family.get(name, [name])

    def decided(self, name: str, weights: dict[str, Tensor]) -> str | None:
        """The linear in `weights` that shares its weight with this one, which takes over its integers; None if there is none."""
        return next((n for n in self.family(name) if n in weights), None)
