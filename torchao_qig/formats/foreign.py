"""Any torchao config as a format. torchao rounds the weight and makes its tensor; calibration cannot choose the codes."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.core.config import AOBaseConfig

from torchao_qig._compat import quantized_weight
from torchao_qig.formats.activations import Activations
from torchao_qig.formats.base import Format, Product


@dataclass(frozen=True)
class Foreign(Format):
    """The format that `quantize_(model, config)` gives a weight."""

    config: AOBaseConfig

    def describe(self) -> list[Any]:
        return [repr(self.config)]

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        sample = min(rows, 64)  # rows are stored alike
        return sum(t.nbytes for t in _plain_tensors(quantized_weight(torch.zeros(sample, columns, dtype=dtype), self.config))) * rows // sample

    def rounded(self, weight: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        values = dense(self.stored(weight if scale is None else weight * scale, dtype)).to(weight.dtype)
        return values if scale is None else values / scale

    def stored(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return quantized_weight(weight.to(dtype), self.config)

    def product(self, weight: Tensor, dtype: torch.dtype, activations: Activations, scale: Tensor | None = None) -> Product:
        if not activations.rounds:
            return super().product(weight, dtype, activations, scale)
        stored = self.stored(weight if scale is None else weight * scale, dtype)  # its product rounds the input itself
        return lambda x: F.linear((x if scale is None else x / scale).to(dtype), stored).to(x.dtype)


def dense(weight: Tensor) -> Tensor:
    """The weight that a quantized tensor of any kind stands for."""
    if hasattr(weight, "dequantize") and type(weight) is not Tensor:
        try:
            return weight.dequantize()
        except (NotImplementedError, RuntimeError):
            pass  # some of torchao's tensors cannot: multiply by the identity matrix instead
    return F.linear(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device), weight).T


def _plain_tensors(weight: Tensor) -> list[Tensor]:
    """The tensors that a tensor subclass consists of."""
    if type(weight) in (Tensor, torch.nn.Parameter):
        return [weight]
    return [t for name in weight.__tensor_flatten__()[0] for t in _plain_tensors(getattr(weight, name))]
