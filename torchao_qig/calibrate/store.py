"""Tensors that wait on the host: in memory up to a limit, beyond it in memory-mapped files.

One store serves a whole chain of blocks: the hidden states of both streams and what a block's groups saw. The limit is a bound on the memory that all of
these hold together, whoever refers to them and how often. A tensor counts from `put` until its last reference is gone, so nobody has to give it back.
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
        self._memory: dict[int, tuple[int, int]] = {}  # address of a block of memory -> stored tensors that live in it, bytes (0: of a file)

    def put(self, tree: Any) -> Any:
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
            if memory.data_ptr() in self._memory:  # a view of what is stored already takes nothing
                return self._counted(t)
            size = min(size, memory.nbytes())  # less than its elements: an expanded tensor
        if self.limit is not None and size and self.held + size > self.limit:
            return self._file(t)
        if t.device.type == "cpu" and t.untyped_storage().nbytes() > size:
            t = t.clone()  # a view would keep all that it is a view of
        return self._counted(t.to("cpu"))

    def _counted(self, t: Tensor, in_memory: bool = True) -> Tensor:
        """Count the memory that a tensor lives in, once, until no stored tensor lives in it any more."""
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
        count, size = self._memory.pop(address)
        if count > 1:
            self._memory[address] = count - 1, size
        else:
            self.held -= size

    def _file(self, t: Tensor) -> Tensor:
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
