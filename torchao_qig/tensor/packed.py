"""`PackedIntTensor`: a weight of 1 to 8 bit integers that an ordinary `nn.Linear` holds in place of its float weight.

Data: `qdata` (the packed words, see packing.py), `scale` and `zero_point` per group, and optionally `act_pre_scale`, by
which a linear multiplies its input first (torchao's `SupportsActivationPreScaling`: AWQ, SmoothQuant and QIG set it).
Shape and dtype are those of the dense weight: (..., rows, columns) without any padding, in the dtype of the scale.

Slices at tile borders (16 rows) and at common borders of groups and units (columns) are views. Slices elsewhere are errors.
Pickles and safetensors files carry a checksum of the data, verified when they are read.
"""

import math
import zlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchao.utils import TorchAOBaseTensor

from torchao_qig.errors import UserError
from torchao_qig.tensor import affine, linear, packing

DATA = ("qdata", "scale", "zero_point")
FLAGS = ("transposed", "int8_activations")


class PackedIntTensor(TorchAOBaseTensor):
    """Packed integer weight.

    Tensor attributes:
        qdata: int32 words, (..., bits, rows / 16, columns / 32, 16), rows and columns padded.
        scale: (..., groups, rows padded); its dtype is the tensor's.
        zero_point: uint8, in the shape of scale; the code that stands for 0.
    Non-tensor attributes:
        bits, group_size (-1: one group per row), rows, columns: the grid and the dense shape.
    Optional:
        act_pre_scale: multiplies the activation along its last dimension.
        int8_activations: whether linears round their input to int8, token by token, and multiply integers. code - zero must then
            fit 8 bits.
        transposed: whether this is the (columns, rows) view.
        layout_version: version of the packing, checked on construction.
        checksum: CRC-32 of the data, which files carry; verified on construction.
    """

    tensor_data_names: ClassVar[list[str]] = list(DATA)
    tensor_attribute_names: ClassVar[list[str]] = ["bits", "group_size", "rows", "columns"]
    optional_tensor_data_names: ClassVar[list[str]] = ["act_pre_scale"]
    optional_tensor_attribute_names: ClassVar[list[str]] = ["transposed", "int8_activations", "layout_version", "checksum"]

    def __new__(
        cls,
        qdata: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        group_size: int,
        rows: int,
        columns: int,
        act_pre_scale: Tensor | None = None,
        transposed: bool = False,
        int8_activations: bool = False,
        layout_version: int = packing.LAYOUT,
        checksum: int | None = None,
    ) -> "PackedIntTensor":
        matrix = (columns, rows) if transposed else (rows, columns)
        shape = (*qdata.shape[:-4], *matrix)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=scale.dtype, device=qdata.device, requires_grad=False)

    def __init__(
        self,
        qdata: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        bits: int,
        group_size: int,
        rows: int,
        columns: int,
        act_pre_scale: Tensor | None = None,
        transposed: bool = False,
        int8_activations: bool = False,
        layout_version: int = packing.LAYOUT,
        checksum: int | None = None,
    ) -> None:
        super().__init__()
        self.qdata, self.scale, self.zero_point, self.act_pre_scale = qdata, scale, zero_point, act_pre_scale
        self.bits, self.group_size, self.rows, self.columns = bits, group_size, rows, columns
        self.transposed, self.int8_activations = transposed, int8_activations
        _check_shapes(self, layout_version)
        if checksum is not None:
            self._verify(checksum)

    @classmethod
    def from_hp(
        cls,
        weight: Tensor,
        bits: int,
        group_size: int = 128,
        symmetric: bool = False,
        dtype: torch.dtype | None = None,
        paper_rules: bool = False,
        int8_activations: bool = False,
    ) -> "PackedIntTensor":
        """Round a dense weight (..., rows, columns) to nearest; `dtype` is that of the result (by default the weight's)."""
        affine.check_grid(bits, group_size, symmetric)
        if not weight.is_floating_point():
            raise UserError(f"weight.dtype={weight.dtype}: only floating-point weights can be quantized")
        if weight.dim() < 2 or 0 in weight.shape:
            raise UserError(f"weight.shape={tuple(weight.shape)}: need a non-empty matrix or a stack of them")
        if not weight.is_meta and not torch.isfinite(weight).all():
            raise UserError("the weight contains NaN or infinity; repair or exclude this layer")
        scale, zero = affine.choose_qparams(weight, bits, group_size, symmetric, paper_rules, dtype)
        return cls.from_codes(affine.quantize(weight, scale, zero, bits, group_size), scale, zero, bits, group_size, int8_activations)

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, group_size: int, int8_activations: bool = False) -> "PackedIntTensor":
        """Pack codes (..., rows, columns) chosen elsewhere, with scale and zero (..., rows, groups)."""
        if int8_activations and not zero.is_meta:
            _check_integers(bits, zero)
        rows, columns = codes.shape[-2:]
        stored_scale, stored_zero = (packing.pack_groups(t, group_size, columns) for t in (scale, zero.to(torch.uint8)))
        return cls(packing.pack(codes, bits), stored_scale, stored_zero, bits, group_size, rows, columns, int8_activations=int8_activations)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense weight. `act_pre_scale` is not applied, since it belongs to the activation."""
        size = self.group_size, self.rows, self.columns
        dense = linear.dequantize(self.qdata, self.scale, self.zero_point, *size, dtype or self.dtype)
        return dense.transpose(-1, -2) if self.transposed else dense

    @property
    def layout_version(self) -> int:
        return packing.LAYOUT

    @property
    def checksum(self) -> int | None:
        """CRC-32 of the data, computed at every access; None on the meta device."""
        if any(t.is_meta for t in self.data_tensors()):
            return None
        crc = 0
        for t in self.data_tensors():
            crc = zlib.crc32(t.detach().cpu().contiguous().view(torch.uint8).numpy().data, crc)
        return crc

    def data_tensors(self) -> list[Tensor]:
        """The plain tensors that hold the data."""
        tensors = [self.qdata, self.scale, self.zero_point]
        return tensors if self.act_pre_scale is None else [*tensors, self.act_pre_scale]

    def nbytes_packed(self) -> int:
        """Bytes of all data tensors, padding included."""
        return sum(t.numel() * t.element_size() for t in self.data_tensors())

    def _verify(self, checksum: int) -> None:
        if self.int8_activations:
            self.check_integers()
        actual = self.checksum
        if actual is not None and actual != checksum:
            raise UserError(f"the packed weight's data is damaged (checksum {actual:#010x}, the file says {checksum:#010x}); get the file again")

    def check_integers(self) -> None:
        """Raise if the weight's integers, code - zero, do not fit the 8 bits that products with int8 activations need."""
        if not self.qdata.is_meta:
            _check_integers(self.bits, packing.unpack_groups(self.zero_point, self.group_size, self.rows, self.columns))

    def with_data(self, fn: Callable[[Tensor], Tensor], **changes: Any) -> "PackedIntTensor":
        """The same tensor with `fn` applied to its data, and with some attributes replaced."""
        kept: dict[str, Any] = {name: changes.get(name, getattr(self, name)) for name in (*self.tensor_attribute_names, *FLAGS)}
        data: dict[str, Any] = {name: changes.get(name, getattr(self, name)) for name in (*DATA, "act_pre_scale")}
        with torch.inference_mode(False):  # a view made in inference mode must not be an inference tensor (pytorch#164872)
            data = {name: None if t is None else fn(t) for name, t in data.items()}
            return PackedIntTensor(**data, **kept)

    def flipped(self) -> "PackedIntTensor":
        """The view with rows and columns exchanged."""
        return self.with_data(lambda t: t, transposed=not self.transposed)

    # In the next three methods, torchao's base class would read `checksum` and so compute it. A tensor in memory needs none.
    def _apply_fn_to_data(self, fn: Callable[[Tensor], Tensor]) -> "PackedIntTensor":
        return self.with_data(fn)

    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        names = [*DATA] if self.act_pre_scale is None else [*DATA, "act_pre_scale"]
        return names, {name: getattr(self, name) for name in (*self.tensor_attribute_names, *FLAGS)}

    @classmethod
    def __tensor_unflatten__(cls, data: dict[str, Tensor], attributes: dict[str, Any], size: Any, stride: Any) -> "PackedIntTensor":
        return cls(**data, **attributes)

    def _stable_hash_for_caching(self) -> str:
        """The key of this tensor in AOTAutograd's cache: everything that compiled code depends on."""
        data = [(t.dtype, tuple(t.shape), t.stride(), t.device) for t in self.data_tensors()]
        return repr((type(self).__qualname__, self.__tensor_flatten__(), data, linear.KERNELS))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layout_version": packing.LAYOUT, "checksum": self.checksum}

    def _restore(self, state: dict[str, Any]) -> None:
        """`__setstate__`: what torch.load and pickle call."""
        layout_version, checksum = state.pop("layout_version", packing.LAYOUT), state.pop("checksum", None)
        torch._utils._set_obj_state(self, state)
        _check_shapes(self, layout_version)
        if checksum is not None:
            self._verify(checksum)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        activations = ", int8 activations" if self.int8_activations else ""
        group = "per row" if self.group_size == -1 else f"group {self.group_size}"
        scaled = "" if self.act_pre_scale is None else ", act_pre_scale"
        bits_per_weight = 8 * self.nbytes_packed() / math.prod(self.shape)
        return (
            f"PackedIntTensor({self.bits} bits, {group}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}{scaled}{activations},"
            f" {self.nbytes_packed():,} bytes = {bits_per_weight:.2f} bits per weight)"
        )


