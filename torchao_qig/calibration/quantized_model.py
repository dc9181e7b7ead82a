"""Run a model with its calibrated blocks quantized, while the model itself is still unchanged."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchao_qig.calibration.result import Calibration
from torchao_qig.formats import LinearForm
from torchao_qig.methods.draft import Draft
from torchao_qig.watch.observer import patched, replica


@contextmanager
def running_quantized(root: nn.Module, blocks: dict[str, dict[str, LinearForm]], found: Calibration) -> Iterator[None]:
    """Inside the `with` block, the model runs with these blocks quantized as calibrated.

    Each quantized block is made when it runs, so that no two exist at once. `blocks`: per block, what its linears become, by their names in it.
    """
    modules = {name: root.get_submodule(name) for name in blocks}
    plain = {name: replica(module, device_of(module)) for name, module in modules.items()}  # keep their own forwards below

    def forward_of(name: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            part = found.of_block(name)
            draft = Draft(root, name, blocks[name], part.groups.values(), part.weights)
            return draft.module(plain[name], device_of(plain[name]))(*args, **kwargs)

        return forward

    with patched({module: forward_of(name) for name, module in modules.items()}):
        yield


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters; the CPU if it has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))
