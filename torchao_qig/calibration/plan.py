"""`Plan`: what quantizing a model will do. It has the linears that are quantized, their blocks, why others stay, and the bytes before and after."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from torchao_qig.calibration.estimate import LENGTH, SAMPLES, Need, need
from torchao_qig.calibration.job import Job
from torchao_qig.errors import UserError
from torchao_qig.formats import LinearForm
from torchao_qig.methods.allocate import LEAST_BITS, weight_bytes
from torchao_qig.watch.batches import Batch, naming, read
from torchao_qig.watch.chains import Chain, find_chains, listed_chains, quiet


@dataclass
class Plan:
    """What quantizing a model will do.

    Attributes:
        chains: the chains of blocks that are calibrated.
        linears: names of the linears that are quantized.
        left: names of the linears that stay as they are, by the reason why.
        bytes_before, bytes_after: of the weights of `linears`.
        model_bytes: of all weights of the model before.
        need: what calibrating takes; None where nothing is calibrated.
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
        """Text: which linears are quantized, which are not, and why."""
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
    """The names of modules that are equal to one of the patterns, or that end in one."""
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
    """Whether a module is one of `modules`, or lies in one of them."""
    return any(not m or name == m or name.startswith(f"{m}.") for m in modules)


def _chains_for(model: nn.Module, chains: list[Chain], wanted: list[str], linears: Iterable[str]) -> list[Chain]:
    """The chains that contain some of `linears`, and chains of a single block for linears outside of them.

    Such a block is the module of `wanted` that the linear lies in; or the linear itself, where that module contains a chain.
    """
    blocks = [b for c in chains for b in c.names]
    units = [c for c in chains if any(_is_inside(n, c.names) for n in linears)]
    for name in (n for n in linears if not _is_inside(n, blocks)):
        own = [m for m in wanted if _is_inside(name, [m]) and not any(_is_inside(b, [m]) for b in blocks)]
        unit = min(own, key=len, default=name)
        if all(u.names != [unit] for u in units):
            units.append(Chain([unit]))
    return units


def _is_stack(module: nn.Module, p: Tensor | None) -> bool:
    """Whether this parameter stacks the weights of several experts."""
    return p is not None and p.dim() == 3 and len(p) > 1 and type(p) is nn.Parameter and not isinstance(module, nn.modules.conv._ConvNd)


def _reason(linear: nn.Linear, form: LinearForm, shared: set[int]) -> str | None:
    """Why a linear stays as it is; None if it can be quantized. `shared`: ids of parameters that modules which stay also hold."""
    weight = linear.weight
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        return "already quantized"
    if id(weight) in shared:
        return "weight shared with a module that is not quantized"
    rows, columns = weight.shape
    return form.format.misfit(rows, columns)


def choose(model: nn.Module, chains: list[Chain], forms: dict[str, LinearForm], asked: list[str] | None = None) -> Plan:
    """Decide which of these linears can be quantized. `chains`: those that the model ran; `asked`: names of modules that linears have to lie in."""
    modules: dict[str, nn.Linear] = {n: m for n, m in model.named_modules() if n in forms and isinstance(m, nn.Linear)}
    wanted = _matching(model, asked) if asked is not None else chains[-1].names if chains else [""]
    inside = [n for n in modules if _is_inside(n, wanted)]
    plan, counted = Plan([], set()), set[int]()
    holders: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for p in module._parameters.values():
            if p is not None:
                holders.setdefault(id(p), set()).add(name)
    shared = {i for i, names in holders.items() if not names <= set(inside)}
    for name, linear in modules.items():
        why = _reason(linear, forms[name], shared) if name in inside else "outside the decoder's blocks (name them in modules=)"
        if why is None:
            if not linear.weight.is_meta and not torch.isfinite(linear.weight).all():
                raise UserError(f"{name}: the weight contains NaN or infinity; repair it or leave this layer out with filter_fn. The model is unchanged.")
            plan.linears.add(name)
            if id(linear.weight) not in counted:  # linears that share a weight go on sharing it: it counts once
                counted.add(id(linear.weight))
                plan.bytes_before += linear.weight.numel() * linear.weight.element_size()
                plan.bytes_after += weight_bytes(linear, forms[name])
        else:
            plan.left.setdefault(why, []).append(name)
    stacks = [f"{m}.{n}" for m, module in model.named_modules() for n, p in module._parameters.items() if _is_stack(module, p) and _is_inside(m, wanted)]
    if stacks:
        plan.left["3-D parameters (FqnToConfig with PackedIntWeightOnlyConfig rounds them)"] = stacks
    if not plan.linears:
        reasons = "; ".join(f"{why}: {', '.join(names)}" for why, names in plan.left.items()) or "no linear was chosen"
        raise UserError(f"nothing to quantize in {type(model).__name__}: {reasons}. The model is unchanged.")
    plan.chains = _chains_for(model, chains, wanted, sorted(plan.linears)) if chains or asked else [Chain([""])]
    return plan


