"""Pictures of samples: found below one folder, checked, opened. Nothing is fetched from a network."""

from __future__ import annotations

import base64
import binascii
import os
from io import BytesIO
from pathlib import Path
from typing import Any

from torchao_qig.errors import UserError

SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")  # JPEG, PNG, GIF, WebP, BMP, TIFF
LONG = 256  # characters: what is shorter is rather a path than a picture


class BadRow(UserError):
    """A row that is no sample: the reason, by which rows are counted, and what it was here."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def located(value: Any, folder: Path, confined: bool) -> Any:
    """A picture as a row names it -> a path, bytes or a PIL image. It is not opened.

    Relative paths are below `folder` and stay there; absolute ones, too, where pictures are `confined` to it.
    A long text that is no file may be the picture itself, in base64.
    """
    if isinstance(value, dict) and {"bytes", "path"} & set(value):  # as `datasets` stores pictures
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) or hasattr(value, "convert"):
        return value
    if not isinstance(value, (str, Path)):
        raise BadRow("wrong type", f"an image is {type(value).__name__}; it can be a path, bytes, a PIL image or {{'bytes': ..., 'path': ...}}")
    text = str(value).removeprefix("file://")
    if text.startswith("data:"):
        return _inline(text)
    if "://" in text:
        raise BadRow("image is a URL", f"{text}; download it first, nothing is fetched")
    path = Path(os.path.normpath(folder / text))
    inside = path.is_relative_to(os.path.normpath(folder))
    allowed = inside or (Path(text).is_absolute() and not confined)
    if allowed and os.path.isfile(path):
        return path
    if len(text) > LONG and (picture := _encoded(text)) is not None:
        return picture
    if not allowed:
        raise BadRow("image outside its folder", f"{text} is not in {folder}")
    raise BadRow("image missing", text)


def _encoded(text: str) -> bytes | None:
    """A picture written as base64, in one line or several."""
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except ValueError:
        return None
    return data if data.startswith(SIGNATURES) else None


def _inline(url: str) -> bytes:
    """data:image/png;base64,..."""
    head, _, data = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("not base64")
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadRow("image unreadable", f"{head[:40]}: {error}") from error


def opened(image: Any) -> Any:
    """The picture in memory, upright, in RGB."""
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image).convert("RGB")
    with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as picture:
        return ImageOps.exif_transpose(picture).convert("RGB")


def check(image: Any) -> None:
    """Reads the whole picture; a damaged one is a bad row."""
    from PIL import Image

    try:
        if not isinstance(image, Image.Image):
            with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as picture:
                picture.verify()
        opened(image)
    except Exception as error:  # decoders raise whatever they like
        raise BadRow("image unreadable", f"{image.name if isinstance(image, Path) else type(image).__name__}: {error}") from error
