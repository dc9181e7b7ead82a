"""Batches from running a prepared model: what `step="prepare"` leaves on it for `step="convert"`."""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torchao_qig.calibrate.observer import Call


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class Recorder:
    """Keeps what a model is called with, until it is stopped."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Call] = []
        self.start(model)

    def start(self, model: nn.Module) -> None:
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def stop(self) -> None:
        self._handle.remove()

    def _note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caches = [v for v in [*args, *kwargs.values()] if hasattr(v, "get_seq_length")]
        if any(c.get_seq_length() > 0 for c in caches):
            return  # a later token of a generation: what came before lies in the cache
        kept = {k: tree_map(_copied, v) for k, v in kwargs.items() if not any(v is c for c in caches)}
        self.calls.append(Call(tree_map(_copied, args), kept))
