"""Data-parallel calibration: each rank has some of the batches; sums and decisions are made together."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world() > 1 else 0


def splits(loader: object) -> bool:
    """Whether we are the ones to split the batches (a DistributedSampler has done it already)."""
    return world() > 1 and not isinstance(getattr(loader, "sampler", None), torch.utils.data.distributed.DistributedSampler)


def _device() -> torch.device:
    """Where the backend wants its tensors."""
    if dist.get_backend() == "gloo":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def summed(t: Tensor) -> Tensor:
    """Sum over ranks, in float64."""
    if world() == 1:
        return t
    moved = t.to(_device(), torch.float64)
    dist.all_reduce(moved)
    return moved.to(t.device, t.dtype)


def all_agree(yes: bool) -> bool:
    return yes if world() == 1 else bool(summed(torch.tensor(float(yes), dtype=torch.float64)) == world())


def gathered(value: Any) -> list[Any]:
    """Everybody's value, by rank."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values
