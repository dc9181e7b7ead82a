"""What quantizing will do, before it does it: which linears, in which blocks, and why others stay; bytes before and after."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchao_qig.calibrate.batches import Batch, naming, read
from torchao_qig.calibrate.chains import Chain, find_chains, listed_chains, quiet
from torchao_qig.calibrate.estimate import LENGTH, SAMPLES, Need, need
from torchao_qig.config import BITS_OF_AUTO, FULL, PackedIntWeightOnlyConfig, QIGWeightOnlyConfig
from torchao_qig.errors import UserError, UserTypeError


@dataclass
class Plan:
    """Chains to run, linears to quantize, and the others by the reason why they stay; bytes of the former's weights.

    `model_bytes` are those of all weights; `need` is what calibrating takes, None where nothing is calibrated.
    """

    chains: list[Chain]
    linears: set[str]
    left: dict[str, list[str]] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    model_bytes: int = 0
    need: Need | None = None

    def __str__(self) -> str:
        return "\n".join(filter(None, [self.linears_by_fate(), self.outlook()]))

    def linears_by_fate(self) -> str:
        """What is quantized, and what is not and why."""
        blocks = ", ".join(f"{c.names[0]} .. {c.names[-1]}" if len(c.names) > 1 else c.names[0] or "the whole model" for c in self.chains)
        lines = [f"{len(self.linears)} linears in {blocks}: {self.bytes_before / 2**20:.1f} MiB -> {self.bytes_after / 2**20:.1f} MiB"]
        return "\n".join(lines + [f"left as they are, {why}: {_few(names)}" for why, names in self.left.items()])

    def outlook(self) -> str:
        """The size of the whole model before and after, and what calibrating takes, as far as that is known."""
        after = self.model_bytes - self.bytes_before + self.bytes_after
        lines = [f"the whole model: {self.model_bytes / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB"] if self.model_bytes else []
        return "\n".join(lines if self.need is None else [*lines, f"calibration: {self.need}"])


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _matching(model: nn.Module, patterns: Iterable[str]) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    found: list[str] = []
    for pattern in patterns:
        here = [n for n in names if n == pattern or n.endswith(f".{pattern}")]
        if not here:
            raise UserError(
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
    return p is not None and p.dim() == 3 and len(p) > 1 and type(p) is nn.Parameter and not isinstance(module, nn.modules.conv._ConvNd)


def _reason(model: nn.Module, linear: nn.Linear, config: QIGWeightOnlyConfig, shared: set[int]) -> str | None:
    weight = linear.weight
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        return "already quantized"
    if id(weight) in shared:
        return "weight shared with a module that is not quantized"
    rows, columns = weight.shape
    return config.form.format.misfit(rows, columns)


def packed_bytes(linear: nn.Linear, config: QIGWeightOnlyConfig) -> int:
    """What a weight takes: its codes, and all that they need to be read."""
    rows, columns = linear.weight.shape
    return config.form.format.nbytes(rows, columns, config.form.scale_dtype(linear.weight.dtype))


def choose(model: nn.Module, chains: list[Chain], linears: dict[str, QIGWeightOnlyConfig], config: QIGWeightOnlyConfig) -> Plan:
    """What to do about these linears; `chains` are those that the model ran."""
    modules: dict[str, nn.Linear] = {n: m for n, m in model.named_modules() if n in linears and isinstance(m, nn.Linear)}
    wanted = _matching(model, config.modules) if config.modules is not None else chains[-1].names if chains else [""]
    inside = [n for n in modules if _is_inside(n, wanted)]
    plan, counted = Plan([], set()), set[int]()
    holders: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module._parameters.values():
            if p is not None:
                holders.setdefault(id(p), set()).add(name)
    shared = {i for i, names in holders.items() if not names <= set(inside)}
    for name, linear in modules.items():
        why = _reason(model, linear, linears[name], shared) if name in inside else "outside the decoder's blocks (name them in modules=)"
        if why is None:
            if not linear.weight.is_meta and not torch.isfinite(linear.weight).all():
                raise UserError(f"{name}: the weight contains NaN or infinity; repair it or leave this layer out with filter_fn. The model is unchanged.")
            plan.linears.add(name)
            if id(linear.weight) not in counted:  # linears that share a weight go on sharing it
                counted.add(id(linear.weight))
                plan.bytes_before += linear.weight.numel() * linear.weight.element_size()
                plan.bytes_after += packed_bytes(linear, linears[name])
        else:
            plan.left.setdefault(why, []).append(name)
    stacks = [f"{m}.{n}" for m, module in model.named_modules() for n, p in module._parameters.items() if _is_stack(module, p) and _is_inside(m, wanted)]
    if stacks:
        plan.left["3-D parameters (FqnToConfig with PackedIntWeightOnlyConfig rounds them)"] = stacks
    if not plan.linears:
        reasons = "; ".join(f"{why}: {', '.join(names)}" for why, names in plan.left.items()) or "no linear was chosen"
        raise UserError(f"nothing to quantize in {type(model).__name__}: {reasons}. The model is unchanged.")
    plan.chains = _chains_for(model, chains, wanted, sorted(plan.linears)) if chains or config.modules else [Chain([""])]
    return plan


def plan(model: nn.Module, config: QIGWeightOnlyConfig | PackedIntWeightOnlyConfig, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Plan:
    """What `quantize_(model, config)` will do: what is quantized, what stays and why, bytes, and the memory and time of calibration.

    Nothing is quantized, and the model may lie on the meta device: shapes are enough. Where its weights are at hand and `config.calib` is
    something that can be read again (a list, a DataLoader), the first batch runs once, to see which blocks run; otherwise blocks are
    those that the model lists, and 128 samples of 1,024 tokens are assumed.

    Args:
        model, config, filter_fn: as for `quantize_` or `calibrate`.
    """
    if not isinstance(config, (QIGWeightOnlyConfig, PackedIntWeightOnlyConfig)):
        raise UserTypeError(f"config={type(config).__name__}: plan knows QIGWeightOnlyConfig, QIGInt8DynamicActivationConfig and PackedIntWeightOnlyConfig")
    chosen = filter_fn or (lambda m, name: isinstance(m, nn.Linear))
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and chosen(m, name)]
    if isinstance(config, PackedIntWeightOnlyConfig):  # all that the filter matches, nothing to calibrate
        plain = QIGWeightOnlyConfig(config.bits, config.group_size, config.symmetric, config.dtype, modules=_top_level(names), sensitivity=None)
        found = choose(model, listed_chains(model), dict.fromkeys(names, plain), plain)
    else:
        found = _calibrated_plan(model, config, names)
    found.model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return found


def _top_level(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.split(".")[0] for name in names))


def _bits(config: QIGWeightOnlyConfig, name: str) -> int:
    """Those of a linear; for "auto" an upper bound for the budget's mean."""
    if isinstance(config.bits, dict):
        return int(config.bits.get(name, FULL))
    return BITS_OF_AUTO if config.bits == "auto" else int(config.bits)


