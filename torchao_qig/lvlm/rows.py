"""Read rows from anything that holds samples: JSON, JSON Lines, COCO, CSV, text, folders of pictures, parquet, arrow, the hub.

The format of a source is told by its content, that of CSV and text by the file's suffix. Rows are read one at a time, by number. Each row has
a place, such as "coco.jsonl:17".
"""

from __future__ import annotations

import csv
import io
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchao_qig.errors import UserError, UserFileError
from torchao_qig.lvlm.messages import FIELDS, PICTURES
from torchao_qig.lvlm.pictures import BadRow
from torchao_qig.system import out_of_memory

FORMATS = (
    "known are JSON (a list of rows, or COCO captions), JSON Lines, CSV, text (.txt, paragraphs), parquet and arrow files, folders of pictures (with a .txt for"
    " each, or metadata.jsonl or metadata.csv), folders that datasets' save_to_disk wrote or that hold parquet or arrow files, and data sets on the hub"
    " (owner/name)"
)
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow")  # of files, never of names on the hub
PARQUET, ARROW = b"PAR1", (b"ARROW1", b"\xff\xff\xff\xff")  # the first bytes of such files
PATH = "path"  # the argument of `read_samples` that errors are about
LIMIT = threading.Lock()  # csv.field_size_limit is set for the whole process


@dataclass(frozen=True)
class Rows:
    """The rows of a source.

    Attributes:
        count: how many there are.
        row: number -> row. It may raise `BadRow`.
        place: number -> place, such as "coco.jsonl:17".
        folder: the folder that paths of pictures are relative to.
    """

    count: int
    row: Callable[[int], Any]
    place: Callable[[int], str]
    folder: Path


def rows_of(path: str | Path, split: str) -> Rows:
    """The rows of a file, a folder or a data set on the hub. An error names the known formats."""
    found = Path(path).expanduser()
    if found.is_dir():
        return _folder(found, split)
    if found.is_file():
        return _file(found, split)
    name = str(path)
    below = found.parent != Path() and found.parent.is_dir()
    if isinstance(path, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or found.suffix in SUFFIXES or below:
        raise UserFileError(f"path={name!r}: no such file or folder; {FORMATS}", PATH)
    return _hub(name, split)


def _listed(places: list[str], rows: list[Any], folder: Path) -> Rows:
    """Rows in memory. A `BadRow` among them is raised when it is read."""

    def row(i: int) -> Any:
        if isinstance(rows[i], BadRow):
            raise rows[i]
        return rows[i]

    return Rows(len(rows), row, places.__getitem__, folder)


def _file(path: Path, split: str) -> Rows:
    with path.open("rb") as file:
        head = file.read(6)
    if head.startswith((PARQUET, *ARROW)):
        kind = "parquet" if head.startswith(PARQUET) else "arrow"
        return _dataset(lambda d: d.load_dataset(kind, data_files={"train": str(path)}, split="train"), path.name, path.parent)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"path={str(path)!r}: neither text nor parquet nor arrow; {FORMATS}", PATH) from error
    return _text(path, text)


