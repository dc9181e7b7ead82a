"""Read samples for calibration and evaluation from a file, a folder or a data set.

A row becomes a `Sample`: chat messages with their pictures, which are checked now and opened again when they are used. A row that is no
sample is skipped, counted and named with its place. Nothing is guessed, and no picture is fetched from a network.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from torchao_qig.errors import UserError, UserFileError
from torchao_qig.lvlm.messages import EXAMPLE, Messages, as_messages, pictures_of
from torchao_qig.lvlm.pictures import BadRow, check, located
from torchao_qig.lvlm.rows import PATH, rows_of

PROMPT = "Describe this image in detail."
SHOWN = 110  # largest number of characters shown about a faulty row


@dataclass(frozen=True)
class Sample:
    """Chat messages; content is a list of {"type": "text", "text": ...} and {"type": "image", "image": path, bytes or PIL image}."""

    messages: Messages
    source: str  # where it came from: "coco.jsonl:17"

    @property
    def images(self) -> list[Any]:
        return pictures_of(self.messages)


@contextmanager
def naming_argument(name: str) -> Iterator[None]:
    """While this runs, errors of `read_samples` about its argument `path` name the argument `name` instead, which the path came from."""
    try:
        yield
    except UserError as error:
        if error.argument != PATH:
            raise
        raise error.called(name) from error


def shortened(detail: str) -> str:
    """The text, or only its beginning and end if it is long: it may hold a whole file."""
    return detail if len(detail) <= SHOWN else f"{detail[: SHOWN - 65]} ... {detail[-60:]}"


def describe_skipped(skipped: dict[str, list[str]], shown: int = 3) -> str:
    """The skipped rows as text, such as `image missing: coco.jsonl:4 (dog.jpg), coco.jsonl:9 (cat.jpg) and 5 more; ...`."""
    rest = {reason: len(places) - shown for reason, places in skipped.items()}
    return "; ".join(f"{reason}: {', '.join(places[:shown])}" + (f" and {rest[reason]} more" if rest[reason] > 0 else "") for reason, places in skipped.items())


@dataclass(frozen=True)
class Samples(Sequence[Sample]):
    """The good samples, in the order in which they were drawn. `skipped`: reason -> places of the rows that were skipped for it."""

    path: str
    samples: tuple[Sample, ...]
    skipped: dict[str, list[str]] = field(default_factory=dict)
    rows: int = 0  # number of rows of the source
    wanted: int | None = None  # number of samples asked for

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Sample, ...]: ...
    def __getitem__(self, i: int | slice) -> Sample | tuple[Sample, ...]:
        return self.samples[i]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    def summary(self) -> str:
        """How many samples there are, and which rows were skipped for which reason."""
        count = sum(map(len, self.skipped.values()))
        lines = [f"{len(self)} samples from {self.path} ({self.rows} rows)"]
        if self.wanted is not None and len(self) < self.wanted:
            lines[0] += f": fewer than the {self.wanted} asked for, it has no more good ones"
        if count:
            lines.append(f"{count} of {count + len(self)} rows skipped: {describe_skipped(self.skipped)}")
        return "\n".join(lines)


def read_samples(
    path: str | Path,
    images: str | Path | None = None,
    *,
    split: str = "train",
    prompt: str = PROMPT,
    count: int | None = None,
    seed: int = 0,
) -> Samples:
    """The first `count` good rows after a shuffle with `seed`, or all good rows. Pictures of rows that are not drawn are not opened.

    Args:
        path: JSON, JSON Lines, COCO captions, CSV, text, parquet or arrow; a folder of pictures or of a data set; owner/name (or
            owner/name:configuration) on the hub. Rows have messages, conversations, question with answer, caption, or text.
        images: folder that the pictures are in; by default that of the file. If it is given, no picture outside it is opened.
        split: which split to read of a data set that has several.
        prompt: the question that captions answer.
        count: how many samples; None for all. A bad row is replaced by the next good one.
        seed: seed of the shuffle. The same seed draws the same rows, and a smaller count draws the first of them.
    """
    if count is not None and count < 1:
        raise UserError(f"count={count}: draw at least 1 sample, or all with None")
    if not prompt.strip():
        raise UserError(f"prompt={prompt!r}: captions need a question, such as {PROMPT!r}")
    if images is not None and not Path(images).expanduser().is_dir():
        raise UserFileError(f"images={str(images)!r}: no such folder; pass the one that the samples' image paths are relative to")
    rows = rows_of(path, split)
    folder = rows.folder if images is None else Path(images).expanduser()
    order = list(range(rows.count))
    random.Random(seed).shuffle(order)
    good: list[Sample] = []
    skipped: dict[str, list[str]] = {}
    for i in order:
        if len(good) == count:
            break
        try:
            messages = as_messages(rows.row(i), prompt, lambda value: located(value, folder, images is not None))
            for image in pictures_of(messages):
                check(image)
            good.append(Sample(messages, rows.place(i)))
        except BadRow as error:
            skipped.setdefault(error.reason, []).append(f"{rows.place(i)} ({shortened(error.detail)})")
    if not good:
        why = describe_skipped(skipped) or "it is empty"
        raise UserError(f"path={str(path)!r}: none of its {rows.count} rows is a sample: {why}. A good row: {EXAMPLE}", PATH)
    found = Samples(str(path), tuple(good), skipped, rows.count, count)
    if skipped or len(good) < (count or 0):
        warnings.warn(found.summary(), stacklevel=2)
    return found
