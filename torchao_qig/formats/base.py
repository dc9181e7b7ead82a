"""The protocol of a stored form.

A weight is an (N, K) matrix: N output features (rows), K input features (columns). Every method below works on rows that do not depend on each other.

- `Format` is all that rounding to nearest needs. Any config of torchao's is one (`foreign.py`).
- `CodedFormat` is for formats of ours, whose codes calibration may choose. It splits "round this weight" into the parts that compensated rounding needs:
  parameters (`fit`), codes of some columns under given parameters (`nearest`), better parameters for given codes (`refit`), and the packed tensor (`pack`).

    params = fmt.fit(weight, dtype)                          scales, zero points, tables: chosen once per weight
    codes, values = fmt.nearest(weight, fmt.spread(params, K, weight.dtype))
    values == fmt.dense(codes, params, weight.dtype)         the same numbers, bit for bit ...
    values == fmt.pack(codes, params).dequantize(weight.dtype)    ... as the packed tensor gives back
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchao_qig.formats.activations import Activations, Float

Params = tuple[Tensor, ...]  # parameters of a weight, each with one entry per row in its first dimension
Product = Callable[[Tensor], Tensor]
FLOAT = Float()


class Format(ABC):
    """How a weight is stored. A subclass is a frozen dataclass of its settings."""

    @abstractmethod
    def describe(self) -> list[Any]:
        """The settings as JSON. Two formats that describe themselves alike store the same."""

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a weight of this shape cannot be stored in this format; None if it can."""
        return None

    @abstractmethod
    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        """Bytes of a stored weight, with all of its parameters; `dtype` is that of its scales."""

    @abstractmethod
    def rounded(self, weight: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        """The weight as it comes back when it is rounded to nearest, in its own dtype.

        Args:
            weight: (N, K), floating point.
            dtype: of the stored scales.
            scale: (K,), or None: the weight is multiplied by this, rounded, and divided by it again.
        """

    @abstractmethod
    def stored(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight rounded to nearest, as the tensor that a linear holds."""

    def product(self, weight: Tensor, dtype: torch.dtype, activations: Activations, scale: Tensor | None = None) -> Product:
        """A function that computes what a linear with the weight rounded to nearest does, without a bias.

        With `scale`, weight * scale is rounded, and the input is divided by `scale` before it is rounded.
        """
        values = self.rounded(weight, dtype, scale)
        return lambda x: F.linear(activations.fake(x, scale), values.to(x.dtype))


class CodedFormat(Format):
    """A format whose codes calibration chooses."""

    @abstractmethod
    def fit(self, weight: Tensor, dtype: torch.dtype, gram: Tensor | None = None) -> Params:
        """Choose parameters for a weight. With the Gram matrix of its inputs, (K, K), they are chosen for a small squared error of its outputs."""

    @abstractmethod
    def spread(self, params: Params, columns: int, dtype: torch.dtype) -> Params:
        """Expand the parameters to one entry per column, (N, K), in `dtype`. Columns may then be rounded in any order."""

    @abstractmethod
    def nearest(self, target: Tensor, spread: Params) -> tuple[Tensor, Tensor]:
        """Round columns of a weight to the nearest values that can be stored. Returns codes and values, both shaped like `target`.

        Args:
            target: (N, any number of columns).
            spread: the same columns of the spread parameters.
        """

    def refit(self, weight: Tensor, codes: Tensor, params: Params, gram: Tensor) -> Params:
        """Parameters that give a smaller error with these codes; a format that cannot find any returns `params`."""
        return params

    @abstractmethod
    def dense(self, codes: Tensor, params: Params, dtype: torch.dtype) -> Tensor:
        """The values that codes stand for."""

    @abstractmethod
    def pack(self, codes: Tensor, params: Params) -> Tensor:
        """The tensor that a linear holds."""

    def rounded(self, weight: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        w = weight.to(torch.promote_types(weight.dtype, torch.float32))
        w = w if scale is None else w * scale
        values = self.nearest(w, self.spread(self.fit(w, dtype), w.shape[-1], w.dtype))[1]
        return (values if scale is None else values / scale).to(weight.dtype)

    def stored(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        w = weight.to(torch.promote_types(weight.dtype, torch.float32))
        params = self.fit(w, dtype)
        return self.pack(self.nearest(w, self.spread(params, w.shape[-1], w.dtype))[0], params)


@dataclass(frozen=True)
class LinearForm:
    """How a linear is quantized: the format of its weight, the rounding of its input, and the dtype of its scales (None: the weight's)."""

    format: Format
    activations: Activations = FLOAT
    dtype: torch.dtype | None = None

    def describe(self) -> list[Any]:
        """The format and the activations, as JSON can hold them."""
        return [*self.format.describe(), *self.activations.describe()]

    def scale_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype of the scales of a weight."""
        return self.dtype or weight_dtype

    def rounder(self, weight_dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Tensor]:
        """A function of a weight and a scale (or None): weight * scale is rounded to nearest, and divided by scale again."""
        return lambda weight, scale: self.format.rounded(weight, self.scale_dtype(weight_dtype), scale)

    def product(self, weight_dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], Product]:
        """A function of a weight and a scale (or None), which returns a function that computes what the rounded linear does, without a bias."""
        return lambda weight, scale: self.format.product(weight, self.scale_dtype(weight_dtype), self.activations, scale)

    def stored(self, weight: Tensor, weight_dtype: torch.dtype) -> Tensor:
        """The weight rounded to nearest, as the tensor that a linear of the model holds."""
        return self.activations.marked(self.format.stored(weight, self.scale_dtype(weight_dtype)))


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """(N,): d H d^T of every row, the squared error of its outputs under the Gram matrix H of the inputs."""
    return ((difference @ gram) * difference).sum(-1)
