"""Chains: lists of blocks that a model runs in order, each on what the one before returned.

Chains are found by watching the model's `nn.ModuleList`s and `nn.Sequential`s while the first batch runs. `capture_batch` runs the
model with its blocks replaced by stubs that note what they are called with, so that only the code around the blocks computes anything.

What a model does between two blocks (Qwen3-VL adds image features there) can be replayed if it adds the same tensor whatever the
hidden state is. Blocks with anything else between them are no chain; a model without a chain is calibrated as a single block.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchao_qig.watch.batches import Batch, naming
from torchao_qig.watch.groups import join, linears_in
from torchao_qig.watch.observer import Call, first_tensor, patched


class _Stop(Exception):
    """Raised to end a forward pass once its last block has been reached."""


class NotRun(LookupError):
    """A batch does not go through the chain (a text without an image does not go through a vision tower)."""


class _Hidden:
    """A placeholder for the hidden state in a stored call."""


HIDDEN = _Hidden()


@dataclass
class Chain:
    """Blocks that run one after another.

    Attributes:
        names: the blocks' names in the model, in the order in which they run; [""] is the whole model as a single block.
        output: what the first block returned, for stubs to imitate.
        glued: indices of the blocks before which the model adds something to the output of the block before.
    """

    names: list[str]
    output: Any = None
    glued: set[int] = field(default_factory=set)

    @property
    def whole_model(self) -> bool:
        """Whether the chain is the whole model as a single block."""
        return self.names == [""]


def hidden_of(call: Call) -> Tensor:
    """A block's hidden state: its first floating-point tensor argument."""
    for value in [*call.args, *call.kwargs.values()]:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            return value
    raise LookupError("the block takes no hidden state")


def with_hidden(call: Call, hidden: Any, old: Any = HIDDEN) -> Call:
    """The call with `hidden` in place of the argument `old`."""
    return Call(tuple(hidden if a is old else a for a in call.args), {k: hidden if v is old else v for k, v in call.kwargs.items()})


def without_cache(call: Call) -> Call:
    """The call without a cache of keys and values, which would grow each time the call is repeated."""

    def plain(value: Any) -> Any:
        return None if hasattr(value, "get_seq_length") else value

    kwargs = {k: False if k == "use_cache" else plain(v) for k, v in call.kwargs.items()}
    return Call(tuple(plain(a) for a in call.args), kwargs)


@contextmanager
def quiet(root: nn.Module) -> Iterator[None]:
    """Put the model into the state in which calibration runs it (eval mode, no cache, no autocast, no inference mode), and back afterwards."""
    training = [m for m in root.modules() if m.training]
    configs = {id(c): c for m in root.modules() if (c := getattr(m, "config", None)) is not None and getattr(c, "use_cache", None) is True}
    with ExitStack() as stack:
        for device_type in {"cpu", *(p.device.type for p in root.parameters() if p.device.type != "meta")}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        try:
            for m in training:
                m.training = False
            for c in configs.values():
                c.use_cache = False
            yield
        finally:
            for m in training:
                m.training = True
            for c in configs.values():
                c.use_cache = True


def _containers(root: nn.Module) -> Iterator[tuple[str, list[tuple[str, nn.Module]]]]:
    """The model's lists of modules that may be chains: they contain linears, and none of their members is a linear itself."""
    for name, module in root.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            members = [(join(name, n), m) for n, m in module.named_children()]
            if len(members) == len(module) and any(linears_in(m) for _, m in members) and not any(isinstance(m, nn.Linear) for _, m in members):
                yield name, members


def listed_chains(root: nn.Module) -> list[Chain]:
    """The chains that the model's lists suggest, without running it: the outermost lists of blocks. The largest list of the decoder comes last."""
    found = [Chain([name for name, _ in members]) for _, members in _containers(root)]
    outermost = [c for c in found if not any(_lies_in(c, outer) for outer in found)]
    decoder = root.get_decoder() if hasattr(root, "get_decoder") else None
    inside = {id(m) for m in (decoder if isinstance(decoder, nn.Module) else root).modules()}

    def place(chain: Chain) -> tuple[bool, int]:
        blocks = [root.get_submodule(name) for name in chain.names]
        return id(blocks[0]) in inside, sum(p.numel() for block in blocks for p in block.parameters())

    return sorted(outermost, key=place)


@dataclass
class _Watch:
    """A list of blocks that may be a chain, and how its blocks were called in the first batch."""

    names: list[str]
    ran: list[int] = field(default_factory=list)  # indices of the blocks, as they ran
    output: Any = None  # what the first block returned
    last: Tensor | None = None  # the output of the block that ran last, ...
    copy: Tensor | None = None  # ... a copy of it ...
    version: int = -1  # ... and its version, which tells whether it has been written into since
    added: dict[int, Tensor] = field(default_factory=dict)  # index of a block -> its input minus the output of the block before
    clean: bool = True  # False: the list cannot be a chain
    started: int = 0  # the list's place in the order in which lists began to run


