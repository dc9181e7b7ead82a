"""Choose the bits of every linear (`bits="auto"`): measure each group's part in what quantization does to the model's output, then solve a knapsack problem.

All groups are moved together from full precision to a few bits, W + a (W_q - W) for a from 0 to 1. The integral of
d divergence / d a_group along that path is the group's contribution (integrated gradients over groups): contributions add up to
the divergence at the end. One forward and backward pass of the model per point of the quadrature gives those of all groups.

`divergence` is the mean KL of the answer tokens' distribution to that of full precision; for models that return no logits, the
squared error of their output relative to its mean square.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchao_qig.errors import UserError
from torchao_qig.formats.affine import UNQUANTIZED_BITS
from torchao_qig.formats.base import LinearForm
from torchao_qig.methods.token_weights.attribution import rule
from torchao_qig.watch import ranks
from torchao_qig.watch.batches import Batch
from torchao_qig.watch.groups import find_groups, join
from torchao_qig.watch.observer import Observer, first_tensor, patched

BITS = (2, 3, 4, 5, 6, 7, 8, UNQUANTIZED_BITS)
LEAST_BITS = BITS[0]
MEASURED = (2, 3, 4)  # bits at which contributions are measured: the first of BITS. Above, costs fall as the squared error of the weights does
POINTS = 3  # points of the quadrature
SAMPLES = 32  # samples that contributions are measured on
STATES = 100_000  # states of the knapsack at most

Unit = tuple[str, ...]  # linears that share an input, and so their bits
FormAt = Callable[[str, int], LinearForm]


def units_of(model: nn.Module, blocks: Iterable[str], linears: set[str], batch: Batch) -> list[Unit]:
    """Group the linears that share an input, by running one batch. Linears that the batch does not reach stand alone."""
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


def difference(weight: Tensor, form: LinearForm) -> Tensor:
    """The rounded weight minus the weight."""
    return form.rounder(weight.dtype)(weight, None) - weight


def _answers(batch: Batch, logits: Tensor) -> Tensor:
    """The positions whose next token belongs to an answer, or all positions that count where no answers are known."""
    masks = batch.masks
    wanted = masks.answer if masks.answer is not None and bool(masks.answer.any()) else masks.counted
    if wanted is None or wanted.shape != logits.shape[:2]:
        return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    return F.pad(wanted[:, 1:], (0, 1)).to(logits.device)


def _output(model: nn.Module, batch: Batch) -> tuple[Tensor, bool]:
    """Run the model. Returns log-probabilities at the answers' positions and True; or, of a model without logits, its output and False."""
    out = model(*batch.args, **batch.kwargs)
    logits = getattr(out, "logits", None)
    return (first_tensor(out).float(), False) if logits is None else (logits[_answers(batch, logits)].float().log_softmax(-1), True)


def _divergence(reference: Tensor, output: Tensor, logs: bool) -> Tensor:
    """The divergence of an output from that of full precision, summed over positions: KL of log-probabilities, else a relative squared error."""
    if logs:
        return (reference.exp() * (reference - output)).sum()
    return (output - reference).square().sum() / reference.square().mean().clamp(min=1e-30)


def contributions(model: nn.Module, batches: Sequence[Batch], units: list[Unit], changed: Callable[[str, Tensor], Tensor]) -> Tensor:
    """(units,): each unit's part of the mean divergence of the model in which every weight W becomes W + changed(name, W)."""
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
                change = changed(name, linear.weight)  # computed anew every time, since all changes together are as large as the model
                out = F.linear(x, change)
            plain = F.linear(x, linear.weight.detach() + at * change, linear.bias)
            return plain + (amounts[i] - at).to(plain.dtype) * out  # the factor is 0; it only gives the derivative with respect to amounts[i]

        return forward

    for at, share in zip(points.nodes, points.weights, strict=True):
        for batch, reference in zip(batches, references, strict=True):
            amounts = torch.full((len(units),), at, requires_grad=True)
            with torch.enable_grad(), patched({linear: moved(name, at, amounts) for name, linear in linears.items()}):
                (gradient,) = torch.autograd.grad(_divergence(reference, *_output(model, batch)), amounts)
            total += share * gradient.double()
    count = ranks.summed(torch.tensor([float(sum(len(r) for r in references))], dtype=torch.float64))
    return ranks.summed(total) / count.clamp(min=1)


