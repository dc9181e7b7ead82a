"""How a quantized linear rounds its input before it multiplies."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from torchao_qig.tensor import PackedIntTensor, affine

INT8 = "int8 activations"  # marks the description of a linear or of its weight


class Activations(ABC):
    """How inputs are rounded. A subclass is a frozen dataclass of its settings."""

    rounds = True  # whether inputs change at all

    @abstractmethod
    def describe(self) -> list[Any]:
        """The settings, as JSON can hold them."""

    @abstractmethod
    def fake(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The input as the product sees it: rounded, in its own dtype. With `scale` (K,) it is divided by that, rounded, and multiplied by it again."""

    @abstractmethod
    def marked(self, weight: Tensor) -> Tensor:
        """The packed weight, marked so that its linear rounds its input in this way."""


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
    """Every token is rounded to int8 with a scale of its own, so that linears multiply integers. `paper_rules`: the smallest scale is the published one."""

    paper_rules: bool = False

    def describe(self) -> list[Any]:
        return [INT8]

    def fake(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        return affine.fake_quantize_rows(x, scale, self.paper_rules)

    def marked(self, weight: Tensor) -> Tensor:
        if isinstance(weight, PackedIntTensor) and weight.dim() == 2:  # not stacks of experts, which other products multiply
            weight.check_integers()
            weight.int8_activations = True
        return weight  # torchao's own tensors need no mark
