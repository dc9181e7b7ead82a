"""Read the files that `torchao-qig quantize`, `evaluate` and `bench` wrote into a checkpoint's folder qig/, and note which are missing."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torchao_qig.calibration.result import Calibration
from torchao_qig.errors import UserError

FOLDER = "qig"


class Missing(NamedTuple):
    """A part that is missing, what it would show, and the command that writes it."""

    part: str
    shows: str
    command: str


@dataclass
class Found:
    """Everything that the page is made of. Missing parts are empty or None.

    Attributes:
        directory: the checkpoint.
        calibration: the calibration that the weights were quantized with.
        sensitivity: a calibration with token weights.
        samples: descriptions of the samples of `sensitivity`, in its order: source, tokens, images, hints.
        receipt, evaluation, bench: as the commands write them.
        missing: the parts that are missing.
    """

    directory: Path
    calibration: Calibration | None = None
    sensitivity: Calibration | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    receipt: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    bench: dict[str, Any] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.receipt.get("model") or self.directory.resolve().name)

    def lacks(self, part: str) -> Missing | None:
        return next((m for m in self.missing if m.part == part), None)

    def picture(self, file: str) -> Path | None:
        """A thumbnail's path; None if it is missing or not inside the folder."""
        folder = (self.directory / FOLDER).resolve()
        path = (folder / file).resolve()
        return path if path.is_relative_to(folder) and path.is_file() else None


def read(directory: Path) -> Found:
    """Read a quantized checkpoint's folder qig/.

    Raises:
        ValueError: there is no such folder, or a file in it cannot be read.
    """
    folder = directory / FOLDER
    if not folder.is_dir():
        raise UserError(f"directory={str(directory)!r}: no folder {FOLDER}/ in it; pass a directory that `torchao-qig quantize` wrote")
    found = Found(directory)
    found.calibration = _calibration(folder / "calibration")
    found.sensitivity = _calibration(folder / "sensitivity")
    samples, receipt, evaluation, bench = (_json(folder / f"{part}.json") for part in ("samples", "receipt", "evaluation", "bench"))
    found.samples = _objects(folder / "samples.json", samples or [])
    found.receipt = _object(folder / "receipt.json", receipt or {})
    found.evaluation = _table(folder / "evaluation.json", evaluation or {})
    found.bench = _table(folder / "bench.json", bench or {})
    if found.sensitivity is None and found.calibration is not None and found.calibration.tokens:
        found.sensitivity = found.calibration
    model, here = shlex.quote(str(found.receipt.get("model") or "MODEL")), shlex.quote(str(directory))
    quantize = f"torchao-qig quantize {model} --calib SAMPLES --output NEW_DIRECTORY"
    parts = [
        ("calibration", found.calibration is None, "the errors before and after, the scales, the bits and the time of each layer", quantize),
        ("sensitivity", not (found.sensitivity and found.sensitivity.tokens), "how much each token of the samples counts", f"{quantize} --set explain=8"),
        ("samples", not found.samples, "the calibration pictures and texts", f"{quantize} --set explain=8"),
        ("receipt", not found.receipt, "what was quantized, the sizes, the check against full precision, settings and versions", quantize),
        ("evaluation", not found.evaluation, "accuracy against size", f"torchao-qig evaluate {here} --data QUESTIONS --against {model}"),
        ("bench", not found.bench, "speed and memory when answering", f"torchao-qig bench {here} --against {model}"),
    ]
    found.missing = [Missing(part, shows, command) for part, lacking, shows, command in parts if lacking]
    return found


def _calibration(path: Path) -> Calibration | None:
    if not path.is_dir():
        return None
    try:
        return Calibration.load(path)
    except Exception as error:  # a damaged file can fail in many ways, in json and in safetensors
        raise UserError(f"directory={str(path)!r}: cannot read this calibration ({type(error).__name__}: {error}); quantize again, or delete it") from error


def _json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"file={str(path)!r}: not JSON ({error}); run the command that wrote it again, or delete it") from error


def _object(path: Path, found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError(f"file={str(path)!r}: an object is expected, not {type(found).__name__}; run the command that wrote it again, or delete it")
    return found


def _objects(path: Path, found: Any) -> list[dict[str, Any]]:
    if not isinstance(found, list):
        raise UserError(f"file={str(path)!r}: a list is expected, not {type(found).__name__}; run the command that wrote it again, or delete it")
    return [_object(path, one) for one in found]


def _table(path: Path, found: Any) -> dict[str, Any]:
    """An object that has rows; an empty one if it has none."""
    rows = _objects(path, _object(path, found).get("rows") or [])
    return {**found, "rows": rows} if rows else {}
