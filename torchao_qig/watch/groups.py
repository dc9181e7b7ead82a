"""Find which linears of a block share an input, and where their error shows. Both are seen when the block runs; class names play no role.

A group is the linears that received the same tensor. Its inspected module is their lowest common ancestor that ran (the
linear itself when alone): its output shows the group's error. A linear that runs more than once per pass stands alone.
"""

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchao_qig.watch.observer import Observer, first_tensor


class Group(NamedTuple):
    """Linears with a common input. Names are relative to the block; `inspected` may be "" (the block itself)."""

    linears: tuple[str, ...]
    inspected: str
    inside: tuple[str, ...]  # every linear to be quantized in the inspected module, the group's own included

    @property
    def alone(self) -> bool:
        """Whether the group is a single linear that is inspected itself."""
        return self.inspected == self.linears[0]


def _ancestor(names: list[str], ran: set[str]) -> str:
    """The lowest common ancestor of these modules that has run."""
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
    plain = {name: inputs for name, inputs in observed.inputs.items() if _multiplies(observed, name)}
    for name, inputs in plain.items():
        key = observed.keys[name][0] if len(inputs) == 1 else name
        by_input.setdefault(key, []).append(name)
    ran = {name for name, calls in observed.calls.items() if len(calls) == 1}
    groups = []
    for names in by_input.values():
        inspected = names[0] if len(names) == 1 else _ancestor(names, ran)
        if len(names) > 1 and _rows(first_tensor(observed.calls[inspected][0][1])) != _rows(plain[names[0]][0]):
            groups += [Group((n,), n, (n,)) for n in names]  # cross-attention: keys and values belong to other tokens than the output
            continue
        inside = [n for n in plain if n == inspected or not inspected or n.startswith(f"{inspected}.")]
        groups.append(Group(tuple(names), inspected, tuple(inside)))
    return groups


def _rows(t: Tensor) -> int:
    return t.shape[:-1].numel()


def _multiplies(observed: Observer, name: str) -> bool:
    """Whether a linear does nothing but multiply and add; classes derived from `nn.Linear` may do more (Llama 4's router)."""
    linear, x, out = observed.block.get_submodule(name), observed.inputs[name][0], observed.calls[name][0][1]
    if not isinstance(linear, nn.Linear) or not isinstance(out, Tensor) or out.shape != (*x.shape[:-1], linear.out_features):
        return False
    if type(linear) is nn.Linear or not x.numel():
        return True
    with torch.no_grad():
        return torch.allclose(out.float(), nn.functional.linear(x, linear.weight, linear.bias).float(), rtol=1e-2, atol=1e-2 * float(out.abs().max()))


def labels(groups: list[Group], block: str) -> list[str]:
    """A label for every group: the full name of its inspected module, or of its first linear where two groups share the module."""
    times = Counter(g.inspected for g in groups)
    return [join(block, g.inspected if times[g.inspected] == 1 else g.linears[0]) for g in groups]


def join(*names: str) -> str:
    """Dotted name from parts, empty ones left out."""
    return ".".join(n for n in names if n)


def linears_in(module: nn.Module) -> list[str]:
    """Names of all `nn.Linear` in a module."""
    return [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]
