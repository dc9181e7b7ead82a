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
from torchao_qig.tensor import affine

BITS = (2, 3, 4, 5, 6, 7, 8, FULL)
MEASURED = (2, 3, 4)  # above, the contribution falls as the squared error of the weights does
POINTS = 3  # of the quadrature
SAMPLES = 32  # that contributions are measured on
STATES = 100_000  # of the knapsack

Unit = tuple[str, ...]  # linears that share an input, and so their bits
Sizes = Callable[[str, int], int]


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
    return affine.fake_quantize(weight, bits, config.group_size, config.symmetric, config.official, config.dtype) - weight


def _answers(batch: Batch, logits: Tensor) -> Tensor:
    """Positions whose next token is an answer; without answers, all that count."""
    masks = batch.masks
    wanted = masks.answer if masks.answer is not None and bool(masks.answer.any()) else masks.counted
    if wanted is None or wanted.shape != logits.shape[:2]:
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return F.pad(wanted[:, 1:], (0, 1)).to(logits.device)


def _divergence(model: nn.Module, batch: Batch, reference: Tensor | None) -> tuple[Tensor, Tensor]:
    """Divergence to `reference`, summed over positions, and what the next call takes as reference."""
    out = model(*batch.args, **batch.kwargs)
    logits = getattr(out, "logits", None)
    if logits is None:
        plain = first_tensor(out).float()
        return ((plain - reference).square().sum() / reference.square().mean().clamp(min=1e-30) if reference is not None else plain.sum() * 0), plain.detach()
    chosen = logits[_answers(batch, logits)].float().log_softmax(-1)
    return ((reference.exp() * (reference - chosen)).sum() if reference is not None else chosen.sum() * 0), chosen.detach()


def contributions(model: nn.Module, batches: Sequence[Batch], units: list[Unit], changed: Callable[[str, Tensor], Tensor]) -> Tensor:
    """(units,): each unit's part of the mean divergence of the model whose weights are all `changed(name, weight)` more."""
    points = rule("gauss", POINTS)
    number = {name: i for i, unit in enumerate(units) for name in unit}
    linears = {name: model.get_submodule(name) for name in number}
    with torch.no_grad():
        references = [_divergence(model, batch, None)[1] for batch in batches]
    total = torch.zeros(len(units), dtype=torch.float64)

    def moved(name: str, at: float, amounts: Tensor) -> Callable[[Tensor], Tensor]:
        linear, i = linears[name], number[name]
        assert isinstance(linear, nn.Linear)

        def forward(x: Tensor) -> Tensor:
            with torch.no_grad():
                change = changed(name, linear.weight)
                out = F.linear(x, change)
            plain = F.linear(x, linear.weight.detach() + at * change, linear.bias)
            return plain + (amounts[i] - at).to(plain.dtype) * out  # nothing is added but the derivative

        return forward

    for at, share in zip(points.nodes, points.weights, strict=True):
        for batch, reference in zip(batches, references, strict=True):
            amounts = torch.full((len(units),), at, requires_grad=True)
            with torch.enable_grad(), patched({linear: moved(name, at, amounts) for name, linear in linears.items()}):
                (gradient,) = torch.autograd.grad(_divergence(model, batch, reference)[0], amounts)
            total += share * gradient.double()
    count = ranks.summed(torch.tensor([float(sum(len(r) for r in references))], dtype=torch.float64))
    return ranks.summed(total) / count.clamp(min=1)


def costs(model: nn.Module, batches: Sequence[Batch], units: list[Unit], configs: dict[str, QIGWeightOnlyConfig]) -> Tensor:
    """(units, BITS): what each unit costs at each number of bits; never less with fewer."""
    weights = {name: model.get_submodule(name).weight.detach() for name in configs}
    found = torch.zeros(len(units), len(BITS), dtype=torch.float64)
    last = BITS.index(MEASURED[-1])
    for i, bits in enumerate(BITS[:-1]):
        if bits in MEASURED:
            found[:, i] = contributions(model, batches, units, lambda name, w, bits=bits: difference(w, configs[name], bits)).clamp(min=0)  # type: ignore[misc]
        errors = [sum(float(difference(weights[n], configs[n], bits).square().sum(dtype=torch.float64)) for n in unit) for unit in units]
        if bits == MEASURED[-1]:
            scale = found[:, last] / torch.tensor(errors, dtype=torch.float64).clamp(min=1e-300)
        elif bits > MEASURED[-1]:
            found[:, i] = scale * torch.tensor(errors, dtype=torch.float64)
    return found.flip(1).cummax(1).values.flip(1)


def prices(model: nn.Module, configs: dict[str, QIGWeightOnlyConfig]) -> Sizes:
    """What counts against the budget: bits of codes for `budget`, bytes in all for `max_bytes`."""

    def size(name: str, bits: int) -> int:
        linear, config = model.get_submodule(name), configs[name]
        assert isinstance(linear, nn.Linear)
        if config.max_bytes is None:
            return bits * linear.weight.numel()
        return packed_bytes(linear, config.at(bits)) if bits < FULL else linear.weight.numel() * linear.weight.element_size()

    return size


def allocate(model: nn.Module, batches: Sequence[Batch], blocks: Iterable[str], configs: dict[str, QIGWeightOnlyConfig], sizes: Sizes) -> dict[str, int]:
    """Bits for each linear in `configs`, 16 standing for none; `sizes(name, bits)` is what counts against the budget."""
    config = next(iter(configs.values()))
    few, samples = [], 0
    for batch in batches:
        if samples < SAMPLES:
            few.append(batch)
            samples += batch.samples
    units = units_of(model, blocks, set(configs), few[0])
    price = torch.tensor([[sum(sizes(n, b) for n in unit) for b in BITS] for unit in units])
    budget = config.max_bytes if config.max_bytes is not None else int((config.budget or 0) * sum(sizes(n, 1) for n in configs))
    chosen = solve(costs(model, few, units, configs), price, budget)
    return {name: BITS[c] for unit, c in zip(units, chosen, strict=True) for name in unit}


def solve(cost: Tensor, price: Tensor, budget: int) -> list[int]:
    """Per row the column, so that prices (integers) add up to at most `budget` and costs to the least possible.

    Exact where prices have few states after division by their common divisor; otherwise they are rounded up to a part in
    STATES of the highest total. A larger budget never costs more.
    """
    rows, columns = price.shape
    if int(price.amin(1).sum()) > budget:
        raise ValueError(f"budget: the smallest choice takes {int(price.amin(1).sum())}, more than {budget}; allow more")
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
