"""Tensors that wait on the host: in memory up to a limit, beyond it in memory-mapped files."""

import os
import tempfile
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class Store:
    """Keeps trees of tensors: `put` returns the tree on the host, `drop` forgets it. A tensor that occurs twice in a tree is stored once."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.held = 0  # bytes in memory
        self.filed = 0  # bytes ever written to files
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._files: dict[int, Tensor] = {}  # by id; the tensors keep the ids theirs

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
        if size and self.limit is not None and self.held + size > self.limit:
            return self._file(t, size)
        self.held += size
        return t.to("cpu")

    def _file(self, t: Tensor, size: int) -> Tensor:
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="torchao_qig_")
        self.filed += size
        path = f"{self._directory.name}/{self.filed}"
        stored = torch.from_file(path, shared=True, size=size, dtype=torch.uint8).view(t.dtype).view(t.shape)
        stored.copy_(t)
        with suppress(OSError):
            os.unlink(path)  # the space is free again when the tensor is gone
        self._files[id(stored)] = stored
        return stored

    def drop(self, tree: Any) -> None:
        def one(t: Any) -> Any:
            if isinstance(t, Tensor) and self._files.pop(id(t), None) is None:
                self.held = max(0, self.held - t.numel() * t.element_size())
            return t

        tree_map(one, tree)
