"""Products with a `PackedIntTensor`: `F.linear` and the matmuls that compute the same. Importing this module registers them.

These products round activations to int8 if the weight has `int8_activations`. All other products use the dequantized weight.
"""

from typing import Any

import torch
from torch import Tensor

from torchao_qig.errors import UserError
from torchao_qig.tensor import int8, linear
from torchao_qig.tensor.packed import PackedIntTensor

aten = torch.ops.aten
implements = PackedIntTensor.implements
implements_torch_function = PackedIntTensor.implements_torch_function


def apply_linear(x: Tensor, w: PackedIntTensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with a packed weight, for any leading shape of x."""
    if w.dim() != 2 or w.transposed:
        raise UserError(f"linear: need a (rows, columns) weight, got shape {tuple(w.shape)}, transposed={w.transposed}; select one matrix first")
    if x.dim() < 1 or x.shape[-1] != w.columns:
        raise UserError(f"linear: input of shape {tuple(x.shape)} does not end in the weight's {w.columns} columns")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if w.act_pre_scale is not None:
        x = x * w.act_pre_scale.to(x.dtype)
    flat = x.reshape(-1, w.columns)
    bias = None if bias is None else bias.to(x.dtype)
    if w.int8_activations:
        return int8.apply(flat, w.qdata, w.scale, w.zero_point, bias, w.group_size, w.rows, w.columns).reshape(*x.shape[:-1], w.rows)
    decode = linear.use_decode(flat.shape[0])
    y = torch.ops.torchao_qig.linear(flat, w.qdata, w.scale, w.zero_point, bias, w.group_size, w.rows, w.columns, decode, linear.KERNELS)
    return y.reshape(*x.shape[:-1], w.rows)


def _effective(w: Tensor) -> Tensor:
    """The dense matrix that a linear with `w` multiplies by, `act_pre_scale` included. A plain tensor is returned as it is."""
    if not isinstance(w, PackedIntTensor):
        return w
    dense = w.dequantize()
    if w.act_pre_scale is None:
        return dense
    return dense * (w.act_pre_scale.unsqueeze(-1) if w.transposed else w.act_pre_scale)


@implements(aten.linear.default)
@implements_torch_function(torch.nn.functional.linear)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    x, w, bias = (*args, *(kwargs[k] for k in ("input", "weight", "bias") if k in kwargs), None)[:3]
    if not isinstance(w, PackedIntTensor):
        return torch.nn.functional.linear(_effective(x), w, bias)
    return apply_linear(x, w, bias)


@implements(aten._grouped_mm.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    """The product of mixtures of experts: transformers multiplies by the weights of all experts at once."""
    return func(_effective(args[0]), _effective(args[1]), *args[2:], **kwargs)


@implements([aten.mm.default, aten.matmul.default, aten.bmm.default])
@implements_torch_function([torch.matmul, torch.Tensor.matmul])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    a, b = args
    if isinstance(b, PackedIntTensor) and b.dim() == 2 and b.transposed and not isinstance(a, PackedIntTensor):
        return apply_linear(a, b.flipped())
    return func(_effective(a), _effective(b))


@implements(aten.addmm.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Tensor:
    bias, a, b = args
    if not kwargs and isinstance(b, PackedIntTensor) and b.transposed and not isinstance(a, PackedIntTensor) and bias.dim() == 1:
        return apply_linear(a, b.flipped(), bias)
    return func(bias, _effective(a), _effective(b), **kwargs)
