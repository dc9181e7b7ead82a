"""The linear of a packed weight: the operator `torch.ops.torchao_qig.linear`, and how eager mode, autograd and compilers run it.

Eager mode dequantizes the weight and calls `F.linear`. It is the reference, and computes bit for bit what a fake-quantized model computes.
Under `torch.compile` the operator is lowered by `lowering.py`:

- decode (few rows): one kernel that reads the packed words and keeps the weight in registers,
- prefill (many rows): tiles of the weight dequantized for the matmul library.

The number of rows decides which form is used (`DECODE_ROWS`). A symbolic number gets a guard, so a dynamic batch compiles once per form.
Gradients flow to the input only: packed weights do not train.
"""

import warnings
import zlib
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_qig.tensor import affine, packing

DECODE_ROWS = 64  # up to this many rows the decode form is faster than dequantizing (benchmarks/kernels.py)
# A checksum of this folder's sources. It is an argument of the operators and part of a weight's key in compilers' caches, so that code compiled
# by another version is never reused.
KERNELS = zlib.crc32(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


def dequantize(qdata: Tensor, scale: Tensor, zero: Tensor, group_size: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight (..., rows, columns) that packed words, stored scale and stored zero stand for."""
    codes = packing.unpack(qdata, rows, columns)
    scale = packing.unpack_groups(scale, group_size, rows, columns)
    zero = packing.unpack_groups(zero, group_size, rows, columns)
    return affine.dequantize(codes, scale, zero, group_size, dtype)


@torch.library.custom_op("torchao_qig::linear", mutates_args=())
def packed_linear(
    x: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    group_size: int,
    rows: int,
    columns: int,
    decode: bool,
    kernels: int,
) -> Tensor:
    """x (M, columns) times the packed weight (rows, columns) transposed, plus bias.

    `decode` and `kernels` only matter when the operator is compiled.
    """
    return F.linear(x, dequantize(qdata, scale, zero, group_size, rows, columns, x.dtype), bias)


@lru_cache
def register_lowerings() -> None:
    """Tell Inductor the lowerings of the operators, once. Warns if this torch lacks what they need."""
    from torchao_qig.tensor import lowering

    try:
        lowering.register()
    except (ImportError, AttributeError) as error:  # an untested torch: results are still right, but the kernels are not fused
        warnings.warn(f"torch {torch.__version__}: {error}; compiled packed linears run unfused and slowly. Tested with torch 2.13.0.", stacklevel=2)


@packed_linear.register_fake
def _(x, qdata, scale, zero, bias, group_size, rows, columns, decode, kernels):  # type: ignore[no-untyped-def]
    register_lowerings()  # a trace may be followed by compilation
    return x.new_empty(x.shape[0], rows)


def register_gradients(operator: str, data: int, bias: int) -> None:
    """Register an operator's gradients: to its input through the dense weight, and to its bias.

    Args:
        operator: its first argument is the input.
        data: position of the argument qdata, which scale and zero follow.
        bias: position of the argument bias, which group_size, rows and columns follow.
    """

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[data : data + 3])
        ctx.layout, ctx.rest = inputs[bias + 1 : bias + 4], len(inputs) - bias - 1

    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        group_size, rows, columns = ctx.layout
        qdata, scale, zero = ctx.saved_tensors
        grad_x = grad @ dequantize(qdata, scale, zero, group_size, rows, columns, grad.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad.sum(0) if ctx.needs_input_grad[bias] else None
        return (grad_x, *[None] * (bias - 1), grad_bias, *[None] * ctx.rest)

    torch.library.register_autograd(operator, backward, setup_context=setup_context)


register_gradients("torchao_qig::linear", data=1, bias=4)


def use_decode(rows: int | torch.SymInt, most: int = DECODE_ROWS) -> bool:
    """Whether to use the decode form, which is for up to `most` rows.

    A symbolic number of rows gets a guard, except in export, which must not specialise.
    """
    if isinstance(rows, torch.SymInt) and torch.compiler.is_exporting():
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(rows <= most)
    return bool(rows <= most)
