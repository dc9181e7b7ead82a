"""Pictures and tables of every kind, damaged ones among them, and errors that name the argument."""

import base64
import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.lvlm.conftest import COLOURS
from torchao_qig.errors import UserError, UserFileError
from torchao_qig.lvlm.pictures import BadRow, located, opened
from torchao_qig.lvlm.samples import naming_argument, read_samples, shortened


def encoded(kind: str, side: int = 300) -> str:
    """A picture as base64 text, about as noise is: long."""
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("confined", [False, True])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_base64_pictures(kind: str, confined: bool, tmp_path: Path) -> None:
    """Text of a picture is the picture, also in lines; JPEG's begins as an absolute path does."""
    text = encoded(kind, 40)
    for written in (text, "\n".join(text[i : i + 76] for i in range(0, len(text), 76))):
        found = located(written, tmp_path, confined)
        assert found == base64.b64decode(text)
        assert opened(found).size == (40, 40)


SIGNED = (b"\xff\xd8\xff", b"BM", b"\x89PNG\r\n\x1a\n")


@given(st.binary(max_size=400) | st.tuples(st.sampled_from(SIGNED), st.binary(min_size=180, max_size=400)).map(b"".join))
def test_what_is_no_picture_stays_a_path(data: bytes) -> None:
    """Long base64 with the signature of a picture is bytes; any other text is a missing file."""
    text = base64.b64encode(data).decode()
    if len(text) > 256 and data.startswith(SIGNED):
        assert located(text, Path("/nowhere"), True) == data
    else:
        with pytest.raises(BadRow, match=r"image missing|image outside its folder"):
            located(text, Path("/nowhere"), True)


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_tables_with_pictures(suffix: str, tmp_path: Path) -> None:
    """VLMEvalKit's form: pictures as base64 in a table, fields longer than csv takes by itself; what is none is named in few words."""
    text, limit = encoded("PNG"), csv.field_size_limit()
    assert len(text) > limit
    path = tmp_path / f"bench.{suffix}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
        writer.writerows([("index", "image", "question", "answer"), (0, text, "Who?", "Noise."), (1, text[1:], "Who?", "Nobody.")])
    with pytest.warns(UserWarning, match="1 of 2 rows skipped") as caught:
        found = read_samples(path)
    assert [opened(s.images[0]).size for s in found] == [(300, 300)]
    assert list(found.skipped) == ["image missing"]
    assert len(str(caught[0].message)) < 500
    assert csv.field_size_limit() == limit


def test_tables_that_csv_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv.DictReader, "__next__", lambda reader: (_ for _ in ()).throw(csv.Error("line contains NUL")))
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"path='.*a.csv': .*line contains NUL; known are JSON"):
        read_samples(tmp_path / "a.csv")


@given(st.text(st.sampled_from("ab /"), max_size=300), st.integers(0, 300))
def test_details_are_short(text: str, more: int) -> None:
    """About a hundred characters: of longer ones the beginning, the end, and what is left out between them."""
    detail = text + "c" * more
    short = shortened(detail)
    assert len(short) <= 110
    begin, between, end = short.partition(" ... ")
    assert short == detail or (between and len(detail) > 110 and detail.startswith(begin) and detail.endswith(end) and len(begin) >= 40 and len(end) >= 40)


@pytest.mark.parametrize("kind", [UserError, UserFileError])
def test_errors_speak_of_the_argument(kind: type[UserError]) -> None:
    error = kind("path='x': no path=y", "path")
    with pytest.raises(kind) as caught, naming_argument("calib"):
        raise error
    assert type(caught.value) is kind
    assert str(caught.value) == "calib='x': no path=y"
    assert caught.value.argument == "calib"
    assert caught.value.__cause__ is error


OTHERS = [
    ModuleNotFoundError("path='x': needs datasets", name="datasets"), KeyError("path="), ValueError("path='x': of another"), FileNotFoundError("path='x'"),
    UserFileError("images='path=': no such folder"), BadRow("path=3", "odd"),
]  # fmt: skip


@pytest.mark.parametrize("error", OTHERS)
def test_other_errors_pass(error: Exception) -> None:
    """What their text says counts for nothing."""
    with pytest.raises(type(error)) as caught, naming_argument("calib"):
        raise error
    assert caught.value is error


DAMAGED = {"parquet": b"PAR1 and no more", "arrow": b"ARROW1 and no more"}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_data_sets(kind: str, tmp_path: Path) -> None:
    """Whatever the datasets package raises for them."""
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(UserError, match=f"^path='rows.{kind}': the datasets package cannot load it") as caught:
        read_samples(path)
    assert caught.value.argument == "path"


@given(st.lists(st.sampled_from(["..", ".", "a", "", "b.png"]), min_size=1, max_size=6).map("/".join))
def test_no_path_leaves_the_folder(text: str) -> None:
    """Whatever a row names, nothing outside the folder is looked for."""
    with pytest.raises(BadRow) as error:
        located(text, Path("/nowhere/at/all"), True)
    assert error.value.reason in ("image missing", "image outside its folder")
    steps = [] if text.startswith("/") else ["nowhere", "at", "all"]
    for step in text.split("/"):
        steps = steps[:-1] if step == ".." else steps + [step] * (step not in (".", ""))
    assert (error.value.reason == "image outside its folder") == (steps[:3] != ["nowhere", "at", "all"])


def test_exif_and_palettes(tmp_path: Path) -> None:
    """Pictures are upright and in RGB."""
    image = Image.new("RGB", (8, 4), COLOURS[0])
    exif = image.getexif()
    exif[274] = 6  # to be turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    image.convert("P").save(tmp_path / "b.png")
    assert opened(tmp_path / "a.jpg").size == (4, 8)
    assert opened(tmp_path / "b.png").mode == "RGB"
