"""Data-parallel calibration: each rank has some of the batches; sums and decisions are made together."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """Number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this rank, from 0."""
    return dist.get_rank() if world() > 1 else 0


def splits(loader: object) -> bool:
    """Whether calibration has to divide the loader's batches among the ranks. A DistributedSampler has done so already."""
    return world() > 1 and not isinstance(getattr(loader, "sampler", None), torch.utils.data.distributed.DistributedSampler)


def _device() -> torch.device:
    """The device that the backend of torch.distributed communicates from."""
    if dist.get_backend() == "gloo":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def summed(t: Tensor) -> Tensor:
    """The sum of `t` over all ranks: added up in float64, returned in the dtype of `t`."""
    if world() == 1:
        return t
    moved = t.to(_device(), torch.float64)
    dist.all_reduce(moved)
    return moved.to(t.device, t.dtype)


def all_agree(yes: bool) -> bool:
    """Whether `yes` is true on every rank."""
    return yes if world() == 1 else bool(summed(torch.tensor(float(yes), dtype=torch.float64)) == world())


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in the order of the ranks."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value)
    return values
