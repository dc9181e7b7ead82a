"""Bits where they matter (`bits="auto"`): each group's part in what quantization does to the model's output, then a knapsack.

All groups are moved together from full precision to a few bits, W + a (W_q - W) for a from 0 to 1. The integral of
d divergence / d a_group along that path is the group's contribution (integrated gradients over groups): contributions add up to
the divergence at the end. One forward and backward pass of the model per point of the quadrature gives those of all groups.

`divergence` is the mean KL of the answer tokens' distribution to that of full precision; for models that return no logits, the
squared error of their output relative to its mean square.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchao_qig.calibrate import ranks
from torchao_qig.calibrate.batches import Batch
from torchao_qig.calibrate.groups import find_groups, join
from torchao_qig.calibrate.observer import Observer, first_tensor, patched
from torchao_qig.calibrate.plan import packed_bytes
from torchao_qig.calibrate.sensitivity import rule
from torchao_qig.config import FULL, QIGWeightOnlyConfig
from torchao_qig.errors import UserError

BITS = (2, 3, 4, 5, 6, 7, 8, FULL)
MEASURED = (2, 3, 4)  # the first of BITS; above, costs fall as the squared error of the weights does
POINTS = 3  # of the quadrature
SAMPLES = 32  # that contributions are measured on
STATES = 100_000  # of the knapsack

Unit = tuple[str, ...]  # linears that share an input, and so their bits


def units_of(model: nn.Module, blocks: Iterable[str], linears: set[str], batch: Batch) -> list[Unit]:
    """Linears by shared input, found by running one batch; those that it does not reach stand alone."""
    units: list[Unit] = []
    with ExitStack() as stack, torch.no_grad():
        watched = {}
        for block in blocks:
            inner = [n for n, _ in model.get_submodule(block).named_modules() if join(block, n) in linears]
            watched[block] = stack.enter_context(Observer(model.get_submodule(block), inner))
        model(*batch.args, **batch.kwargs)
    for block, observed in watched.items():
        units += [tuple(join(block, n) for n in group.linears) for group in find_groups(observed)]
    known = {n for unit in units for n in unit}
    return units + [(n,) for n in sorted(linears - known)]


def difference(weight: Tensor, config: QIGWeightOnlyConfig, bits: int) -> Tensor:
    """What rounding to `bits` changes in a weight."""
    return config.at(bits).form.rounder(weight.dtype)(weight, None) - weight


def _answers(batch: Batch, logits: Tensor) -> Tensor:
    """Positions whose next token is an answer; without answers, all that count."""
    masks = batch.masks
    wanted = masks.answer if masks.answer is not None and bool(masks.answer.any()) else masks.counted
    if wanted is None or wanted.shape != logits.shape[:2]:
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return F.pad(wanted[:, 1:], (0, 1)).to(logits.device)


def _output(model: nn.Module, batch: Batch) -> tuple[Tensor, bool]:
    """Log-probabilities at the answers' positions and True; or what a model without logits returns, and False."""
    out = model(*batch.args, **batch.kwargs)
    logits = getattr(out, "logits", None)
    return (first_tensor(out).float(), False) if logits is None else (logits[_answers(batch, logits)].float().log_softmax(-1), True)


def _divergence(reference: Tensor, output: Tensor, logs: bool) -> Tensor:
    """Of an output to that of full precision, summed over positions."""
    if logs:
        return (reference.exp() * (reference - output)).sum()
    return (output - reference).square().sum() / reference.square().mean().clamp(min=1e-30)


def contributions(model: nn.Module, batches: Sequence[Batch], units: list[Unit], changed: Callable[[str, Tensor], Tensor]) -> Tensor:
    """(units,): each unit's part of the mean divergence of the model whose weights are all `changed(name, weight)` more."""
    points = rule("gauss", POINTS)
    number = {name: i for i, unit in enumerate(units) for name in unit}
    linears = {name: model.get_submodule(name) for name in number}
    with torch.no_grad():
        references = [_output(model, batch)[0] for batch in batches]
    total = torch.zeros(len(units), dtype=torch.float64)

    def moved(name: str, at: float, amounts: Tensor) -> Callable[[Tensor], Tensor]:
        linear, i = linears[name], number[name]
        assert isinstance(linear, nn.Linear)

        def forward(x: Tensor) -> Tensor:
            with torch.no_grad():
                change = changed(name, linear.weight)  # anew every time: all of them at once are as large as the model
                out = F.linear(x, change)
            plain = F.linear(x, linear.weight.detach() + at * change, linear.bias)
            return plain + (amounts[i] - at).to(plain.dtype) * out  # nothing is added but the derivative

        return forward

    for at, share in zip(points.nodes, points.weights, strict=True):
        for batch, reference in zip(batches, references, strict=True):
            amounts = torch.full((len(units),), at, requires_grad=True)
            with torch.enable_grad(), patched({linear: moved(name, at, amounts) for name, linear in linears.items()}):
                (gradient,) = torch.autograd.grad(_divergence(reference, *_output(model, batch)), amounts)
            total += share * gradient.double()
    count = ranks.summed(torch.tensor([float(sum(len(r) for r in references))], dtype=torch.float64))
    return ranks.summed(total) / count.clamp(min=1)


