"""The linear whose product is one of integers: `torch.ops.torchao_qig.int8_linear`, codes of activations times codes of weights.

    y[m, n] = x_scale[m] * sum over groups g of scale[n, g] * (sum over g's columns of x_codes[m, k] * (code[n, k] - zero[n, g])) + bias[n]

The inner sum is exact: int32 holds it for every K up to 2**17. Eager mode takes the codes out of their words and multiplies with
`torch._int_mm`, the reference. Under `torch.compile`, `lowering.py`:

- decode (few rows): one kernel that reads the packed words; codes are multiplied in float32, where products and sums of 64 of them
  are exact integers, and added up in int32,
- prefill (many rows): the weight's codes as int8, a slice at a time, for the matmul library (`_int_mm`: VNNI, AMX, tensor cores).

Some CPUs' `_int_mm` clips sums of two products of wide codes (oneDNN without VNNI instructions); these are multiplied in halves there
(`in_halves`). Activations are rounded by ordinary torch operations before the operator (`affine.quantize_rows`), which the compiler
fuses with what makes them. Gradients flow to the input as if nothing had been rounded.
"""

import torch
from torch import Tensor

from torchao_qig.tensor import affine, packing
from torchao_qig.tensor.linear import KERNELS, register_gradients, register_lowerings, use_decode
from torchao_qig.tensor.lowering import MIN_ROWS_INT_MM

DECODE_ROWS = 16  # up to here the decode form is faster on a CPU (benchmarks/kernels.py); CUDA's _int_mm takes no fewer


def _largest_sum() -> int:
    """What `_int_mm` on this CPU makes of 256 largest products."""
    return int(torch._int_mm(torch.full((32, 256), 127, dtype=torch.int8), torch.full((256, 32), 127, dtype=torch.int8)).min())


CLIPS = _largest_sum() != 127 * 127 * 256  # looked at here, since compilers trace what is called later


def in_halves(bits: int, device: torch.device) -> bool:
    """Whether a weight's integers have to be multiplied in two halves."""
    return bits > 6 and device.type == "cpu" and CLIPS


def integer_weight(qdata: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """code - zero in int8, padded rows and columns included."""
    rows, columns = qdata.shape[-3] * packing.TILE, qdata.shape[-2] * packing.UNIT
    codes = packing.unpack(qdata, rows, columns).to(torch.int16)
    width = columns if group_size == -1 else group_size
    return (codes - zero.to(torch.int16).transpose(-1, -2).repeat_interleave(width, -1)[..., :columns]).to(torch.int8)


def _int_mm(x: Tensor, w: Tensor) -> Tensor:
    """x (M, K) times w (N, K) transposed, int8 to int32, for any M."""
    m = x.shape[0]
    if m == 0 or (x.device.type != "cpu" and m < MIN_ROWS_INT_MM):
        x = torch.nn.functional.pad(x, (0, 0, 0, MIN_ROWS_INT_MM - m))
    return torch._int_mm(x, w.t())[:m]


def _product(x: Tensor, w: Tensor, halves: bool) -> Tensor:
    """The same; `halves`: as 16 * (w >> 4) + (w & 15)."""
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
    """x (M, columns), rounded to `codes` and `x_scale`; x itself only lends its dtype and takes the gradient."""
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
    """Round the activations x (M, columns), and multiply."""
    codes, x_scale = affine.quantize_rows(x.detach())
    how = use_decode(x.shape[0], DECODE_ROWS), in_halves(qdata.shape[-4], x.device), KERNELS
    return torch.ops.torchao_qig.int8_linear(x, codes, x_scale, qdata, scale, zero, bias, group_size, rows, columns, *how)
