"""Run calibration batches through a chain block by block.

Once a batch has been captured the model itself is not needed: `Stream` replays one block after the other on the compute device,
on pieces of a few samples, and keeps their hidden states on the host (in memory-mapped files past a limit).
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torchao_qig.watch.batches import Batch, Tokens
from torchao_qig.watch.chains import HIDDEN, Chain, capture_batch, hidden_of, with_hidden, without_cache
from torchao_qig.watch.observer import Call, first_tensor, replica
from torchao_qig.watch.store import Store

logger = logging.getLogger(__name__)


def cut(tree: Any, rows: list[int], size: int) -> Any:
    """Select the samples `rows` from every tensor in a call: along dimension 0, or along 1 where only that one has the batch's size (M-RoPE positions)."""
    if rows == list(range(size)):
        return tree

    def one(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.dim():
            return t
        dim = 0 if t.shape[0] == size else 1 if t.dim() > 1 and t.shape[1] == size else None
        return t if dim is None else t.index_select(dim, torch.tensor(rows, device=t.device))

    return tree_map(one, tree)


def cast(tree: Any, device: torch.device, dtype: torch.dtype | None, only: torch.dtype | None = None) -> Any:
    """Move every tensor to `device` and cast floating-point ones (only those of dtype `only`, if given) to `dtype`.

    Values are clamped to the range of `dtype`, so that the large negative numbers of masks stay finite.
    """

    def one(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        if dtype is None or not t.is_floating_point() or t.dtype == dtype or (only is not None and t.dtype != only):
            return t.to(device)
        limits = torch.finfo(dtype)
        t = t.to(device)
        return (t.clamp(limits.min, limits.max) if limits.max < torch.finfo(t.dtype).max else t).to(dtype)

    return tree_map(one, tree)


def fresh(tree: Any) -> Any:
    """The call with copies of its tensors, since a block may write into its input."""
    return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, tree)


@dataclass
class MicroBatch:
    """Some samples of one batch, which are computed at once."""

    batch: int  # number of the batch
    rows: list[int]  # the samples, by their number in the batch
    size: int  # samples in the batch
    tokens: Tokens
    hidden: Any = None  # the samples' hidden state, in the store


class Stream:
    """The samples on their way through a chain: `pieces` are micro-batches with their hidden states before the block number `at`."""

    def __init__(self, root: nn.Module, chain: Chain, device: torch.device, store: Store) -> None:
        self.root, self.chain, self.device, self.store = root, chain, device, store
        self.pieces: list[MicroBatch] = []
        self.at = 0
        self._calls: dict[int, dict[int, Call]] = {}  # batch -> block -> call, without the hidden state
        self._added: dict[tuple[int, int], Tensor] = {}  # (block, batch) -> what the model adds to the hidden state before the block
        self._cuttable: bool | None = None  # whether samples of a batch can be computed apart; None: not tried yet

    def twin(self) -> "Stream":
        """Another stream of the same samples, which starts with the same hidden states."""
        other = Stream(self.root, self.chain, self.device, self.store)
        other.pieces = [replace(piece) for piece in self.pieces]
        other._calls = {number: dict(calls) for number, calls in self._calls.items()}
        other._added, other._cuttable = self._added, self._cuttable
        return other

    def empty(self) -> "Stream":
        """A stream without samples, for the same batches in another state of the model. It cuts batches in the same way as this one."""
        other = Stream(self.root, self.chain, self.device, self.store)
        other._cuttable = self._cuttable
        return other

    def add(self, batch: Batch, samples_at_once: int | None) -> None:
        """Capture one batch and cut it into micro-batches of `samples_at_once` samples (None: of about `tokens_at_once` tokens)."""
        if self.chain.whole_model:
            calls = [without_cache(Call(batch.args, batch.kwargs))]
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
        ambiguous = shape is not None and shape[-2] == size  # tokens could be taken for samples
        if size > 1 and not ambiguous and self._cuttable is None:
            self._cuttable = self._can_be_cut(number, None if shape is None else start, size)
            if not self._cuttable:
                logger.info("batches cannot be cut into samples; they are computed whole")
        whole = size == 1 or at_once >= size or ambiguous or not self._cuttable
        for low in range(0, size, size if whole else at_once):
            rows = list(range(low, min(low + (size if whole else at_once), size)))
            tokens = batch.tokens(None if shape is None else shape).cut(rows)
            piece = MicroBatch(number, rows, size, tokens)
            if shape is not None:
                piece.hidden = self.store.put(start[rows] if len(rows) < size else start)
            self.pieces.append(piece)

    @property
    def cuttable(self) -> bool:
        """Whether the samples of every batch can be computed separately."""
        return bool(self._cuttable)

    @property
    def tokens_at_once(self) -> int:
        """Tokens of a micro-batch where its size is not given."""
        return 1024 if self.device.type == "cpu" else 8192  # enough for matrix products to be fast

    def can_cut(self, piece: MicroBatch) -> bool:
        """Whether some samples of this piece can be computed without the others."""
        return self.cuttable and len(piece.rows) > 1 and not (piece.hidden is not None and piece.hidden.shape[-2] == piece.size)

    def _can_be_cut(self, number: int, hidden: Tensor | None, size: int) -> bool:
        """Whether the first block computes the same for a sample alone as for the sample in its batch."""
        block = replica(self.root.get_submodule(self.chain.names[0]), self.device)
        call = self._calls[number][0]
        rows = [size - 1]
        try:
            together = first_tensor(self._run(block, call, hidden))
            alone = first_tensor(self._run(block, cut(call, rows, size), None if hidden is None else hidden[rows]))
        except (RuntimeError, ValueError, IndexError):
            return False
        if together.shape[:1] != (size,) or alone.shape != together[rows].shape:
            return False
        change = together - hidden.to(together) if hidden is not None and hidden.shape == together.shape else together
        allowed = (1e-3 if together.dtype in (torch.float32, torch.float64) else 5e-2) * float(change.abs().max())
        return bool(((alone - together[rows]).abs() <= allowed).all())

    def _run(self, block: nn.Module, call: Call, hidden: Tensor | None) -> Any:
        call = fresh(cast(call if hidden is None else with_hidden(call, hidden), self.device, None))
        return block(*call.args, **call.kwargs)

    def call(self, piece: MicroBatch, rows: list[int] | None = None) -> Call:
        """What block `at` is called with for a piece (or some of its samples), on the compute device."""
        chosen = piece.rows if rows is None else [piece.rows[r] for r in rows]
        call = cut(self._calls[piece.batch][self.at], chosen, piece.size)
        if not self.chain.whole_model:
            call = with_hidden(call, piece.hidden.clone() if rows is None else piece.hidden[rows])  # a block may write into its input
        return cast(call, self.device, None)

    def advance(self, piece: MicroBatch, out: Any) -> None:
        """Keep the output of block `at` as the hidden state that the next block gets."""
        if self.chain.whole_model or self.at + 1 == len(self.chain.names):
            return
        hidden = first_tensor(out).to(piece.hidden.dtype)
        added = self._added.get((self.at + 1, piece.batch))
        if added is not None:
            hidden = hidden + cut(added, piece.rows, piece.size).to(hidden)
        piece.hidden = None  # its memory is free for the one that follows
        piece.hidden = self.store.put(hidden)

    def next_block(self) -> None:
        """Move on to the next block, and drop the calls of this one."""
        for calls in self._calls.values():
            calls.pop(self.at, None)
        self.at += 1
