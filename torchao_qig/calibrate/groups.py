"""Which linears of a block share an input, and where their error shows; by watching the block run, not by class names.

A group is the linears that received the same tensor. Its inspected module is their lowest common ancestor that ran (the
linear itself when alone): its output shows the group's error. A linear that runs more than once per pass stands alone.
"""

from collections import Counter
from typing import NamedTuple

from torch import Tensor, nn

from torchao_qig.calibrate.observer import Observer


class Group(NamedTuple):
    """Names are relative to the block; `inspected` may be "" (the block itself)."""

    linears: tuple[str, ...]
    inspected: str
    inside: tuple[str, ...]  # every linear to be quantized in the inspected module, the group's own included

    @property
    def alone(self) -> bool:
        """Whether the inspected module is the group's one linear."""
        return self.inspected == self.linears[0]


def _identity(x: Tensor) -> tuple[object, ...]:
    """Equal for the same tensor and for reshaped views of it, while it lives."""
    return (x.untyped_storage().data_ptr(), x.storage_offset(), x.numel(), x.shape[-1], x.dtype, x._version if not x.is_inference() else 0)


def _ancestor(names: list[str], ran: set[str]) -> str:
    common = names[0].split(".")
    for name in names[1:]:
        parts = name.split(".")
        common = [a for n, a in enumerate(common) if common[: n + 1] == parts[: n + 1]]
    while common and ".".join(common) not in ran:  # a ModuleList has no forward
        common.pop()
    return ".".join(common)


def find_groups(observed: Observer) -> list[Group]:
    """The groups of the block that `observed` watched, in the order in which they ran."""
    by_input: dict[object, list[str]] = {}
    for name, inputs in observed.inputs.items():
        key = _identity(inputs[0]) if len(inputs) == 1 else name
        by_input.setdefault(key, []).append(name)
    ran = {name for name, calls in observed.calls.items() if len(calls) == 1}
    groups = []
    for names in by_input.values():
        inspected = names[0] if len(names) == 1 else _ancestor(names, ran)
        inside = [n for n in observed.inputs if n == inspected or not inspected or n.startswith(f"{inspected}.")]
        groups.append(Group(tuple(names), inspected, tuple(inside)))
    return groups


def labels(groups: list[Group], block: str) -> list[str]:
    """A name in the model for every group: its inspected module, or its first linear where two groups share that."""
    times = Counter(g.inspected for g in groups)
    return [join(block, g.inspected if times[g.inspected] == 1 else g.linears[0]) for g in groups]


def join(*names: str) -> str:
    """Dotted name from parts, empty ones left out."""
    return ".".join(n for n in names if n)


def linears_in(module: nn.Module) -> list[str]:
    """Names of all `nn.Linear` in a module."""
    return [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