def find_chains(root: nn.Module, batch: Batch) -> list[Chain]:
    """Run the first batch, and return the outermost chains of the model in the order in which they run."""
    watches: list[_Watch] = []
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    clock = iter(range(1_000_000_000))

    def watching(watch: _Watch, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            watch.started = watch.started or next(clock) + 1
            _before(watch, index, Call(args, kwargs))
            out = forward(*args, **kwargs)
            _after(watch, index, out)
            return out

        return run

    for _, members in _containers(root):
        watch = _Watch([name for name, _ in members])
        watches.append(watch)
        for index, (_, module) in enumerate(members):
            forwards[module] = watching(watch, index, forwards.get(module, module.forward))
    with patched(forwards):
        root(*batch.args, **batch.kwargs)
    ordered = [w for w in sorted(watches, key=lambda w: w.started) if w.clean and w.ran == list(range(len(w.names)))]
    found = [(Chain(w.names, w.output, set(w.added)), w.added) for w in ordered]
    good = [chain for chain, added in found if not added or _adds_only(root, batch, chain, added)]
    return [c for c in good if not any(_lies_in(c, outer) for outer in good)]


def running_order(root: nn.Module, names: list[str], batches: Iterable[Batch]) -> list[str]:
    """Sort these modules by when they first run. The order is that of the first batch that runs all of them, or else of the one that runs the most."""
    best: list[str] = []
    for batch in batches:
        order: list[str] = []

        def noting(name: str, forward: Callable[..., Any], order: list[str] = order) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                if name not in order:
                    order.append(name)
                return forward(*args, **kwargs)

            return run

        modules = {name: root.get_submodule(name) for name in names}
        with naming(root, batch), patched({module: noting(name, module.forward) for name, module in modules.items()}):
            root(*batch.args, **batch.kwargs)
        best = max(best, order, key=len)
        if len(best) == len(names):
            break
    return best


def _lies_in(chain: Chain, outer: Chain) -> bool:
    """Whether the chain lies inside a block of `outer`."""
    return any(chain.names[0].startswith(f"{name}.") for name in outer.names)


def _before(watch: _Watch, index: int, call: Call) -> None:
    """Compare the input of a block with what the block before returned, and note the difference."""
    try:
        hidden = hidden_of(call)
    except LookupError:
        watch.clean = False
        return
    if index and watch.copy is not None:
        if hidden.shape != watch.copy.shape or hidden.device != watch.copy.device:
            watch.clean = watch.clean and hidden.shape == watch.copy.shape
        elif watch.last is None or hidden is not watch.last or watch.last._version != watch.version:
            watch.added[index] = hidden - watch.copy


def _after(watch: _Watch, index: int, out: Any) -> None:
    """Note what a block returned."""
    watch.ran.append(index)
    try:
        last = watch.last = first_tensor(out)
    except (TypeError, AttributeError):
        watch.clean = False
        return
    watch.copy, watch.version = last.detach().clone(), last._version
    if index == 0:
        watch.output = out


def _adds_only(root: nn.Module, batch: Batch, chain: Chain, added: dict[int, Tensor]) -> bool:
    """Whether the model adds the same tensors (`added`) between blocks when the hidden state is another one."""
    calls = capture_batch(root, batch, chain)
    inputs = [hidden_of(call) for call in calls]
    for index, expected in added.items():
        got = inputs[index] - inputs[index - 1]
        if not torch.allclose(got, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()) + 1e-6):
            return False
    return True


def _imitation(output: Any, hidden: Tensor) -> Any:
    """What a stub returns: `output` with `hidden` as its main tensor."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    raise TypeError(f"blocks return {type(output).__name__}")


def capture_batch(root: nn.Module, batch: Batch, chain: Chain) -> list[Call]:
    """Run a batch with stubs that return their input in place of the chain's blocks. Returns what each block was called with.

    Only what lies before and between the blocks is computed.
    """
    calls: list[Call] = []

    def stub(index: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = without_cache(Call(args, kwargs))
            hidden = hidden_of(call)
            kept = hidden.clone() if chain.glued or index == 0 else hidden  # what lies between blocks may write into it
            calls.append(with_hidden(call, kept, hidden))
            if index == len(chain.names) - 1:
                raise _Stop
            return _imitation(chain.output, hidden)

        return run

    with patched({root.get_submodule(name): stub(index) for index, name in enumerate(chain.names)}):
        try:
            root(*batch.args, **batch.kwargs)
        except _Stop:
            return calls
    if not calls:
        raise NotRun(f"the model does not run {chain.names[0]}")
    raise RuntimeError(f"the model ran only {len(calls)} of the blocks {chain.names[0]} .. {chain.names[-1]} on this batch")
