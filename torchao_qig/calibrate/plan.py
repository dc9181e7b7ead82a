"""What a calibration will do, before it does it: which linears, in which blocks, and why others stay."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from torchao_qig.calibrate.chains import Chain
from torchao_qig.config import QIGWeightOnlyConfig
from torchao_qig.tensor import affine


@dataclass
class Plan:
    """Chains to run, linears to quantize, and the others by the reason why they stay."""

    chains: list[Chain]
    linears: set[str]
    left: dict[str, list[str]] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        blocks = ", ".join(f"{c.names[0]} .. {c.names[-1]}" if len(c.names) > 1 else c.names[0] or "the whole model" for c in self.chains)
        lines = [f"{len(self.linears)} linears in {blocks}: {self.bytes_before / 2**20:.1f} MiB -> {self.bytes_after / 2**20:.1f} MiB"]
        return "\n".join(lines + [f"left as they are, {why}: {_few(names)}" for why, names in self.left.items()])


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _matching(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    found: list[str] = []
    for pattern in patterns:
        here = [n for n in names if n == pattern or n.endswith(f".{pattern}")]
        if not here:
            raise ValueError(
                f"modules={list(patterns)!r}: {type(model).__name__} has no module {pattern!r}; its parts are {', '.join(n for n, _ in model.named_children())}"
            )
        found += here
    return found


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    return any(not m or name == m or name.startswith(f"{m}.") for m in modules)


def _chains_for(model: nn.Module, chains: list[Chain], wanted: list[str], linears: Iterable[str]) -> list[Chain]:
    """Chains that hold wanted linears; for the rest the wanted module itself, or each linear where that holds a chain."""
    blocks = [b for c in chains for b in c.names]
    units = [c for c in chains if any(_is_inside(n, c.names) for n in linears)]
    for name in (n for n in linears if not _is_inside(n, blocks)):
        own = [m for m in wanted if _is_inside(name, [m]) and not any(_is_inside(b, [m]) for b in blocks)]
        unit = min(own, key=len, default=name)
        if all(u.names != [unit] for u in units):
            units.append(Chain([unit]))
    return units


def _is_stack(module: nn.Module, p: Tensor | None) -> bool:
    """Whether this is the weights of many experts in one parameter."""
    return p is not None and p.dim() == 3 and type(p) is nn.Parameter and not isinstance(module, nn.modules.conv._ConvNd)


def _reason(model: nn.Module, linear: nn.Linear, config: QIGWeightOnlyConfig, shared: set[int]) -> str | None:
    weight = linear.weight
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        return "already quantized"
    if id(weight) in shared:
        return "weight shared with a module that is not quantized"
    if config.base_config is None and not affine.fits(weight.shape[1], config.group_size):
        return f"group_size={config.group_size} does not divide the input features"
    return None


def packed_bytes(linear: nn.Linear, config: QIGWeightOnlyConfig) -> int:
    """What a weight takes: its codes, a scale and a zero point per group."""
    rows, columns = linear.weight.shape
    groups = max(columns // affine.group_width(columns, config.group_size), 1)  # 1: where the size does not fit
    return rows * columns * config.bits // 8 + rows * groups * (linear.weight.element_size() + 1)


def choose(model: nn.Module, chains: list[Chain], linears: dict[str, QIGWeightOnlyConfig], config: QIGWeightOnlyConfig) -> Plan:
    """What to do about these linears; `chains` are those that the model ran."""
    modules: dict[str, nn.Linear] = {n: m for n, m in model.named_modules() if n in linears and isinstance(m, nn.Linear)}
    wanted = _matching(model, config.modules) if config.modules is not None else chains[-1].names if chains else [""]
    inside = [n for n in modules if _is_inside(n, wanted)]
    plan = Plan([], set())
    holders: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module._parameters.values():
            if p is not None:
                holders.setdefault(id(p), set()).add(name)
    shared = {i for i, names in holders.items() if not names <= set(inside)}
    for name, linear in modules.items():
        why = _reason(model, linear, linears[name], shared) if name in inside else "outside the decoder's blocks (name them in modules=)"
        if why is None:
            if not torch.isfinite(linear.weight).all():
                raise ValueError(f"{name}: the weight contains NaN or infinity; repair it or leave this layer out with filter_fn. The model is unchanged.")
            plan.linears.add(name)
            size = linear.weight.numel()
            plan.bytes_before += size * linear.weight.element_size()
            plan.bytes_after += packed_bytes(linear, linears[name])
        else:
            plan.left.setdefault(why, []).append(name)
    stacks = [f"{m}.{n}" for m, module in model.named_modules() for n, p in module._parameters.items() if _is_stack(module, p) and _is_inside(m, wanted)]
    if stacks:
        plan.left["3-D parameters (FqnToConfig with PackedIntWeightOnlyConfig rounds them)"] = stacks
    if not plan.linears:
        reasons = "; ".join(f"{why}: {', '.join(names)}" for why, names in plan.left.items()) or "no linear was chosen"
        raise ValueError(f"nothing to quantize in {type(model).__name__}: {reasons}. The model is unchanged.")
    plan.chains = _chains_for(model, chains, wanted, sorted(plan.linears)) if chains or config.modules else [Chain([""])]
    return plan
