"""The linears of a block, rounded to nearest with or without a scale: methods compare with them, and try candidate scales with them."""

import torch.nn.functional as F
from torch import Tensor

from torchao_qig.formats.base import Product
from torchao_qig.methods.draft import Draft
from torchao_qig.watch.block import Block


class NearestLinears:
    """Rounds the block's weights to nearest, with or without a scale. Results without a scale are kept for the next call."""

    def __init__(self, block: Block, draft: Draft) -> None:
        self.block, self.draft = block, draft
        self._weights: dict[str, Tensor] = {}
        self._products: dict[str, Product] = {}

    def weight(self, name: str, scale: Tensor | None = None) -> Tensor:
        """A linear's rounded weight. Without `scale` it has the dtype of the computation.

        With `scale` the weight is multiplied by it, rounded, and divided by it again; the result has at least float32.
        """
        round_it = self.draft.forms[name].rounder(self.draft.weight_dtype(name))
        if scale is not None:
            return round_it(self.block.weight(name), scale)
        if name not in self._weights:
            self._weights[name] = round_it(self.block.weight(name), None).to(self.block.dtype)
        return self._weights[name]

    def linear(self, name: str, scale: Tensor | None = None) -> Product:
        """A function that computes what the rounded linear does, with its bias. It rounds its input where the linear's form says so."""
        if scale is None and name in self._products:
            return self._products[name]
        product = self.draft.forms[name].product(self.draft.weight_dtype(name))(self.block.weight(name), scale)
        bias = self.block.bias(name)
        made = product if bias is None else lambda x: product(x) + bias
        if scale is None:
            self._products[name] = made
        return made

    def exact(self, name: str, x: Tensor) -> Tensor:
        """The output of the linear with its own, unrounded weight."""
        return F.linear(x, self.block.weight(name).to(self.block.dtype), self.block.bias(name))
