"""Record the calls of a model: `step="prepare"` attaches a `Recorder`, and `step="convert"` calibrates with the calls that it recorded."""

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torchao_qig.watch.observer import Call


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class Recorder:
    """Keeps the arguments of every call of a model until it is stopped."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Call] = []
        self.start(model)

    def start(self, model: nn.Module) -> None:
        """Begin to record, or go on after `stop`."""
        self._handle = model.register_forward_pre_hook(self._note, with_kwargs=True)

    def stop(self) -> None:
        self._handle.remove()

    def _note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caches = [v for v in [*args, *kwargs.values()] if hasattr(v, "get_seq_length")]
        if any(c.get_seq_length() > 0 for c in caches):
            return  # a later step of a generation: the tokens before it are only in the cache
        kept = {k: tree_map(_copied, v) for k, v in kwargs.items() if not any(v is c for c in caches)}
        self.calls.append(Call(tree_map(_copied, args), kept))
