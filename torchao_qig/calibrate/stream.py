"""Run calibration batches through a model block by block.

A chain is a list of blocks that the forward runs in order, each on what the one before returned: found by watching the first
batch, in the model's `nn.ModuleList`s and `nn.Sequential`s. `capture` then runs the model once per batch with its blocks
replaced by stubs that note what they are called with, so only what lies around the blocks computes anything. After that the
model itself is not needed: `Stream` replays one block after the other on the compute device, on pieces of a few samples, and
keeps their hidden states on the host (in memory-mapped files past a limit).

What a model does between two blocks (Qwen3-VL adds image features there) is replayed as the sum that it is; a model that does
more than adding is not a chain, and is then calibrated as a single block.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torchao_qig.calibrate.batches import Batch, Tokens
from torchao_qig.calibrate.groups import join, linears_in
from torchao_qig.calibrate.observer import Call, first_tensor, patched, replica
from torchao_qig.calibrate.store import Store

logger = logging.getLogger(__name__)


class _Stop(Exception):
    """The last block has been reached."""


class _Hidden:
    """Stands for the hidden state in a stored call."""


HIDDEN = _Hidden()


@dataclass
class Chain:
    """Blocks by name, in the order in which they run; `glued` are those whose input is not just the output before."""

    names: list[str]
    output: Any = None  # what the first block returned, for stubs to imitate
    glued: set[int] = field(default_factory=set)

    @property
    def whole_model(self) -> bool:
        return self.names == [""]


def hidden_of(call: Call) -> Tensor:
    """A block's hidden state: its first floating-point tensor argument."""
    for value in [*call.args, *call.kwargs.values()]:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            return value
    raise LookupError("the block takes no hidden state")


def with_hidden(call: Call, hidden: Any, old: Any = HIDDEN) -> Call:
    """The call with its hidden state exchanged."""
    return Call(tuple(hidden if a is old else a for a in call.args), {k: hidden if v is old else v for k, v in call.kwargs.items()})


def _without_cache(call: Call) -> Call:
    """Keys and values of earlier tokens play no role here, and must not pile up in replays."""

    def plain(value: Any) -> Any:
        return None if hasattr(value, "get_seq_length") else value

    kwargs = {k: False if k == "use_cache" else plain(v) for k, v in call.kwargs.items()}
    return Call(tuple(plain(a) for a in call.args), kwargs)


@contextmanager
def quiet(root: nn.Module) -> Iterator[None]:
    """The model as calibration runs it: eval mode, no cache, no autocast, no inference mode; put back afterwards."""
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
    """Lists of modules that may be chains: members with linears that are not linears themselves."""
    for name, module in root.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module):
            members = [(join(name, n), m) for n, m in module.named_children()]
            if len(members) == len(module) and any(linears_in(m) for _, m in members) and not any(isinstance(m, nn.Linear) for _, m in members):
                yield name, members


@dataclass
class _Watch:
    """What one candidate did in the first batch."""

    names: list[str]
    ran: list[int] = field(default_factory=list)
    output: Any = None
    last: Tensor | None = None
    copy: Tensor | None = None
    version: int = -1
    added: dict[int, Tensor] = field(default_factory=dict)
    clean: bool = True
    started: int = 0


def find_chains(root: nn.Module, batch: Batch) -> list[Chain]:
    """The outermost chains of the model, in the order in which they run. Runs the first batch."""
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


def _lies_in(chain: Chain, outer: Chain) -> bool:
    return any(chain.names[0].startswith(f"{name}.") for name in outer.names)


def _before(watch: _Watch, index: int, call: Call) -> None:
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
    """Whether what happens between blocks adds the same, whatever the hidden state is."""
    calls = capture_batch(root, batch, chain)
    inputs = [hidden_of(call) for call in calls]
    for index, expected in added.items():
        got = inputs[index] - inputs[index - 1]
        if not torch.allclose(got, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()) + 1e-6):
            return False
    return True


def _imitation(output: Any, hidden: Tensor) -> Any:
    """`output` with its main tensor exchanged."""
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    raise TypeError(f"blocks return {type(output).__name__}")