def _check_shapes(w: PackedIntTensor, layout_version: int) -> None:
    """Raise if the data tensors do not fit each other, so that a damaged file never becomes a wrong weight."""
    if layout_version != packing.LAYOUT:
        raise UserError(f"layout_version={layout_version}: this version reads packing layout {packing.LAYOUT}; install the torchao_qig that wrote the file")
    affine.check_grid(w.bits, w.group_size)
    tiles, units = packing.padded(w.rows, packing.TILE) // packing.TILE, packing.padded(w.columns, packing.UNIT) // packing.UNIT
    if w.qdata.dtype != torch.int32 or tuple(w.qdata.shape[-4:]) != (w.bits, tiles, units, packing.TILE):
        raise UserError(
            f"qdata: expected int32 (..., {w.bits}, {tiles}, {units}, {packing.TILE}) for {w.bits} bits and"
            f" {w.rows} x {w.columns} weights, got {w.qdata.dtype} {tuple(w.qdata.shape)}"
        )
    groups = 1 if w.group_size == -1 else -(-units * packing.UNIT // w.group_size)
    stored = (*w.qdata.shape[:-4], groups, tiles * packing.TILE)
    for name in ("scale", "zero_point"):
        if tuple(getattr(w, name).shape) != tuple(stored):
            raise UserError(f"{name}: expected shape {tuple(stored)}, got {tuple(getattr(w, name).shape)}")


def _check_integers(bits: int, zero: Tensor) -> None:
    if bits == 8 and bool((zero != 128).any()):
        raise UserError("int8_activations=True: 8-bit weights must be symmetric, since code - zero has to fit 8 bits; pass symmetric=True")


PackedIntTensor.__setstate__ = PackedIntTensor._restore  # torchao's base class sets its own when the class is made
PackedIntTensor.__module__ = "torchao_qig"  # the name in pickles: independent of where the file lies
torch.serialization.add_safe_globals([PackedIntTensor])
