"""Tensors that wait on the host: in memory up to a limit, beyond it in memory-mapped files.

One store serves a whole calibration: it has the hidden states of both streams, and what the groups of a block saw. The limit bounds the memory of all these
tensors together, however many references there are to each. A tensor counts from `put` until its last reference is gone, so callers need not release it.
"""

import os
import tempfile
import weakref
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Store:
    """Keeps trees of tensors: `put` returns the tree on the host. A tensor that occurs twice in a tree is stored once."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.held = 0  # bytes in memory now
        self.most = 0  # bytes in memory at most, so far
        self.filed = 0  # bytes ever written to files
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._memory: dict[int, tuple[int, int]] = {}  # address of some memory -> number of stored tensors in it, its bytes (0: a file)

    def put(self, tree: Any) -> Any:
        """The same tree, with all of its tensors on the host."""
        known: dict[int, Tensor] = {}

        def one(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            if id(t) not in known:
                known[id(t)] = self._store(t.detach())
            return known[id(t)]

        return tree_map(one, tree)

    def _store(self, t: Tensor) -> Tensor:
        size = t.numel() * t.element_size()
        if t.device.type == "cpu" and size:
            memory = t.untyped_storage()
            if memory.data_ptr() in self._memory:  # a view of a stored tensor takes no further memory
                return self._counted(t)
            size = min(size, memory.nbytes())  # an expanded tensor takes less memory than its elements would
        if self.limit is not None and size and self.held + size > self.limit:
            return self._file(t)
        if t.device.type == "cpu" and t.untyped_storage().nbytes() > size:
            t = t.clone()  # a view would keep the whole tensor that it is a view of
        return self._counted(t.to("cpu"))

    def _counted(self, t: Tensor, in_memory: bool = True) -> Tensor:
        """Count a tensor's memory once, for as long as any stored tensor uses it."""
        memory = t.untyped_storage()
        address, size = memory.data_ptr(), memory.nbytes() if in_memory else 0
        if address not in self._memory:
            self._memory[address] = 0, size
            self.held += size
            self.most = max(self.most, self.held)
        count, size = self._memory[address]
        self._memory[address] = count + 1, size
        weakref.finalize(t, self._release, address).atexit = False
        return t

    def _release(self, address: int) -> None:
        """A stored tensor in this memory is gone: the last one frees the memory."""
        count, size = self._memory.pop(address)
        if count > 1:
            self._memory[address] = count - 1, size
        else:
            self.held -= size

    def _file(self, t: Tensor) -> Tensor:
        """A copy of the tensor in a memory-mapped file."""
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="torchao_qig_")
        size = t.numel() * t.element_size()
        self.filed += size
        path = f"{self._directory.name}/{self.filed}"
        stored = torch.from_file(path, shared=True, size=size, dtype=torch.uint8).view(t.dtype).view(t.shape)
        stored.copy_(t)
        with suppress(OSError):
            os.unlink(path)  # the space is free again when the tensor is gone
        return self._counted(stored, in_memory=False)