def costs(model: nn.Module, batches: Sequence[Batch], units: list[Unit], configs: dict[str, QIGWeightOnlyConfig]) -> Tensor:
    """(units, BITS): what each unit costs at each number of bits; never less with fewer.

    A unit's cost is its weights' squared error times how much that matters, which is the same at any number of bits: the mean over
    the measured ones, since a single contribution is noisy. What all units cost together is as measured.
    """
    measured = torch.stack(
        [contributions(model, batches, units, lambda name, w, bits=bits: difference(w, configs[name], bits)).clamp(min=0) for bits in MEASURED],  # type: ignore[misc]
        dim=1,
    )

    def error(name: str, bits: int) -> float:
        return float(difference(model.get_submodule(name).weight.detach(), configs[name], bits).square().sum(dtype=torch.float64))

    errors = torch.tensor([[sum(error(n, b) for n in unit) for b in BITS[:-1]] for unit in units], dtype=torch.float64)
    found = torch.cat([smoothed(measured, errors), torch.zeros(len(units), 1, dtype=torch.float64)], 1)
    return found.flip(1).cummax(1).values.flip(1)


def smoothed(measured: Tensor, errors: Tensor) -> Tensor:
    """(units, bits) from the contributions at the first numbers of bits and the squared errors of weights at all."""
    tiny, many = 1e-300, measured.shape[1]
    matters = measured / errors[:, :many].clamp(min=tiny)
    expected = errors * (matters / matters.mean(0).clamp(min=tiny)).mean(1, keepdim=True)
    level = measured.sum(0) / expected[:, :many].sum(0).clamp(min=tiny)
    return expected * torch.cat([level, level[-1:].expand(errors.shape[1] - many)])


def price_of(linear: nn.Linear, config: QIGWeightOnlyConfig, bits: int) -> int:
    """What counts against the budget: bits of codes for `budget`, bytes in all for `max_bytes`."""
    if config.max_bytes is None:
        return bits * linear.weight.numel()
    return packed_bytes(linear, config.at(bits)) if bits < FULL else linear.weight.numel() * linear.weight.element_size()


def allocate(model: nn.Module, batches: Sequence[Batch], blocks: Iterable[str], configs: dict[str, QIGWeightOnlyConfig]) -> dict[str, int]:
    """Bits for each linear in `configs`, 16 standing for none."""
    config = next(iter(configs.values()))
    linears = {name: model.get_submodule(name) for name in configs}
    few, samples = [], 0
    for batch in batches:
        if samples < SAMPLES:
            few.append(batch)
            samples += batch.samples
    units = units_of(model, blocks, set(configs), few[0])
    price = torch.tensor([[sum(price_of(linears[n], configs[n], b) for n in unit) for b in BITS] for unit in units])
    if config.max_bytes is not None:
        budget = config.max_bytes
    else:
        assert config.budget is not None
        budget = int(config.budget * sum(linear.weight.numel() for linear in linears.values()))
    chosen = solve(costs(model, few, units, configs), price, budget)
    return {name: BITS[c] for unit, c in zip(units, chosen, strict=True) for name in unit}


def solve(cost: Tensor, price: Tensor, budget: int) -> list[int]:
    """Per row the column, so that prices (integers) add up to at most `budget` and costs to the least possible.

    Exact where prices have few states after division by their common divisor; otherwise they are rounded up to a part in
    STATES of the highest total. A larger budget never costs more.
    """
    rows, columns = price.shape
    if int(price.amin(1).sum()) > budget:
        raise UserError(f"budget: the smallest choice takes {int(price.amin(1).sum())}, more than {budget}; allow more")
    unit = math.gcd(*(int(p) for p in price.flatten()))
    unit = max(unit, -(-int(price.amax(1).sum()) // STATES))
    weights = -(-price // unit)
    capacity = min(budget // unit, int(weights.amax(1).sum()))
    if int(weights.amin(1).sum()) > capacity:  # rounding up is too coarse here: take the smallest
        return price.argmin(1).tolist()
    best = torch.zeros(capacity + 1, dtype=torch.float64)
    taken = torch.empty(rows, capacity + 1, dtype=torch.uint8)
    for r in range(rows):
        options = torch.full((columns, capacity + 1), math.inf, dtype=torch.float64)
        for c in range(columns):
            w = int(weights[r, c])
            if w <= capacity:
                options[c, w:] = best[: capacity + 1 - w] + cost[r, c]
        best, index = options.min(0)
        taken[r] = index
    left, chosen = capacity, []
    for r in range(rows - 1, -1, -1):
        chosen.append(int(taken[r, left]))
        left -= int(weights[r, chosen[-1]])
    return chosen[::-1]
