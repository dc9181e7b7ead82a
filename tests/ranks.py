"""Running a function in several gloo processes."""

import os
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp


def in_ranks(function: Callable[..., None], world: int, directory: Path, *args: object) -> None:
    """Calls `function(rank, *args)` in `world` processes of one group; an error in one of them is raised here."""
    mp.spawn(_enter, (function, world, str(directory / "rendezvous"), args), nprocs=world)


def _enter(rank: int, function: Callable[..., None], world: int, file: str, args: tuple[object, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    function(rank, *args)
    dist.barrier()
    os._exit(0)  # gloo's threads may outlive the group, and tearing down the interpreter under them aborts the process now and then