def _text(path: Path, text: str) -> Rows:
    if not text.strip():
        raise UserError(f"path={str(path)!r}: the file is empty; {FORMATS}", PATH)
    if path.suffix in (".csv", ".tsv"):
        return _csv(path, text)
    if path.suffix == ".jsonl" or text.lstrip()[:1] in ("[", "{"):
        try:
            return _json(path, json.loads(text))
        except json.JSONDecodeError as error:
            lines = [(i, line.removesuffix("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]  # strings may hold other line breaks
            if path.suffix == ".jsonl" or any(isinstance(_parsed(line), dict) for _, line in lines):
                return Rows(len(lines), lambda i: _line(lines[i][1]), lambda i: f"{path.name}:{lines[i][0]}", path.parent)
            if path.suffix != ".txt":
                raise UserError(f"path={str(path)!r}: neither JSON ({error}) nor JSON Lines; {FORMATS}", PATH) from error
    if path.suffix != ".txt":
        raise UserError(f"path={str(path)!r}: not a format that is known here; {FORMATS}", PATH)
    found = [(text.count("\n", 0, m.start()) + 1, m.group()) for m in re.finditer(r"\S[^\n]*(?:\n[^\S\n]*\S[^\n]*)*", text)]
    return _listed([f"{path.name}:{line}" for line, _ in found], [{"text": paragraph} for _, paragraph in found], path.parent)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise BadRow("not JSON", str(error)) from error


def _json(path: Path, data: Any) -> Rows:
    if isinstance(data, dict) and isinstance(data.get("images"), list) and isinstance(data.get("annotations"), list):
        return _coco(path, data)
    if isinstance(data, dict) and not (set(FIELDS) | set(PICTURES)) & set(data):
        raise UserError(f"path={str(path)!r}: a JSON object with {', '.join(list(data)[:8])}, neither COCO captions nor a row; {FORMATS}", PATH)
    rows = data if isinstance(data, list) else [data]
    return Rows(len(rows), rows.__getitem__, lambda i: f"{path.name}:{i + 1}", path.parent)


def _coco(path: Path, data: dict[str, Any]) -> Rows:
    """One row for each picture that has a caption: its first."""
    files = {image["id"]: image.get("file_name") for image in data["images"] if isinstance(image, dict) and isinstance(image.get("id"), (int, str))}
    rows: dict[str, Any] = {}
    for number, note in enumerate(data["annotations"], 1):
        key = note.get("image_id") if isinstance(note, dict) else None
        if not isinstance(key, (int, str)) or key not in files:
            rows[f"{path.name}:annotation {number}"] = BadRow("no such image", f"image_id {key!r} is not among the images")
        else:
            rows.setdefault(f"{path.name}:image {key}", {"image": files[key], "caption": note.get("caption")})
    for key in files:
        rows.setdefault(f"{path.name}:image {key}", BadRow("no caption", f"{files[key]} has no annotation"))
    return _listed(list(rows), list(rows.values()), path.parent)


def _csv(path: Path, text: str) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
    places, rows = [], []
    with LIMIT:
        limit = csv.field_size_limit()
        csv.field_size_limit(max(limit, len(text)))  # a field may be a whole picture
        try:
            for row in reader:
                places.append(f"{path.name}:{reader.line_num}")
                rows.append({k: v for k, v in row.items() if k and v})
        except csv.Error as error:
            raise UserError(f"path={str(path)!r}: line {reader.line_num} is not {path.suffix[1:].upper()}: {error}; {FORMATS}", PATH) from error
        finally:
            csv.field_size_limit(limit)
    return _listed(places, rows, path.parent)


def _folder(path: Path, split: str) -> Rows:
    if (path / "dataset_info.json").exists() and (path / "state.json").exists():
        return _dataset(lambda d: d.load_from_disk(str(path)), path.name, path)
    if (path / "dataset_dict.json").exists():
        return _dataset(lambda d: _split_of(d.load_from_disk(str(path)), path, split), path.name, path)
    for folder in (path / split, path):
        for name in ("metadata.jsonl", "metadata.csv"):
            if (folder / name).is_file():
                return _file(folder / name, split)
    if any(path.rglob("*.parquet")) or any(path.rglob("*.arrow")):
        return _dataset(lambda d: d.load_dataset(str(path), split=split), path.name, path)
    return _pictures(path / split if (path / split).is_dir() else path)


def _pictures(folder: Path) -> Rows:
    from PIL import Image

    known = Image.registered_extensions()
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in known)
    if not files:
        raise UserError(f"path={str(folder)!r}: no pictures in this folder, and no data set; pass the file of samples itself, or {FORMATS}", PATH)

    def row(i: int) -> Any:
        words = files[i].with_suffix(".txt")
        if not words.is_file():
            raise BadRow("no caption", f"{words.name} is missing")
        return {"image": str(files[i].relative_to(folder)), "caption": words.read_text(encoding="utf-8-sig", errors="replace")}

    return Rows(len(files), row, lambda i: f"{folder.name}/{files[i].relative_to(folder)}", folder)


def _split_of(found: Any, path: Path, split: str) -> Any:
    if split not in found:
        raise UserError(f"split={split!r}: {path} has {', '.join(found)}")
    return found[split]


def _dataset(load: Callable[[Any], Any], name: str, folder: Path) -> Rows:
    """A data set of the `datasets` library, its pictures left as they are stored."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"path={name!r}: reading it needs the datasets package: pip install datasets", name="datasets") from error
    try:
        found = load(datasets).with_format("arrow")
    except UserError:
        raise
    except Exception as error:  # of damaged files, of the data set, of the network
        if out_of_memory(error):
            raise
        raise UserError(f"path={name!r}: the datasets package cannot load it: {type(error).__name__}: {error}", PATH) from error
    return Rows(len(found), lambda i: found[i].to_pylist()[0], lambda i: f"{name}:{i + 1}", folder)


def _hub(name: str, split: str) -> Rows:
    """The rows of a data set on the hub, named owner/name or owner/name:configuration."""
    repository, _, configuration = name.partition(":")

    def load(datasets: Any) -> Any:
        try:
            return datasets.load_dataset(repository, configuration or None, split=split)
        except Exception as error:  # of the network, of the hub, of the data set
            if out_of_memory(error):
                raise
            why = f"no such file or folder here, and split={split!r} of it does not load from the hub: {error}"
            raise UserError(f"path={name!r}: {why}; {FORMATS}", PATH) from error

    return _dataset(load, name, Path())
