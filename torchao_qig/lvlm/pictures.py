"""Find, check and open the pictures of samples. Pictures lie below one folder; none is fetched from a network."""

from __future__ import annotations

import base64
import binascii
import os
from io import BytesIO
from pathlib import Path
from typing import Any

from torchao_qig.errors import UserError

SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")  # JPEG, PNG, GIF, WebP, BMP, TIFF
LONG = 256  # characters: a shorter text is taken for a path, not for a picture


class BadRow(UserError):
    """A row that is no sample. `reason`: the kind of fault, by which rows are counted. `detail`: what exactly is wrong with this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def located(value: Any, folder: Path, confined: bool) -> Any:
    """The picture that a row names, as a path, bytes or a PIL image. It is not opened.

    A relative path is relative to `folder` and must not leave it. If pictures are `confined` to `folder`, an absolute path must lie in it, too.
    A long text that names no file may be the picture itself, in base64.
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
    """The picture in a URL such as data:image/png;base64,..."""
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
    """Read the whole picture; raises `BadRow` if it is damaged."""
    from PIL import Image

    try:
        if not isinstance(image, Image.Image):
            with Image.open(BytesIO(image) if isinstance(image, bytes) else image) as picture:
                picture.verify()
        opened(image)
    except Exception as error:  # decoders raise any kind of exception
        raise BadRow("image unreadable", f"{image.name if isinstance(image, Path) else type(image).__name__}: {error}") from error
