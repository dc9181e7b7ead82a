"""How Inductor turns our operators into kernels: the lowerings of `linear` and `int8_linear`, written in Inductor's own loop IR.

Why not plain torch ops: Inductor cuts an expression of this size into pieces (its realize thresholds) and, on the CPU,
does not contract multiply-add; both are global options that a library must not set. A lowering says the loop as it
should be, for the C++ and the Triton backend alike, and leaves all options alone.

Decode. One reduction over units of 32 columns; output rows are the lanes. Per code: mask the word in place (no shift),
convert to float, multiply-add with the activation, which was divided by 2**shift beforehand. Scale and zero are applied
once per turn of the loop: sum (q - z) s x = s (sum q x - z sum x). Up to `ROWS_PER_LOOP` rows of x share the unpacking: they are
separate reductions of the same loop nest, which the scheduler fuses.

Prefill. The weight is dequantized, transposed (columns, rows), by one loop with 32 stores, then multiplied by the matmul
library; large weights in slices of rows.

With int8 activations both are the same but for what is added up: in decode, sums of one turn (exact in float32) as int32; in
prefill, int8 codes for the integer matmul. Scales and bias come last, fused with what follows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch

from torchao_qig.tensor.packing import TILE, UNIT, BitField, fields

ROWS_PER_LOOP = 4  # rows of x per decode loop: more rows would save little unpacking and cost compile time
UNITS_PER_TURN = 2  # units per turn of the decode loop for one row of x; with several rows, one unit fills a turn
SHORT_ROW_UNITS = 16  # up to so many units, rows of x share no loop: the C++ compiler would unroll so short a loop completely, four times over
ACCUMULATORS = 2  # independent sums per unit, to hide the latency of multiply-add
GROUPS_PER_LOOP = 8  # groups whose integer products are scaled and added up in one loop
MIN_ROWS_INT_MM = 32  # x is padded to at least so many rows for an accelerator's integer matmul, which needs more than 16
SLICE_BYTES = 2**25  # bytes of weight dequantized at a time: the system would provide a larger block anew, page by page, on every call


@lru_cache
def _prescale(bits: int) -> torch.Tensor:
    """A factor for each of a unit's 32 codes: 2**-shift if the code is masked in place, else 1."""
    return torch.tensor([2.0 ** -parts[0].at if _in_place(parts) else 1.0 for parts in fields(bits)])


def _in_place(parts: tuple[BitField, ...]) -> bool:
    """Whether masking alone yields a non-negative int32 (the sign bit belongs to no such code)."""
    return len(parts) == 1 and parts[0].at + parts[0].width < 32


def _columns_per_scale(units: int, group_size: int, rows: int) -> int:
    """The number of columns whose products are summed before scale and zero are applied.

    It is half a unit if groups can end there. Else it is one unit, or for one row of x `UNITS_PER_TURN` units if these divide the weight's row and
    the group.
    """
    if group_size != -1 and group_size % UNIT:
        return UNIT // 2
    whole = rows == 1 and units % UNITS_PER_TURN == 0 and (group_size == -1 or group_size % (UNITS_PER_TURN * UNIT) == 0)
    return UNITS_PER_TURN * UNIT if whole else UNIT


