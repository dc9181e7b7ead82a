"""What a quantized linear does to its input before it multiplies."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchao_qig.tensor import PackedIntTensor, affine

INT8 = "int8 activations"  # in what describes a linear or its weight


class Activations(ABC):
    """How inputs are rounded. A subclass is a frozen dataclass of its settings."""

    rounds = True  # whether inputs change at all

    @abstractmethod
    def describe(self) -> list[Any]:
        """As JSON."""

    @abstractmethod
    def fake(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The input as the product sees it, in its own dtype. With `scale` (K,) it is divided by that, rounded, and multiplied again."""

    @abstractmethod
    def marked(self, weight: Tensor) -> Tensor:
        """A packed weight that knows that its linear does so."""


@dataclass(frozen=True)
class Float(Activations):
    """Inputs stay as they are."""

    rounds = False

    def describe(self) -> list[Any]:
        return []

    def fake(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return x

    def marked(self, weight: Tensor) -> Tensor:
        return weight


@dataclass(frozen=True)
class Int8PerToken(Activations):
    """Every token is rounded to int8 with a scale of its own, so that linears multiply integers. `official`: with the published code's floor."""

    official: bool = False

    def describe(self) -> list[Any]:
        return [INT8]

    def fake(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return affine.fake_quantize_rows(x, scale, self.official)

    def marked(self, weight: Tensor) -> Tensor:
        if isinstance(weight, PackedIntTensor) and weight.dim() == 2:  # stacks of experts are multiplied by other products
            weight.check_integers()
            weight.int8_activations = True
        return weight  # torchao's own tensors know it already
