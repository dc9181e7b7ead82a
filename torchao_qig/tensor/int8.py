"""The linear that multiplies integers: `torch.ops.torchao_qig.int8_linear` multiplies codes of activations by codes of weights.

    y[m, n] = x_scale[m] * sum over groups g of scale[n, g] * (sum over g's columns of x_codes[m, k] * (code[n, k] - zero[n, g])) + bias[n]

The inner sum is exact: int32 holds it for every K up to 2**17. Eager mode is the reference: it unpacks the codes and multiplies them
with `torch._int_mm`. Under `torch.compile` the operator is lowered by `lowering.py`:

- decode (few rows): one kernel that reads the packed words. It multiplies the codes in float32, where the sum of 64 products is an
  exact integer, and adds these sums in int32.
- prefill (many rows): the weight is unpacked to int8 codes, a slice at a time, for the matmul library (`_int_mm`: VNNI, AMX, tensor cores).

On CPUs without VNNI instructions, oneDNN's `_int_mm` clips the sum of two products of wide codes. There the weight is multiplied in
two halves (`in_halves`). Ordinary torch operations round the activations before the operator (`affine.quantize_rows`), and the compiler
fuses these operations with those that compute the activations. Gradients flow to the input as if nothing had been rounded.
"""

import torch
from torch import Tensor

from torchao_qig.tensor import affine, packing
from torchao_qig.tensor.linear import KERNELS, register_gradients, register_lowerings, use_decode
from torchao_qig.tensor.lowering import MIN_ROWS_INT_MM

DECODE_ROWS = 16  # up to this many rows the decode form is faster on a CPU (benchmarks/kernels.py); CUDA's _int_mm needs more rows


def _largest_sum() -> int:
    """The sum of 256 products 127 * 127 as this CPU's `_int_mm` computes it."""
    return int(torch._int_mm(torch.full((32, 256), 127, dtype=torch.int8), torch.full((256, 32), 127, dtype=torch.int8)).min())


CLIPS = _largest_sum() != 127 * 127 * 256  # computed on import, since a compiler would trace a later call


def in_halves(bits: int, device: torch.device) -> bool:
    """Whether a weight's integers have to be multiplied in two halves, because `_int_mm` would clip their sums."""
    return bits > 6 and device.type == "cpu" and CLIPS


def integer_weight(qdata: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """The weight's integers, code - zero, in int8. The padded rows and columns are included."""
    rows, columns = qdata.shape[-3] * packing.TILE, qdata.shape[-2] * packing.UNIT
    codes = packing.unpack(qdata, rows, columns).to(torch.int16)
    width = columns if group_size == -1 else group_size
    return (codes - zero.to(torch.int16).transpose(-1, -2).repeat_interleave(width, -1)[..., :columns]).to(torch.int8)


def _int_mm(x: Tensor, w: Tensor) -> Tensor:
    """x (M, K) times w (N, K) transposed, int8 to int32. Pads x if `torch._int_mm` does not take so few rows."""
    m = x.shape[0]
    if m == 0 or (x.device.type != "cpu" and m < MIN_ROWS_INT_MM):
        x = torch.nn.functional.pad(x, (0, 0, 0, MIN_ROWS_INT_MM - m))
    return torch._int_mm(x, w.t())[:m]


def _product(x: Tensor, w: Tensor, halves: bool) -> Tensor:
    """x times w transposed. With `halves`, w is split into 16 * (w >> 4) + (w & 15), and each part is multiplied separately."""
    return _int_mm(x, w >> 4) * 16 + _int_mm(x, w & 15) if halves else _int_mm(x, w)


@torch.library.custom_op("torchao_qig::int8_linear", mutates_args=())
def int8_linear(
    x: Tensor,
    codes: Tensor,
    x_scale: Tensor,
    qdata: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    group_size: int,
    rows: int,
    columns: int,
    decode: bool,
    halves: bool,
    kernels: int,
) -> Tensor:
    """Multiply x (M, columns), given rounded as `codes` and `x_scale`, by the packed weight.

    x itself only determines the dtype of the result and receives the gradient.
    """
    weight = integer_weight(qdata, zero, group_size)
    codes = torch.nn.functional.pad(codes, (0, weight.shape[1] - columns))
    width = weight.shape[1] if group_size == -1 else group_size
    y = torch.zeros((), dtype=x_scale.dtype, device=x.device)
    for group, start in enumerate(range(0, columns, width)):
        product = _product(codes[:, start : start + width].contiguous(), weight[:, start : start + width], halves)
        y = y + product.to(x_scale.dtype) * scale[group].to(x_scale.dtype)
    y = (y * x_scale)[:, :rows]
    return (y if bias is None else y + bias).to(x.dtype)


@int8_linear.register_fake
def _(x, codes, x_scale, qdata, scale, zero, bias, group_size, rows, columns, decode, halves, kernels):  # type: ignore[no-untyped-def]
    register_lowerings()
    return x.new_empty(x.shape[0], rows)


register_gradients("torchao_qig::int8_linear", data=3, bias=6)


def apply(x: Tensor, qdata: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int, rows: int, columns: int) -> Tensor:
    """Round the activations x (M, columns) to int8 and multiply them by the packed weight."""
    codes, x_scale = affine.quantize_rows(x.detach())
    how = use_decode(x.shape[0], DECODE_ROWS), in_halves(qdata.shape[-4], x.device), KERNELS
    return torch.ops.torchao_qig.int8_linear(x, codes, x_scale, qdata, scale, zero, bias, group_size, rows, columns, *how)