def make_plan(model: nn.Module, job: Job, loader: Any) -> Plan:
    """The plan of a job. Where there is something to calibrate, it says how much memory and time that will take.

    Args:
        job: with a budget, its forms are those with the fewest bits.
        loader: the batches to calibrate with, a `Calibration`, or None.
    """
    done = loader is not None and not isinstance(loader, Iterable)  # a Calibration
    batches = _readable(model, loader)
    with quiet(model):
        if batches and not any(p.is_meta for p in model.parameters()):
            with naming(model, batches[0]):
                chains = find_chains(model, batches[0])
        else:
            chains = listed_chains(model)
    found = choose(model, chains, job.forms, job.modules)
    if job.budget is not None:
        sizes = [m.weight.numel() for n, m in model.named_modules() if n in found.linears and isinstance(m, nn.Linear)]
        found.bytes_after = job.budget.max_bytes or found.bytes_after + int(sum(sizes) * ((job.budget.mean_bits or 0) - LEAST_BITS) / 8)
    if job.steps and not done:
        weight = model.get_submodule(min(found.linears)).weight
        assert isinstance(weight, Tensor)
        device = torch.device(job.device) if job.device is not None else weight.device
        dtype = torch.promote_types(weight.dtype, job.computes_in(device))
        chosen = replace(job, forms={n: form for n, form in job.forms.items() if n in found.linears})
        found.need = need(model, found.chains, chosen, found.bytes_after, *_amount(loader, batches), device, dtype)
    found.model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return found


def plan_to_round(model: nn.Module, forms: dict[str, LinearForm]) -> Plan:
    """The plan of rounding these linears to nearest, wherever they lie."""
    found = choose(model, listed_chains(model), forms, list(dict.fromkeys(name.split(".")[0] for name in forms)))
    found.model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    return found


def _readable(model: nn.Module, loader: Any) -> list[Batch]:
    """The batches of a list or tuple; the first batch of any other loader that can be read twice; none of one that cannot."""
    if not isinstance(loader, Iterable) or iter(loader) is loader:
        return []
    batches = read(model, loader)
    return list(batches) if isinstance(loader, (list, tuple)) else [next(batches)]


def _amount(loader: Any, batches: list[Batch]) -> tuple[int, int]:
    """The numbers of samples and tokens that the loader will yield: extrapolated from `batches`, or assumed where there are none."""
    if not batches:
        return SAMPLES, SAMPLES * LENGTH
    samples = sum(b.samples for b in batches)
    tokens = sum(_tokens(b) for b in batches)
    times = len(loader) // len(batches) if hasattr(loader, "__len__") else 1
    return samples * times, tokens * times


def _tokens(batch: Batch) -> int:
    """The number of tokens in a batch, without padding where it is known."""
    if batch.masks.counted is not None:
        return int(batch.masks.counted.sum())
    first = next(v for v in [*batch.args, *batch.kwargs.values()] if isinstance(v, Tensor))
    return first.shape[:-1].numel() if first.is_floating_point() else first.numel()
