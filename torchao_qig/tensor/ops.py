"""Operations on a `PackedIntTensor` other than products: view, slice, join, move, copy. Importing this module registers them."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

from torchao_qig.errors import UserError
from torchao_qig.tensor import packing
from torchao_qig.tensor.packed import FLAGS, PackedIntTensor

aten = torch.ops.aten
implements = PackedIntTensor.implements
implements_torch_function = PackedIntTensor.implements_torch_function


# ---- views ----


def _view(fn: Callable[..., PackedIntTensor]) -> Callable[..., Any]:
    """The implementation `fn` of an op whose result shares the data of its first argument."""

    def op(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return return_and_correct_aliasing(func, args, kwargs, fn(*args, **kwargs))

    return op


def _same(t: Tensor) -> Tensor:
    return t


def _border(w: PackedIntTensor) -> int:
    """The number of columns at whose multiples a weight can be cut, between whole units and whole groups."""
    return packing.UNIT if w.group_size == -1 else math.lcm(packing.UNIT, w.group_size)


def _stored_dim(w: PackedIntTensor, dim: int) -> str | int:
    """What dimension `dim` of `w` holds: 'rows', 'columns', or the number of a batch dimension."""
    dim = dim % w.dim()
    if dim < w.dim() - 2:
        return dim
    return "rows" if (dim == w.dim() - 2) != w.transposed else "columns"


def _slice(w: PackedIntTensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> PackedIntTensor:
    size = w.shape[dim]
    start, end, step = slice(start, end, step).indices(size)
    if step != 1 or start >= end:
        raise UserError(f"slice {start}:{end}:{step} of dimension {dim}: a packed weight can be cut in steps of 1 and not to nothing")
    where = _stored_dim(w, dim)
    if (start, end) == (0, size):
        return w.with_data(_same)
    if isinstance(where, int):
        with_batch = w.act_pre_scale is not None and w.act_pre_scale.dim() == w.dim()
        pre_scale = w.act_pre_scale.narrow(where, start, end - start) if with_batch else w.act_pre_scale  # type: ignore[union-attr]
        changes = {name: getattr(w, name).narrow(where, start, end - start) for name in ("qdata", "scale", "zero_point")}
        return w.with_data(_same, **changes, act_pre_scale=pre_scale)
    border = packing.TILE if where == "rows" else _border(w)
    if start % border or (end % border and end != size):
        raise UserError(
            f"slice {start}:{end} of dimension {dim}: packed {where} can be cut at multiples of {border} only"
            f" (group_size={w.group_size}); use such a border, or dequantize() first"
        )
    if where == "rows":
        first, count = start // packing.TILE, packing.padded(end - start, packing.TILE)
        cut = {name: getattr(w, name).narrow(-1, start, count) for name in ("scale", "zero_point")}
        return w.with_data(_same, qdata=w.qdata.narrow(-3, first, count // packing.TILE), rows=end - start, **cut)
    units = packing.padded(end - start, packing.UNIT) // packing.UNIT
    cut = {"qdata": w.qdata.narrow(-2, start // packing.UNIT, units)}
    if w.group_size != -1:
        groups = -(-units * packing.UNIT // w.group_size)
        cut |= {name: getattr(w, name).narrow(-2, start // w.group_size, groups) for name in ("scale", "zero_point")}
    if w.act_pre_scale is not None:
        cut["act_pre_scale"] = w.act_pre_scale.narrow(-1, start, end - start)
    return w.with_data(_same, columns=end - start, **cut)


def _select(w: PackedIntTensor, dim: int, index: int) -> PackedIntTensor:
    where = _stored_dim(w, dim)
    if not isinstance(where, int):
        raise UserError(f"select on dimension {dim}: single {where} of a packed weight cannot be viewed; use dequantize()")
    one = _slice(w, where, index % w.shape[where], index % w.shape[where] + 1)
    pre_scale = one.act_pre_scale
    if pre_scale is not None and pre_scale.dim() == w.dim():
        pre_scale = pre_scale.select(where, 0)
    changes = {name: getattr(one, name).select(where, 0) for name in ("qdata", "scale", "zero_point")}
    return one.with_data(_same, **changes, act_pre_scale=pre_scale)


def _reshape(w: PackedIntTensor, *shape: Any) -> PackedIntTensor:
    wanted = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    if -1 in wanted:
        known = math.prod(n for n in wanted if n != -1)
        wanted[wanted.index(-1)] = w.numel() // known
    if wanted != list(w.shape):
        raise UserError(f"view {wanted}: a packed weight of shape {tuple(w.shape)} cannot change its shape; use dequantize()")
    return w.with_data(_same)


implements([aten.t.default, aten.mT.default])(_view(PackedIntTensor.flipped))
implements([aten.view.default, aten._unsafe_view.default, aten.reshape.default])(_view(_reshape))
implements(aten.slice.Tensor)(_view(_slice))
implements(aten.select.int)(_view(_select))
implements(aten.narrow.default)(_view(lambda w, dim, start, length: _slice(w, dim, start, start + length)))


@implements(aten.permute.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    w, count = args[0], args[0].dim()
    dims = [d % count for d in args[1]]
    if sorted(dims) != list(range(count)) or dims[:-2] != list(range(count - 2)):
        raise UserError(f"permute({list(args[1])}): only the last two dimensions of a packed weight can be exchanged")
    return return_and_correct_aliasing(func, args, kwargs, w.flipped() if dims[-1] < dims[-2] else w.with_data(_same))


@implements(aten.transpose.int)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> Any:
    w, a, b = args
    if {a % w.dim(), b % w.dim()} != {w.dim() - 2, w.dim() - 1} and a % w.dim() != b % w.dim():
        raise UserError(f"transpose({a}, {b}): only the last two dimensions of a packed weight can be exchanged")
    result = w.with_data(_same) if a % w.dim() == b % w.dim() else w.flipped()
    return return_and_correct_aliasing(func, args, kwargs, result)


@implements([aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default])
def _(func: Any, types: Any, args: Any, kwargs: Any) -> list[PackedIntTensor]:
    w, pieces, dim = (*args, *kwargs.values(), 0)[:3]
    size = w.shape[dim]
    if func is aten.split_with_sizes.default:
        sizes = list(pieces)
    else:
        length = -(-size // pieces) if func is aten.chunk.default else pieces
        sizes = [min(length, size - start) for start in range(0, size, length)]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [aten.slice.Tensor(w, dim, start, start + n) for start, n in zip(starts, sizes, strict=True)]


@implements(aten.unbind.int)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> list[PackedIntTensor]:
    w, dim = (*args, *kwargs.values(), 0)[:2]
    return [aten.select.int(w, dim, i) for i in range(w.shape[dim])]


# ---- joins ----


def _alike(tensors: Sequence[PackedIntTensor], names: Sequence[str], op: str) -> None:
    """Raise if the tensors differ in one of the attributes `names`."""
    for t in tensors[1:]:
        for name in names:
            if getattr(t, name) != getattr(tensors[0], name):
                raise UserError(f"{op}: {name} differs: {getattr(tensors[0], name)} and {getattr(t, name)}")


def _common(tensors: Sequence[PackedIntTensor], name: str, op: str) -> Tensor | None:
    """The value of the tensor attribute `name`, which must be equal in all `tensors`; raises if it is not."""
    values = [getattr(t, name) for t in tensors]
    if any((v is None) != (values[0] is None) for v in values) or (values[0] is not None and any(not torch.equal(v, values[0]) for v in values)):
        raise UserError(f"{op}: the tensors have different {name}; join them after dequantize()")
    return values[0]


@implements(aten.cat.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> PackedIntTensor:
    tensors, dim = (*args, *kwargs.values(), 0)[:2]
    if not all(isinstance(t, PackedIntTensor) for t in tensors):
        raise UserError("cat: packed weights can only be joined with packed weights; dequantize() first")
    first = tensors[0]
    _alike(tensors, ("bits", "group_size", *FLAGS, "dtype"), "cat")
    where = _stored_dim(first, dim)
    names = ("qdata", "scale", "zero_point")
    if isinstance(where, int):
        _alike(tensors, ("rows", "columns"), "cat")
        joined = {name: torch.cat([getattr(t, name) for t in tensors], where) for name in names}
        return first.with_data(_same, **joined, act_pre_scale=_common(tensors, "act_pre_scale", "cat"))
    _alike(tensors, ("columns" if where == "rows" else "rows",), "cat")
    border, sizes = packing.TILE if where == "rows" else _border(first), [t.shape[dim] for t in tensors]
    if any(n % border for n in sizes[:-1]):
        raise UserError(f"cat: {where} {sizes}: all but the last must be multiples of {border} (group_size={first.group_size})")
    if where == "rows":
        joined = {name: torch.cat([getattr(t, name) for t in tensors], -3 if name == "qdata" else -1) for name in names}
        return first.with_data(_same, **joined, rows=sum(sizes), act_pre_scale=_common(tensors, "act_pre_scale", "cat"))
    joined = {"qdata": torch.cat([t.qdata for t in tensors], -2)}
    for name in ("scale", "zero_point"):
        joined[name] = _common(tensors, name, "cat") if first.group_size == -1 else torch.cat([getattr(t, name) for t in tensors], -2)
    if any(t.act_pre_scale is not None for t in tensors):
        ones = [torch.ones(t.columns, dtype=t.dtype, device=t.device) if t.act_pre_scale is None else t.act_pre_scale for t in tensors]
        joined["act_pre_scale"] = torch.cat(ones, -1)
    return first.with_data(_same, **joined, columns=sum(sizes))


@implements(aten.stack.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> PackedIntTensor:
    tensors, dim = (*args, *kwargs.values(), 0)[:2]
    if not all(isinstance(t, PackedIntTensor) for t in tensors) or not 0 <= dim <= tensors[0].dim() - 2:
        raise UserError(f"stack: packed weights can be stacked with each other in front of rows and columns; got dim={dim}")
    _alike(tensors, ("bits", "group_size", *FLAGS, "dtype", "shape"), "stack")
    joined = {name: torch.stack([getattr(t, name) for t in tensors], dim) for name in ("qdata", "scale", "zero_point")}
    return tensors[0].with_data(_same, **joined, act_pre_scale=_common(tensors, "act_pre_scale", "stack"))


# ---- copies and moves ----


def _cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    if not dtype.is_floating_point:
        raise UserError(f"to({dtype}): a packed weight takes a floating-point dtype, that of its scale")
    return lambda t: t.to(dtype) if t.is_floating_point() else t


@implements(aten._to_copy.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> PackedIntTensor:
    w = args[0]
    to = w._get_to_kwargs(*args[1:], **{k: v for k, v in kwargs.items() if k not in ("layout", "pin_memory", "memory_format")})
    cast = _cast(to["dtype"])
    # copy=True: a view of a larger weight must neither keep the rest of it alive nor share memory with it
    return w.with_data(lambda t: cast(t).to(to["device"], non_blocking=to["non_blocking"], copy=True))


@implements(aten.empty_like.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> PackedIntTensor:
    cast = _cast(kwargs.get("dtype") or args[0].dtype)
    return args[0].with_data(lambda t: torch.empty_like(cast(t), device=kwargs.get("device"), pin_memory=bool(kwargs.get("pin_memory"))))


@implements(aten.copy_.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> PackedIntTensor:
    w, source = args[:2]
    if not isinstance(w, PackedIntTensor):
        raise UserError("copy_: cannot copy a packed weight into a float tensor; dequantize() it first")
    if not isinstance(source, PackedIntTensor):
        raise UserError("copy_: cannot copy a float tensor into a packed weight; quantize it first, or load with assign=True")
    for name in (*w.tensor_attribute_names, *FLAGS, "shape"):
        if getattr(w, name) != getattr(source, name):
            raise UserError(f"copy_: {name} differs: {getattr(w, name)} here, {getattr(source, name)} in the source")
    if (w.act_pre_scale is None) != (source.act_pre_scale is None):
        raise UserError("copy_: act_pre_scale exists on one side only")
    for mine, other in zip(w.data_tensors(), source.data_tensors(), strict=True):
        mine.copy_(other)
    return w


@implements(aten.equal.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    a, b = args
    if not (isinstance(a, PackedIntTensor) and isinstance(b, PackedIntTensor)) or a.__tensor_flatten__() != b.__tensor_flatten__():
        return False
    return all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a.data_tensors(), b.data_tensors(), strict=True))


@implements(aten.is_pinned.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    return all(t.is_pinned() for t in args[0].data_tensors())


@implements(aten._pin_memory.default)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> PackedIntTensor:
    return args[0].with_data(lambda t: t.pin_memory())


@implements_torch_function(torch.Tensor.share_memory_)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> PackedIntTensor:
    for t in args[0].data_tensors():
        t.share_memory_()
    return args[0]


@implements_torch_function(torch.Tensor.is_shared)
def _(func: Any, types: Any, args: Any, kwargs: Any) -> bool:
    return all(t.is_shared() for t in args[0].data_tensors())
