"""Continue an interrupted calibration: after every block, its results and the hidden states are written to disk.

`manifest.json` says how many blocks are done and carries a fingerprint of settings, weights and data. It is replaced in one
step, after all files that it refers to have been written. The directory of another calibration is an error that names the difference.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from torchao_qig.calibration.result import Calibration, _replace
from torchao_qig.errors import UserError
from torchao_qig.watch import ranks

NUMERICS = 2  # to be increased when a change of the code gives other scales for the same input


def _crc(t: Tensor) -> int:
    return zlib.crc32(t.detach().cpu().contiguous().view(torch.uint8).numpy().data) if t.numel() else 0


def fingerprint_of_model(root: nn.Module) -> str:
    """A hash of all parameters."""
    crc = hashlib.sha256()
    for name, p in root.named_parameters():
        crc.update(f"{name} {p.dtype} {tuple(p.shape)} {_crc(p)}".encode())
    return crc.hexdigest()


def fingerprint_of_data(hidden: list[Tensor]) -> str:
    """A hash of the samples' hidden states before the first block."""
    return hashlib.sha256(" ".join(f"{tuple(h.shape)} {_crc(h)}" for h in hidden).encode()).hexdigest()


class Progress:
    """The files with the progress of one chain of blocks."""

    def __init__(self, directory: Path, fingerprint: dict[str, Any]) -> None:
        self.directory = directory
        self.fingerprint = {"numerics": NUMERICS, "ranks": ranks.world(), **fingerprint}
        self._manifest = directory / "manifest.json"
        directory.mkdir(parents=True, exist_ok=True)

    def done(self) -> int:
        """The number of blocks that an earlier run finished. Raises where the directory is that of another calibration."""
        try:
            written = json.loads(self._manifest.read_text())
        except FileNotFoundError:
            return 0
        for key, value in self.fingerprint.items():
            before = written["fingerprint"].get(key)
            if before != json.loads(json.dumps(value)):
                raise UserError(
                    f"checkpoint_dir={str(self.directory)!r}: holds another calibration ({key} was {before!r}, is {value!r}); pass an empty directory"
                )
        return int(written["done"])

    def save(self, done: int, found: Calibration, hidden: list[Tensor], notes: dict[str, Any]) -> None:
        """Write the results of block number `done` (from 1), the hidden states after it, and the notes."""
        rank = ranks.rank()
        tensors: dict[str, Tensor] = {}
        known: set[int] = set()
        for i, h in enumerate(hidden):  # both streams may hold the same tensor, which the file format refuses
            tensors[f"{i}"] = h.clone() if h.data_ptr() in known else h.contiguous()
            known.add(h.data_ptr())
        _replace(self.directory / f"hidden_{done}_{rank}.safetensors", lambda p: save_file(tensors, p))
        if rank == 0:
            found.save(self.directory / f"block_{done}")
        ranks.all_agree(True)  # waits until every rank has written
        if rank == 0:
            text = json.dumps({"fingerprint": self.fingerprint, "done": done, "notes": notes}, indent=1)
            _replace(self._manifest, lambda p: p.write_text(text))
        (self.directory / f"hidden_{done - 1}_{rank}.safetensors").unlink(missing_ok=True)

    def load(self, done: int) -> tuple[list[Calibration], Iterator[Tensor], dict[str, Any]]:
        """The results of the finished blocks, the hidden states after them (read one by one), and the notes."""
        found = [Calibration.load(self.directory / f"block_{n}") for n in range(1, done + 1)]
        notes = json.loads(self._manifest.read_text())["notes"]
        return found, self._hidden(done), notes

    def _hidden(self, done: int) -> Iterator[Tensor]:
        with safe_open(self.directory / f"hidden_{done}_{ranks.rank()}.safetensors", "pt") as file:
            yield from (file.get_tensor(str(i)) for i in range(len(file.keys())))
