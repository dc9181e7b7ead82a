"""Watch modules run: record the inputs of linears, and the calls of the modules around them, in a forward pass.

`Observer` hooks one block. `replica` makes the copy of a block that calibration works on, so that the model itself is never
touched; the copy shares parameters where device and dtype agree. `patched` replaces the forwards of modules for a while.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class Call(NamedTuple):
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class RecordedCall(NamedTuple):
    """One call of an inspected module: the input of its group, the call, the module's output, and the outputs of the group's linears."""

    x: Tensor
    call: Call
    out: Tensor
    ys: tuple[Tensor, ...] = ()


def first_tensor(out: Any) -> Tensor:
    """The main output of a module, which may return several: the first tensor."""
    if isinstance(out, Tensor):
        return out
    for value in out.values() if isinstance(out, Mapping) else out:
        if isinstance(value, Tensor):
            return value
    raise TypeError(f"a module returned no tensor but {type(out).__name__}")


def replica(block: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of `block` that can be run, in eval mode and without its hooks.

    Parameters are shared with the original where device and dtype stay the same. With `dtype`, floating-point tensors in the
    block's main dtype are cast; others (a router kept in float32) stay.
    """
    tensors = [*block.parameters(), *block.buffers()]
    floats = [t.dtype for t in block.parameters() if t.is_floating_point()]
    main = max(set(floats), key=floats.count) if floats else None

    def moved(t: Tensor) -> Tensor:
        return t.detach().to(device, dtype if dtype is not None and t.dtype == main else t.dtype)

    memo: dict[int, Any] = {id(t): nn.Parameter(moved(t), requires_grad=False) if isinstance(t, nn.Parameter) else moved(t) for t in tensors}
    copied = copy.deepcopy(block, memo)
    for module in copied.modules():
        if "_hf_hook" in module.__dict__:  # accelerate moves parameters around in an overridden forward
            module.__dict__.pop("forward", None)
            del module._hf_hook
        module.__dict__.pop("_output_capturing_hooks_installed", None)  # without this mark, transformers installs the hooks that are cleared below again
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            hooks.clear()
    return copied.eval()


@contextmanager
def patched(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside the `with` block, these forwards replace the modules' own."""
    before = [(module, module.__dict__.get("forward")) for module in forwards]
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own in before:
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own


def identity(x: Tensor) -> tuple[object, ...]:
    """A key that a tensor and its reshaped views have in common, valid while the tensor lives and nothing is written into it."""
    return (x.untyped_storage().data_ptr(), x.storage_offset(), x.numel(), x.shape[-1] if x.dim() else 0, x.dtype, _version(x))


def _version(x: Tensor) -> int:
    """How often the tensor has been written into; -1 for inference tensors, which do not count it."""
    return -1 if x.is_inference() else x._version


class Observer:
    """Hooks on a block that record the inputs of `linears`, and the calls and outputs of these and of every module that contains some of them.

    Use it as a context manager around one forward pass; a second pass starts afresh. Without `copies`, the tensors themselves are recorded:
    `stale` tells whether the block wrote into one of them later (`x += y`). Then another pass with `copies=True` is needed.
    """

    def __init__(self, block: nn.Module, linears: list[str], copies: bool = False) -> None:
        self.inputs: dict[str, list[Tensor]] = {}
        self.keys: dict[str, list[tuple[object, ...]]] = {}  # `identity` of each input
        self.calls: dict[str, list[tuple[Call, Any]]] = {}
        self.block, self.copies, self._linears = block, copies, linears
        self._watched = {prefix for name in linears for prefix in _prefixes(name)}
        self._handles: list[Any] = []
        self._noted: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}  # key -> the tensor (kept alive), what is recorded of it
        self._running: list[Call] = []

    def __enter__(self) -> "Observer":
        self.inputs, self.keys, self.calls, self._noted = {}, {}, {}, {}
        for name in self._linears:
            self._handles.append(self.block.get_submodule(name).register_forward_pre_hook(self._input_hook(name)))
        for name in self._watched:
            module = self.block.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._start, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._end_hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def stale(self) -> bool:
        """Whether a tensor that was recorded without a copy has been written into since."""
        return not self.copies and any(key[-1] != _version(original) for key, (original, _) in self._noted.items())

    def _note(self, tree: Any) -> Any:
        """The tree with what is recorded of its tensors in their place: one record per tensor."""

        def one(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            key = (*identity(t), tuple(t.shape))
            key = (*key[:5], key[6], key[5])  # the version goes last, where `stale` reads it
            if key not in self._noted:
                self._noted[key] = (t, t.detach().clone() if self.copies else t.detach())
            return self._noted[key][1]

        return tree_map(one, tree)

    def _input_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.inputs.setdefault(name, []).append(self._note(args[0]))
            self.keys.setdefault(name, []).append(identity(args[0]))

        return hook

    def _start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(Call(self._note(args), self._note(kwargs)))

    def _end_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self.calls.setdefault(name, []).append((self._running.pop(), self._note(out)))

        return hook

    def seen(self, inspected: str, linears: tuple[str, ...]) -> list[RecordedCall]:
        """The recorded calls of an inspected module, each with the input and the outputs of its group's linears."""
        calls, inputs = self.calls.get(inspected, []), self.inputs.get(linears[0], [])
        outputs = zip(*([first_tensor(out) for _, out in self.calls.get(n, [])] for n in linears), strict=True)
        return [RecordedCall(x, call, first_tensor(out).detach(), ys) for x, (call, out), ys in zip(inputs, calls, outputs, strict=True)]


def _prefixes(name: str) -> list[str]:
    """A linear's own name and those of all modules around it, "" (the block) included."""
    parts = name.split(".") if name else []
    return [".".join(parts[:n]) for n in range(len(parts) + 1)]
