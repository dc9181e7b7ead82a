"""The configs that `torchao.quantize_` takes: data and validation, nothing else; workflow.py says what they do."""

from dataclasses import dataclass

import torch
from torchao.core.config import AOBaseConfig

from torchao_qig._compat import AnnouncedConfig, QuantizeCall
from torchao_qig.tensor.affine import check_grid


@dataclass
class PackedIntWeightOnlyConfig(AOBaseConfig, metaclass=AnnouncedConfig):
    """Round the weights of linears to nearest, `bits` bits each, and pack them. No calibration.

    `quantize_(model, PackedIntWeightOnlyConfig(bits=3))` on its own, or as `base_config` of torchao's AWQ and SmoothQuant.

    Args:
        bits: 1 to 8.
        group_size: weights per scale along the input features: a multiple of 16, or -1 for one scale per row.
        symmetric: a grid centred on zero instead of one that spans each group's range; needs at least 2 bits.
        dtype: floating-point dtype of the scales, and so of the weight; None keeps the weight's.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    dtype: torch.dtype | None = None
    version: int = 1

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size, self.symmetric)
        if self.dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype={self.dtype!r}: pass torch.float32, torch.bfloat16, torch.float16 or None")

    @staticmethod
    def announce(call: QuantizeCall) -> None:
        from torchao_qig.workflow import check_assignments

        check_assignments(call)