def costs(model: nn.Module, batches: Sequence[Batch], units: list[Unit], form_at: FormAt) -> Tensor:
    """(units, BITS): what each unit costs at each number of bits. Fewer bits never cost less.

    A unit's cost is the squared error of its weights times a factor that says how much this error matters. The factor is the same at
    every number of bits: a mean over the measured ones, since a single contribution is noisy. All units together cost what was measured.
    """

    def change_at(bits: int) -> Callable[[str, Tensor], Tensor]:
        return lambda name, weight: difference(weight, form_at(name, bits))

    measured = torch.stack([contributions(model, batches, units, change_at(bits)).clamp(min=0) for bits in MEASURED], dim=1)

    def error(name: str, bits: int) -> float:
        return float(difference(model.get_submodule(name).weight.detach(), form_at(name, bits)).square().sum(dtype=torch.float64))

    errors = torch.tensor([[sum(error(n, b) for n in unit) for b in BITS[:-1]] for unit in units], dtype=torch.float64)
    found = torch.cat([smoothed(measured, errors), torch.zeros(len(units), 1, dtype=torch.float64)], 1)
    return found.flip(1).cummax(1).values.flip(1)


def smoothed(measured: Tensor, errors: Tensor) -> Tensor:
    """(units, bits): the costs, as `costs` describes them.

    Args:
        measured: (units, few bits): the contributions at the first numbers of bits.
        errors: (units, bits): the squared errors of the weights at all numbers of bits.
    """
    tiny, many = 1e-300, measured.shape[1]
    matters = measured / errors[:, :many].clamp(min=tiny)
    expected = errors * (matters / matters.mean(0).clamp(min=tiny)).mean(1, keepdim=True)
    level = measured.sum(0) / expected[:, :many].sum(0).clamp(min=tiny)
    return expected * torch.cat([level, level[-1:].expand(errors.shape[1] - many)])


def weight_bytes(linear: nn.Linear, form: LinearForm) -> int:
    """Bytes of a stored weight, with its scales and zero points."""
    rows, columns = linear.weight.shape
    return form.format.nbytes(rows, columns, form.scale_dtype(linear.weight.dtype))


@dataclass(frozen=True)
class Budget:
    """What all weights together may take: a mean number of bits per weight, scales not counted, or bytes in all. One of the two is given."""

    mean_bits: float | None = None
    max_bytes: int | None = None

    def price(self, linear: nn.Linear, form: LinearForm, bits: int) -> int:
        """What a weight in this form costs, in the budget's unit."""
        if self.max_bytes is None:
            return bits * linear.weight.numel()
        return weight_bytes(linear, form) if bits < UNQUANTIZED_BITS else linear.weight.numel() * linear.weight.element_size()

    def total(self, weights: int) -> int:
        """The whole budget for this number of weights: in bits or in bytes, as `price` counts."""
        if self.max_bytes is not None:
            return self.max_bytes
        assert self.mean_bits is not None
        return int(self.mean_bits * weights)


def allocate(model: nn.Module, batches: Sequence[Batch], blocks: Iterable[str], names: Sequence[str], form_at: FormAt, budget: Budget) -> dict[str, int]:
    """Choose the bits of each linear in `names`; 16 means that it is not quantized.

    Args:
        blocks: names of the blocks that the linears lie in.
        form_at: gives what a linear, by its name, becomes at a number of bits.
    """
    linears = {name: model.get_submodule(name) for name in names}
    few, samples = [], 0
    for batch in batches:
        if samples < SAMPLES:
            few.append(batch)
            samples += batch.samples
    units = units_of(model, blocks, set(names), few[0])
    price = torch.tensor([[sum(budget.price(linears[n], form_at(n, min(b, 8)), b) for n in unit) for b in BITS] for unit in units])
    total = budget.total(sum(linear.weight.numel() for linear in linears.values()))
    chosen = solve(costs(model, few, units, form_at), price, total)
    return {name: BITS[c] for unit, c in zip(units, chosen, strict=True) for name in unit}


def solve(cost: Tensor, price: Tensor, budget: int) -> list[int]:
    """Choose one column per row, so that prices (integers) add up to at most `budget` and costs to the least possible.

    The choice is exact if the prices, divided by their common divisor, need at most STATES states. Otherwise they are rounded up
    to a multiple of the highest total / STATES. A larger budget never costs more.
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
