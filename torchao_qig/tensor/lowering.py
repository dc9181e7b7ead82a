"""How Inductor turns `torchao_qig::linear` into kernels: the operator's lowering, written in Inductor's own loop IR.

Why not plain torch ops: Inductor cuts an expression of this size into pieces (its realize thresholds) and, on the CPU,
does not contract multiply-add; both are global options that a library must not set. A lowering says the loop as it
should be, for the C++ and the Triton backend alike, and leaves all options alone.

Decode. One reduction over units of 32 columns; output rows are the lanes. Per code: mask the word in place (no shift),
convert to float, multiply-add with the activation, which was divided by 2**shift beforehand. Scale and zero are applied
once per turn of the loop: sum (q - z) s x = s (sum q x - z sum x). Up to `ROWS` rows of x share the unpacking: they are
separate reductions of the same loop nest, which the scheduler fuses.

Prefill. The weight is dequantized, transposed (columns, rows), by one loop with 32 stores, then multiplied by the matmul
library; large weights in slices of rows.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from torchao_qig.tensor.packing import TILE, UNIT, Part, fields

ROWS = 4  # rows of x per decode loop: more save little unpacking and cost compile time
STEP = 2  # units per turn of the decode loop, for one row of x; more rows fill the turn by themselves
SHORT = 16  # units up to which rows do not share: the C++ compiler unrolls so short a loop whole, four times over
CHAINS = 2  # independent sums per unit, to hide the latency of multiply-add
SLICE_BYTES = 2**25  # of dequantized weight at a time: larger blocks come fresh from the system, page by page, on every call


@lru_cache
def _prescale(bits: int) -> torch.Tensor:
    """2**-shift of every code that is masked in place, 1 for the others."""
    return torch.tensor([2.0 ** -parts[0].at if _in_place(parts) else 1.0 for parts in fields(bits)])


def _in_place(parts: tuple[Part, ...]) -> bool:
    """Whether masking alone yields a non-negative int32 (the sign bit belongs to no such code)."""
    return len(parts) == 1 and parts[0].at + parts[0].width < 32


def _columns_per_scale(units: int, group_size: int, rows: int) -> int:
    """Half a unit where a group ends there; else one unit, or `STEP` where they divide the row and the group."""
    if group_size != -1 and group_size % UNIT:
        return UNIT // 2
    whole = rows == 1 and units % STEP == 0 and (group_size == -1 or group_size % (STEP * UNIT) == 0)
    return STEP * UNIT if whole else UNIT


@lru_cache
def register() -> None:
    """Teach Inductor the operator; called when it is first traced, so that plain serving never imports the compiler."""
    import sympy
    from torch._inductor import ir
    from torch._inductor.lowering import lowerings, register_lowering
    from torch._inductor.ops_handler import OpsHandler
    from torch._inductor.virtualized import V, ops
    from torch.utils._sympy.functions import FloorDiv

    aten = torch.ops.aten

    def multiply_add(a: Any, b: Any, c: Any) -> Any:
        """a * b + c, in one instruction where this torch can say so."""
        return ops.fma(a, b, c) if hasattr(OpsHandler, "fma") else ops.add(ops.mul(a, b), c)

    def code(words: Mapping[int, Any], parts: tuple[Part, ...], in_place: bool) -> Any:
        """A code as float: exact, or times 2**at where it is masked in place."""
        if in_place and _in_place(parts):
            (p,) = parts
            return ops.to_dtype(ops.bitwise_and(words[p.word], ops.constant(((1 << p.width) - 1) << p.at, torch.int32)), torch.float32)
        value = None
        for p in parts:
            piece = words[p.word]
            if p.at > p.to:
                piece = ops.bitwise_right_shift(piece, ops.constant(p.at - p.to, torch.int32))
            elif p.at < p.to:
                piece = ops.bitwise_left_shift(piece, ops.constant(p.to - p.at, torch.int32))
            piece = ops.bitwise_and(piece, ops.constant(((1 << p.width) - 1) << p.to, torch.int32))
            value = piece if value is None else ops.bitwise_or(value, piece)
        return ops.to_dtype(value, torch.float32)

    def as_float(value: Any) -> Any:
        return ops.to_dtype(value, torch.float32)

    def group_of(unit: sympy.Expr, column: int, group_size: int) -> sympy.Expr:
        """The group that holds column `column` of a unit; constant over each half of a unit."""
        if group_size == -1:
            return sympy.Integer(0)
        start = 0 if group_size % UNIT == 0 else column - column % 16
        return FloorDiv(unit * UNIT + start, group_size)

    def pointwise(x: Any, dtype: torch.dtype, ranges: Sequence[Any], inner: Callable[[Any], Any]) -> Any:
        return ir.Pointwise.create(device=x.get_device(), dtype=dtype, inner_fn=inner, ranges=list(ranges))

    def total(x: Any, ranges: Sequence[Any], length: Any, inner: Callable[[Any, Any], Any]) -> Any:
        result = ir.Reduction.create(
            device=x.get_device(), dst_dtype=torch.float32, src_dtype=torch.float32, inner_fn=inner,
            ranges=list(ranges), reduction_ranges=[length], reduction_type="sum",
        )  # fmt: skip
        result.realize()
        return result

    def decode(x: Any, qdata: Any, scale: Any, zero: Any, group_size: int) -> Any:
        """(M, units * 32) times the weight transposed: (M, tiles * 16)."""
        bits, tiles, units, _ = (int(n) for n in qdata.get_size())
        m = x.get_size()[0]
        shared = 1 if units <= SHORT else min(int(m), ROWS) if m.is_number else ROWS
        blocks = FloorDiv(m + shared - 1, shared)
        x = lowerings[aten.constant_pad_nd.default](x, [0, 0, 0, blocks * shared - m], 0.0)
        span = _columns_per_scale(units, group_size, shared)  # columns whose products are summed before scale and zero
        step = max(span, UNIT) // UNIT  # units per turn of the loop

        x_at, prescale_at = x.make_loader(), V.graph.add_tensor_constant(_prescale(bits).to(x.get_device())).make_loader()
        ranges = [blocks * shared, units]
        scaled = pointwise(x, torch.float32, [*ranges, UNIT], lambda i: ops.mul(as_float(x_at([i[0], i[1] * UNIT + i[2]])), prescale_at([i[2]])))
        scaled.realize()
        minus_sums = total(x, [blocks * shared, units * UNIT // span], span, lambda i, r: ops.neg(as_float(x_at([i[0], i[1] * span + r[0]]))))
        scaled_at, sums_at = scaled.make_loader(), minus_sums.make_loader()
        word_at, scale_at, zero_at = qdata.make_loader(), scale.make_loader(), zero.make_loader()

        def row_sum(block_row: int) -> Any:
            def inner(index: Any, reduction: Any) -> Any:
                block, tile, lane = index
                row, first = block + block_row * blocks, reduction[0] * step
                words = [{i: word_at([i, tile, first + u, lane]) for i in range(bits)} for u in range(step)]
                result = None
                for start in range(0, step * UNIT, span):
                    chains: list[Any] = [None] * CHAINS
                    for column in range(start, start + span):
                        u, j = divmod(column, UNIT)
                        value, factor = code(words[u], fields(bits)[j], in_place=True), scaled_at([row, first + u, j])
                        chain = chains[j % CHAINS]
                        chains[j % CHAINS] = ops.mul(value, factor) if chain is None else multiply_add(value, factor, chain)
                    at = [group_of(first, start, group_size), tile * TILE + lane]
                    block_sum = sums_at([row, FloorDiv(first * UNIT + start, span)])
                    shifted = multiply_add(as_float(zero_at(at)), block_sum, ops.add(*chains))
                    part = ops.mul(shifted, as_float(scale_at(at)))
                    result = part if result is None else ops.add(result, part)
                return result

            return total(x, [blocks, tiles, TILE], units // step, inner)

        rows = [lowerings[torch.ops.prims.convert_element_type.default](row_sum(r), x.get_dtype()) for r in range(shared)]
        y = lowerings[aten.cat.default](rows, 0) if len(rows) > 1 else rows[0]
        y = lowerings[aten.view.default](y, [blocks * shared, tiles * TILE])
        return lowerings[aten.slice.Tensor](y, 0, 0, m)

    def prefill(x: Any, qdata: Any, scale: Any, zero: Any, group_size: int) -> Any:
        """The same product with the weight dequantized first, a slice of its rows at a time."""
        bits, tiles, units, _ = (int(n) for n in qdata.get_size())
        word_at, scale_at, zero_at = qdata.make_loader(), scale.make_loader(), zero.make_loader()

        def column(j: int, first: int, count: int) -> Any:
            def inner(index: Any) -> Any:
                unit, _, tile, lane = index
                words = {p.word: word_at([p.word, first + tile, unit, lane]) for p in fields(bits)[j]}
                at = [group_of(unit, j, group_size), (first + tile) * TILE + lane]
                value = ops.mul(ops.sub(code(words, fields(bits)[j], in_place=False), as_float(zero_at(at))), as_float(scale_at(at)))
                return ops.to_dtype(value, x.get_dtype())

            return pointwise(x, x.get_dtype(), [units, 1, count, TILE], inner)

        slices = -(-tiles * TILE * units * UNIT * x.get_dtype().itemsize // SLICE_BYTES)
        step = -(-tiles // slices)
        products = []
        for first in range(0, tiles, step):
            count = min(step, tiles - first)
            weight = lowerings[aten.cat.default]([column(j, first, count) for j in range(UNIT)], 1)
            weight = lowerings[aten.view.default](weight, [units * UNIT, count * TILE])
            products.append(lowerings[aten.mm.default](x, weight))
        return lowerings[aten.cat.default](products, 1) if len(products) > 1 else products[0]

    @register_lowering(torch.ops.torchao_qig.linear.default, type_promotion_kind=None)
    def linear(x, qdata, scale, zero, bias, group_size, rows, columns, use_decode, kernels):  # type: ignore[no-untyped-def]
        columns_padded = int(qdata.get_size()[-2]) * UNIT
        if columns_padded != columns:
            x = lowerings[aten.constant_pad_nd.default](x, [0, columns_padded - columns], 0.0)
        y = (decode if use_decode else prefill)(x, qdata, scale, zero, group_size)
        y = lowerings[aten.slice.Tensor](y, 1, 0, rows)
        return y if bias is None else lowerings[aten.add.Tensor](y, bias)