def _calibrated_plan(model: nn.Module, config: QIGWeightOnlyConfig, names: list[str]) -> Plan:
    batches = _readable(model, config.calib)
    on_meta = any(p.is_meta for p in model.parameters())
    with quiet(model):
        if batches and not on_meta:
            with naming(model, batches[0]):
                chains = find_chains(model, batches[0])
        else:
            chains = listed_chains(model)
    linears = {name: config.at(_bits(config, name)) for name in names if _bits(config, name) != FULL}
    found = choose(model, chains, linears, config)
    if config.bits == "auto":
        sizes = [m.weight.numel() for n, m in model.named_modules() if n in found.linears and isinstance(m, nn.Linear)]
        found.bytes_after = config.max_bytes or found.bytes_after + int(sum(sizes) * ((config.budget or 0) - BITS_OF_AUTO) / 8)
    done = config.calib is not None and not isinstance(config.calib, Iterable)  # a Calibration
    if (config.equalizes or config.rounds) and not done:
        weight = model.get_submodule(min(found.linears)).weight
        assert isinstance(weight, Tensor)
        device = torch.device(config.device) if config.device is not None else weight.device
        dtype = torch.promote_types(weight.dtype, config.computes_in(device))
        found.need = need(model, found.chains, found.linears, config, found.bytes_after, *_amount(config.calib, batches), device, dtype)
    return found


def _readable(model: nn.Module, loader: Any) -> list[Batch]:
    """The loader's batches where it can be read again; a list of one for those that would have to be made first."""
    if not isinstance(loader, Iterable) or iter(loader) is loader:
        return []
    batches = read(model, loader)
    return list(batches) if isinstance(loader, (list, tuple)) else [next(batches)]


def _amount(loader: Any, batches: list[Batch]) -> tuple[int, int]:
    """Samples and tokens."""
    if not batches:
        return SAMPLES, SAMPLES * LENGTH
    samples = sum(b.samples for b in batches)
    tokens = sum(_tokens(b) for b in batches)
    times = len(loader) // len(batches) if hasattr(loader, "__len__") else 1
    return samples * times, tokens * times


def _tokens(batch: Batch) -> int:
    if batch.masks.counted is not None:
        return int(batch.masks.counted.sum())
    first = next(v for v in [*batch.args, *batch.kwargs.values()] if isinstance(v, Tensor))
    return first.shape[:-1].numel() if first.is_floating_point() else first.numel()