@lru_cache
def register() -> None:
    """Register the lowerings of both operators with Inductor.

    Called when an operator is first traced, so that plain serving never imports the compiler.
    """
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

    def code(words: Mapping[int, Any], parts: tuple[BitField, ...]) -> Any:
        """A code as int32."""
        value = None
        for p in parts:
            piece = words[p.word]
            if p.at > p.to:
                piece = ops.bitwise_right_shift(piece, ops.constant(p.at - p.to, torch.int32))
            elif p.at < p.to:
                piece = ops.bitwise_left_shift(piece, ops.constant(p.to - p.at, torch.int32))
            piece = ops.bitwise_and(piece, ops.constant(((1 << p.width) - 1) << p.to, torch.int32))
            value = piece if value is None else ops.bitwise_or(value, piece)
        return value

    def code_in_place(words: Mapping[int, Any], parts: tuple[BitField, ...]) -> Any:
        """A code as float. If it is masked in place, it stays multiplied by 2**at, which `_prescale` undoes."""
        if not _in_place(parts):
            return as_float(code(words, parts))
        (p,) = parts
        return as_float(ops.bitwise_and(words[p.word], ops.constant(((1 << p.width) - 1) << p.at, torch.int32)))

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

    def total(x: Any, ranges: Sequence[Any], length: Any, inner: Callable[[Any, Any], Any], dtype: torch.dtype = torch.float32) -> Any:
        result = ir.Reduction.create(
            device=x.get_device(), dst_dtype=dtype, src_dtype=dtype, inner_fn=inner,
            ranges=list(ranges), reduction_ranges=[length], reduction_type="sum",
        )  # fmt: skip
        result.realize()
        return result

    def decode(x: Any, qdata: Any, scale: Any, zero: Any, group_size: int, dtype: torch.dtype) -> Any:
        """x (M, units * 32) times the weight transposed: (M, tiles * 16) in `dtype`. With int32, the weight's scale is left out."""
        exact = dtype == torch.int32
        bits, tiles, units, _ = (int(n) for n in qdata.get_size())
        m = x.get_size()[0]
        shared = 1 if units <= SHORT_ROW_UNITS else min(int(m), ROWS_PER_LOOP) if m.is_number else ROWS_PER_LOOP
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
                    chains: list[Any] = [None] * ACCUMULATORS
                    for column in range(start, start + span):
                        u, j = divmod(column, UNIT)
                        value, factor = code_in_place(words[u], fields(bits)[j]), scaled_at([row, first + u, j])
                        chain = chains[j % ACCUMULATORS]
                        chains[j % ACCUMULATORS] = ops.mul(value, factor) if chain is None else multiply_add(value, factor, chain)
                    at = [group_of(first, start, group_size), tile * TILE + lane]
                    block_sum = sums_at([row, FloorDiv(first * UNIT + start, span)])
                    shifted = multiply_add(as_float(zero_at(at)), block_sum, ops.add(*chains))
                    part = ops.to_dtype(shifted, torch.int32) if exact else ops.mul(shifted, as_float(scale_at(at)))
                    result = part if result is None else ops.add(result, part)
                return result

            return total(x, [blocks, tiles, TILE], units // step, inner, torch.int32 if exact else torch.float32)

        rows = [lowerings[torch.ops.prims.convert_element_type.default](row_sum(r), dtype) for r in range(shared)]
        y = lowerings[aten.cat.default](rows, 0) if len(rows) > 1 else rows[0]
        y = lowerings[aten.view.default](y, [blocks * shared, tiles * TILE])
        return lowerings[aten.slice.Tensor](y, 0, 0, m)

    def unpacked(qdata: Any, dtype: torch.dtype, value: Callable[[Any, Any, int, Any], Any]) -> Iterator[tuple[int, Any]]:
        """Yield slices of the weight's rows: each slice's first row, and the slice transposed. `value(code, unit, column, row)` gives an element."""
        bits, tiles, units, _ = (int(n) for n in qdata.get_size())
        word_at = qdata.make_loader()

        def column(j: int, first: int, count: int) -> Any:
            def inner(index: Any) -> Any:
                unit, _, tile, lane = index
                words = {p.word: word_at([p.word, first + tile, unit, lane]) for p in fields(bits)[j]}
                return ops.to_dtype(value(code(words, fields(bits)[j]), unit, j, (first + tile) * TILE + lane), dtype)

            return pointwise(qdata, dtype, [units, 1, count, TILE], inner)

        step = -(-tiles // -(-tiles * TILE * units * UNIT * dtype.itemsize // SLICE_BYTES))
        for first in range(0, tiles, step):
            count = min(step, tiles - first)
            weight = ir.TensorBox(ir.ConcatKernel.create([column(j, first, count) for j in range(UNIT)], 1))  # aten.cat would copy int8
            yield first * TILE, lowerings[aten.view.default](weight, [units * UNIT, count * TILE])

    def prefill(x: Any, qdata: Any, scale: Any, zero: Any, group_size: int) -> Any:
        """The product of `decode`, computed with a dequantized weight."""
        scale_at, zero_at = scale.make_loader(), zero.make_loader()

        def value(code: Any, unit: Any, column: int, row: Any) -> Any:
            at = [group_of(unit, column, group_size), row]
            return ops.mul(ops.sub(as_float(code), as_float(zero_at(at))), as_float(scale_at(at)))

        products = [lowerings[aten.mm.default](x, weight) for _, weight in unpacked(qdata, x.get_dtype(), value)]
        return lowerings[aten.cat.default](products, 1) if len(products) > 1 else products[0]

    def integer_prefill(x: Any, qdata: Any, scale: Any, zero: Any, group_size: int, halves: bool) -> Any:
        """The product of integer codes, (M, tiles * 16): for one group per row in int32 without the scale, else in float32 with it."""
        scale_at, zero_at = scale.make_loader(), zero.make_loader()
        columns = int(qdata.get_size()[-2]) * UNIT

        def value(code: Any, unit: Any, column: int, row: Any) -> Any:
            return ops.sub(code, ops.to_dtype(zero_at([group_of(unit, column, group_size), row]), torch.int32))

        def high(*at: Any) -> Any:
            return ops.bitwise_right_shift(value(*at), ops.constant(4, torch.int32))

        def low(*at: Any) -> Any:
            return ops.bitwise_and(value(*at), ops.constant(15, torch.int32))

        def product(x: Any, *weights: Any) -> Any:
            """x times the weight, or times the weight given as its two halves."""
            products = [lowerings[aten._int_mm.default](x, w) for w in weights]
            if len(products) == 1:
                return products[0]
            high_at, low_at = (p.make_loader() for p in products)
            return pointwise(x, torch.int32, products[0].get_size(), lambda i: ops.add(ops.mul(high_at(i), ops.constant(16, torch.int32)), low_at(i)))

        def of_group(weights: list[Any], start: int) -> Any:
            ends = start, min(start + group_size, columns)
            return product(*(lowerings[aten.slice.Tensor](t, dim, *ends) for t, dim in ((x, 1), *((w, 0) for w in weights))))

        def scaled(products: list[Any], group: int, row: int, before: Any) -> Any:
            loaders = [p.make_loader() for p in products]
            before_at = None if before is None else before.make_loader()

            def inner(index: Any) -> Any:
                n = index[1]
                result = None if before_at is None else before_at(index)
                for i, at in enumerate(loaders):
                    part = ops.mul(as_float(at(index)), as_float(scale_at([group + i, row + n])))
                    result = part if result is None else ops.add(result, part)
                return result

            return pointwise(x, torch.float32, products[0].get_size(), inner)

        slices = []
        values = (high, low) if halves else (value,)
        for parts in zip(*(unpacked(qdata, torch.int8, v) for v in values), strict=True):
            row, weights = parts[0][0], [weight for _, weight in parts]
            if group_size == -1:
                slices.append(product(x, *weights))
                continue
            sums, starts = None, range(0, columns, group_size)
            for group in range(0, len(starts), GROUPS_PER_LOOP):
                sums = scaled([of_group(weights, start) for start in starts[group : group + GROUPS_PER_LOOP]], group, row, sums)
                sums.realize()
            slices.append(sums)
        return lowerings[aten.cat.default](slices, 1) if len(slices) > 1 else slices[0]

    def padded(x: Any, qdata: Any, columns: int) -> Any:
        missing = int(qdata.get_size()[-2]) * UNIT - columns
        return lowerings[aten.constant_pad_nd.default](x, [0, missing], 0) if missing else x

    @register_lowering(torch.ops.torchao_qig.linear.default, type_promotion_kind=None)
    def linear(x, qdata, scale, zero, bias, group_size, rows, columns, use_decode, kernels):  # type: ignore[no-untyped-def]
        x = padded(x, qdata, columns)
        y = decode(x, qdata, scale, zero, group_size, x.get_dtype()) if use_decode else prefill(x, qdata, scale, zero, group_size)
        y = lowerings[aten.slice.Tensor](y, 1, 0, rows)
        return y if bias is None else lowerings[aten.add.Tensor](y, bias)

    @register_lowering(torch.ops.torchao_qig.int8_linear.default, type_promotion_kind=None)
    def int8_linear(x, codes, x_scale, qdata, scale, zero, bias, group_size, rows, columns, use_decode, halves, kernels):  # type: ignore[no-untyped-def]
        codes, whole_rows = padded(codes, qdata, columns), group_size == -1
        if use_decode:
            y = decode(codes, qdata, scale, zero, group_size, torch.int32 if whole_rows else torch.float32)
        else:
            m = codes.get_size()[0]  # unknown in export with a dynamic batch
            more = 0 if codes.get_device().type == "cpu" or V.graph.sizevars.statically_known_gt(m, 16) else MIN_ROWS_INT_MM
            codes = lowerings[aten.constant_pad_nd.default](codes, [0, 0, 0, more], 0) if more else codes
            y = lowerings[aten.slice.Tensor](integer_prefill(codes, qdata, scale, zero, group_size, halves), 0, 0, m)
        y_at, x_scale_at, scale_at = y.make_loader(), x_scale.make_loader(), scale.make_loader()
        bias_at = None if bias is None else bias.make_loader()
        wide = x_scale.get_dtype()

        def inner(index: Any) -> Any:
            m, n = index
            value = ops.to_dtype(y_at(index), wide)
            if whole_rows:
                value = ops.mul(value, ops.to_dtype(scale_at([0, n]), wide))
            value = ops.mul(value, x_scale_at([m, 0]))
            value = value if bias_at is None else ops.add(value, ops.to_dtype(bias_at([n]), wide))
            return ops.to_dtype(value, x.get_dtype())

        return pointwise(x, x.get_dtype(), [x.get_size()[0], rows], inner)