def capture_batch(root: nn.Module, batch: Batch, chain: Chain) -> list[Call]:
    """What every block of the chain is called with, if blocks did nothing. Computes only what lies before and between them."""
    calls: list[Call] = []

    def stub(index: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            call = _without_cache(Call(args, kwargs))
            hidden = hidden_of(call)
            calls.append(with_hidden(call, hidden.clone(), hidden))
            if index == len(chain.names) - 1:
                raise _Stop
            return _imitation(chain.output, hidden)

        return run

    with patched({root.get_submodule(name): stub(index) for index, name in enumerate(chain.names)}):
        try:
            root(*batch.args, **batch.kwargs)
        except _Stop:
            return calls
    raise RuntimeError(f"the model ran only {len(calls)} of the blocks {chain.names[0]} .. {chain.names[-1]} on this batch")


def cut(tree: Any, rows: list[int], size: int) -> Any:
    """Some samples of every tensor in a call: along dimension 0, or 1 where that one has the batch's size (M-RoPE positions)."""
    if rows == list(range(size)):
        return tree

    def one(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.dim():
            return t
        dim = 0 if t.shape[0] == size else 1 if t.dim() > 1 and t.shape[1] == size else None
        return t if dim is None else t.index_select(dim, torch.tensor(rows, device=t.device))

    return tree_map(one, tree)


def cast(tree: Any, device: torch.device, dtype: torch.dtype | None, only: torch.dtype | None = None) -> Any:
    """Every tensor on `device`, floating-point ones (of dtype `only`, if given) in `dtype`; masks stay finite."""

    def one(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if dtype is None or not t.is_floating_point() or t.dtype == dtype or (only is not None and t.dtype != only):
            return t.to(device)
        limits = torch.finfo(dtype)
        t = t.to(device)
        return (t.clamp(limits.min, limits.max) if limits.max < torch.finfo(t.dtype).max else t).to(dtype)

    return tree_map(one, tree)


@dataclass
class Piece:
    """Some samples of one batch: what is computed at once."""

    batch: int
    rows: list[int]
    size: int  # samples in the batch
    tokens: Tokens
    hidden: Any = None  # in the store


class Stream:
    """The samples on their way through a chain: `pieces` with their hidden states before block `at`."""

    def __init__(self, root: nn.Module, chain: Chain, device: torch.device, store: Store) -> None:
        self.root, self.chain, self.device, self.store = root, chain, device, store
        self.pieces: list[Piece] = []
        self.at = 0
        self._calls: dict[int, dict[int, Call]] = {}  # batch -> block -> call, without the hidden state
        self._added: dict[tuple[int, int], Tensor] = {}
        self._cuttable: bool | None = None

    def add(self, batch: Batch, samples_at_once: int | None) -> None:
        """Capture one batch and cut it into pieces."""
        if self.chain.whole_model:
            calls = [_without_cache(Call(batch.args, batch.kwargs))]
            size = batch.samples
        else:
            calls = capture_batch(self.root, batch, self.chain)
            hidden = [hidden_of(c) for c in calls]
            size = hidden[0].shape[0] if hidden[0].dim() > 2 else 1
            for i in self.chain.glued:
                self._added[i, batch.number] = self.store.put(hidden[i] - hidden[i - 1])
            start = hidden[0]
            calls = [with_hidden(c, HIDDEN, h) for c, h in zip(calls, hidden, strict=True)]
        number, shape = batch.number, None if self.chain.whole_model else start.shape
        at_once = samples_at_once or max(1, self.tokens_at_once // max(1, 1 if shape is None else shape[-2]))
        self._calls[number] = dict(enumerate(self.store.put(calls)))
        if size > 1 and self._cuttable is None:
            self._cuttable = self._can_be_cut(number, None if shape is None else start, size)
            if not self._cuttable:
                logger.info("batches cannot be cut into samples; they are computed whole")
        whole = size == 1 or at_once >= size or not self._cuttable
        for low in range(0, size, size if whole else at_once):
            rows = list(range(low, min(low + (size if whole else at_once), size)))
            tokens = batch.tokens(None if shape is None else shape).cut(rows)
            piece = Piece(number, rows, size, tokens)
            if shape is not None:
                piece.hidden = self.store.put(start[rows] if len(rows) < size else start)
            self.pieces.append(piece)

    @property
    def cuttable(self) -> bool:
        """Whether samples of a batch can be computed apart."""
        return bool(self._cuttable)

    @property
    def tokens_at_once(self) -> int:
        return 1024 if self.device.type == "cpu" else 8192  # enough for matrix products to be fast

    def _can_be_cut(self, number: int, hidden: Tensor | None, size: int) -> bool:
        """Whether the first block treats a sample alone as it treats it in its batch."""
        block = replica(self.root.get_submodule(self.chain.names[0]), self.device)
        call = self._calls[number][0]
        rows = [size - 1]
        try:
            together = first_tensor(self._run(block, call, hidden))
            alone = first_tensor(self._run(block, cut(call, rows, size), None if hidden is None else hidden[rows]))
        except (RuntimeError, ValueError, IndexError):
            return False
        scale = 1e-2 * float(together.abs().max())
        return together.shape[:1] == (size,) and alone.shape == together[rows].shape and torch.allclose(alone, together[rows], rtol=1e-2, atol=scale)

    def _run(self, block: nn.Module, call: Call, hidden: Tensor | None) -> Any:
        call = cast(call if hidden is None else with_hidden(call, hidden), self.device, None)
        return block(*call.args, **call.kwargs)

    def call(self, piece: Piece, rows: list[int] | None = None, hidden: Any = None) -> Call:
        """What block `at` is called with for a piece (or some of its samples, or another hidden state), on the compute device."""
        chosen = piece.rows if rows is None else [piece.rows[r] for r in rows]
        call = cut(self._calls[piece.batch][self.at], chosen, piece.size)
        if not self.chain.whole_model:
            hidden = piece.hidden if hidden is None else hidden
            call = with_hidden(call, hidden if rows is None or rows == list(range(len(piece.rows))) else hidden[rows])
        return cast(call, self.device, None)

    def advance(self, piece: Piece, out: Any) -> None:
        """Keep what block `at` returned as the piece's next hidden state."""
        piece.hidden = self.after(piece, out, piece.hidden)

    def after(self, piece: Piece, out: Any, before: Any) -> Any:
        """The hidden state, in the store, that follows from what block `at` returned for the one `before`."""
        if self.chain.whole_model or self.at + 1 == len(self.chain.names):
            return before
        hidden = first_tensor(out).to(before.dtype)
        added = self._added.get((self.at + 1, piece.batch))
        if added is not None:
            hidden = hidden + cut(added, piece.rows, piece.size).to(hidden)
        return self.store.put(hidden)

    def next_block(self) -> None:
        for calls in self._calls.values():
            calls.pop(self.at, None)
        self.at += 1
