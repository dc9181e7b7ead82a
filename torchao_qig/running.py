"""`Running`: options of how a calibration is computed. None of them says what is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from torchao_qig.errors import UserError, check_count

DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def check_dtype(name: str, dtype: object) -> None:
    """Raise unless `dtype` is None or a floating-point dtype that models have."""
    if dtype not in DTYPES:
        raise UserError(f"{name}={dtype!r}: pass torch.float32, torch.bfloat16, torch.float16 or None")


@dataclass(frozen=True)
class Running:
    """Options of a run that are rarely needed.

    Args:
        model: the model that the batches are for, where `quantize_` is given only a part of it.
        compute_dtype: the dtype of gradients and losses. None: float32 with int8 activations, with the published sum over points, and with `paper_rules`;
            otherwise bfloat16 where the device has fast bfloat16 matrix units, else float32.
        micro_batch: samples computed at once; None: as many as make about 1024 tokens on the CPU, or 8192 on other devices.
        max_host_memory: bytes of captured activations kept in memory; further ones go to temporary files. None: no limit.
    """

    model: Any = field(default=None, repr=False, compare=False)
    compute_dtype: torch.dtype | None = None
    micro_batch: int | None = None
    max_host_memory: int | None = None

    def __post_init__(self) -> None:
        check_dtype("compute_dtype", self.compute_dtype)
        check_count("micro_batch", self.micro_batch, 1, optional=True)
        check_count("max_host_memory", self.max_host_memory, 0, optional=True)
