"""The packed tensor: affine grids, packing, the tensor subclass with its ops, and its compiled linear."""

from torchao_qig.tensor import ops, products
from torchao_qig.tensor.packed import PackedIntTensor

__all__ = ["PackedIntTensor", "ops", "products"]
