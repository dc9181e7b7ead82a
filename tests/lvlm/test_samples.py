"""Every format that samples come in, every way in which a row is bad, and that drawing is deterministic."""

import base64
import csv
import io
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from torchao_qig.errors import UserError, UserFileError
from torchao_qig.lvlm.messages import as_messages
from torchao_qig.lvlm.mixes import few_shot, interleaved
from torchao_qig.lvlm.pictures import BadRow, located, opened
from torchao_qig.lvlm.samples import PROMPT, Sample, Samples, naming_argument, read_samples, shortened

CAPTIONS = ["A dog on grass.", "Two cats asleep.", "A red bus.\nIt stands."]
FILES = ["dog.png", "sub/cats.png", "bus.png"]
COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8 + i, 6), COLOURS[i]).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with the three pictures; what tests write goes beside them."""
    (tmp_path / "sub").mkdir()
    for i, name in enumerate(FILES):
        (tmp_path / name).write_bytes(png(i))
    return tmp_path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` prepares goes into a temporary folder."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def said(sample: Sample) -> list[tuple[str, list[str]]]:
    """Roles with texts, and the red, green or blue of pictures."""

    def word(part: dict[str, Any]) -> str:
        return part["text"] if part["type"] == "text" else f"<{COLOURS.index(opened(part['image']).getpixel((0, 0)))}>"

    return [(m["role"], [word(part) for part in m["content"]]) for m in sample.messages]


def in_order(samples: Samples) -> list[Any]:
    return [said(s) for s in sorted(samples, key=lambda s: [int(n) for n in re.findall(r"\d+", s.source)])]


def caption(i: int, text: str | None = None, prompt: str = PROMPT) -> list[tuple[str, list[str]]]:
    return [("user", [f"<{i}>", prompt]), ("assistant", [text or CAPTIONS[i]])]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [{"id": i, "image": file, "caption": text} for i, (file, text) in enumerate(zip(FILES, CAPTIONS, strict=True))]


def _coco(folder: Path) -> Path:
    images = [{"id": 10 * i, "file_name": file} for i, file in enumerate(FILES)]
    notes = [{"image_id": 10 * i, "id": i, "caption": text} for i, text in enumerate(CAPTIONS)]
    (folder / "captions.json").write_text(json.dumps({"info": {}, "images": images, "annotations": [*notes, {"image_id": 0, "caption": "another"}]}))
    return folder / "captions.json"


def _json(folder: Path) -> Path:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return folder / "rows.json"


def _csv(folder: Path) -> Path:
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "image", "caption"])
        writer.writeheader()
        writer.writerows(ROWS)
    return folder / "rows.csv"


def _metadata_csv(folder: Path) -> Path:
    _csv(folder).rename(folder / "metadata.csv")
    (folder / "metadata.csv").write_text((folder / "metadata.csv").read_text().replace("image,caption", "file_name,text"))
    return folder


def _beside(folder: Path) -> Path:
    for file, text in zip(FILES, CAPTIONS, strict=True):
        (folder / file).with_suffix(".txt").write_text(text + "\n")
    return folder


def _stored() -> Any:
    import datasets

    rows = {"image": [{"bytes": png(i), "path": None} for i in range(3)], "caption": CAPTIONS}
    return datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")}))


def _parquet(folder: Path) -> Path:
    _stored().to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def _parquets(folder: Path) -> Path:
    (folder / "set").mkdir()
    _stored().to_parquet(folder / "set" / "train-00000-of-00001.parquet")
    return folder / "set"


def _saved(folder: Path) -> Path:
    _stored().save_to_disk(folder / "set")
    return folder / "set"


def _saved_splits(folder: Path) -> Path:
    import datasets

    datasets.DatasetDict({"test": _stored().select([0]), "train": _stored()}).save_to_disk(folder / "set")
    return folder / "set"


def _arrow(folder: Path) -> Path:
    return next(_saved(folder).glob("*.arrow")).rename(folder / "rows.arrow")


FORMATS: dict[str, Callable[[Path], Path]] = {
    "coco": _coco,
    "json": _json,
    "jsonl": lambda folder: jsonl(folder / "rows.jsonl", ROWS),
    "jsonl by another name": lambda folder: jsonl(folder / "rows.data", ROWS),
    "csv": _csv,
    "metadata.csv": _metadata_csv,
    "metadata.jsonl": lambda folder: jsonl(folder / "metadata.jsonl", [{"file_name": r["image"], "text": r["caption"]} for r in ROWS]).parent,
    "folder": _beside,
    "parquet": _parquet,
    "folder of parquet": _parquets,
    "saved": _saved,
    "saved splits": _saved_splits,
    "arrow": _arrow,
}


@pytest.mark.parametrize("form", FORMATS)
def test_formats(form: str, pictures: Path) -> None:
    """The same three captioned pictures come out of each."""
    path = FORMATS[form](pictures)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_samples(path)
    assert sorted(map(said, found)) == [caption(i) for i in range(3)]
    assert found.rows == 3
    assert not found.skipped
    assert all(path.name.removesuffix(".csv") in s.source or path.name == s.source.split("/")[0] or s.source.startswith("metadata") for s in found)
    assert sorted(map(said, read_samples(path, prompt="What?"))) == [caption(i, prompt="What?") for i in range(3)]


def test_images_elsewhere(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = jsonl(tmp_path_factory.mktemp("notes") / "rows.jsonl", ROWS)
    assert sorted(map(said, read_samples(path, pictures))) == [caption(i) for i in range(3)]
    with pytest.raises(FileNotFoundError, match="images='nowhere': no such folder"):
        read_samples(path, "nowhere")


URL = "data:image/png;base64," + base64.b64encode(png(1)).decode()
TURNS: dict[str, tuple[dict[str, Any], list[tuple[str, list[str]]]]] = {
    "llava": (
        {
            "image": "dog.png",
            "conversations": [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "A dog."}, {"from": "human", "value": "So?"}],
        },
        [("user", ["<0>", "Who?"]), ("assistant", ["A dog."]), ("user", ["So?"])],
    ),
    "picture behind the text": (
        {"image": "dog.png", "conversations": [{"from": "human", "value": "Who?\n<image>"}, {"from": "gpt", "value": "A dog."}]},
        [("user", ["Who?", "<0>"]), ("assistant", ["A dog."])],
    ),
    "no place": (
        {"image": ["dog.png", "bus.png"], "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Who?"}]},
        [("system", ["Be brief."]), ("user", ["<0>", "<2>", "Who?"])],
    ),
    "text only": ({"image": None, "conversations": [{"from": "human", "value": "Hi"}]}, [("user", ["Hi"])]),
    "vqa": ({"image": "dog.png", "question": "Who?", "answer": "A dog."}, [("user", ["<0>", "Who?"]), ("assistant", ["A dog."])]),
    "answers": (
        {"images": ["bus.png", "dog.png"], "question": "First <image> or second <image>?", "answers": ["", "Both", "None"]},
        [("user", ["First", "<2>", "or second", "<0>", "?"]), ("assistant", ["Both"])],
    ),
    "openai": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Who?"}, {"type": "image_url", "image_url": {"url": URL}}]}]},
        [("user", ["Who?", "<1>"])],
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "and"}, {"type": "image"}]},
                {"role": "assistant", "content": "No."},
            ],
            "images": ["bus.png", "dog.png"],
        },
        [("user", ["<2>", "and", "<0>"]), ("assistant", ["No."])],
    ),
    "inline": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "bus.png"}, {"type": "image", "path": "file://dog.png"}, {"type": "text", "text": "?"}]}
            ]
        },
        [("user", ["<2>", "<0>", "?"])],
    ),
    "five captions": ({"image": "dog.png", "caption": ["", "A dog.", "Dog"]}, caption(0, "A dog.")),
    "text": ({"text": "All of it, <image> too."}, [("user", ["All of it, <image> too."])]),
    "captions may name the place": ({"image": "dog.png", "caption": "says <image>"}, caption(0, "says <image>")),
}


@pytest.mark.parametrize("name", TURNS)
def test_rows(name: str, pictures: Path) -> None:
    row, wanted = TURNS[name]
    assert said(read_samples(jsonl(pictures / "rows.jsonl", [row]))[0]) == wanted


def test_pil_images_and_stored_dicts() -> None:
    """What a data set in memory holds."""
    for image in (Image.new("RGB", (8, 8), COLOURS[2]), {"bytes": png(2), "path": "bus.png"}, png(2)):
        messages = as_messages({"image": image, "caption": "A bus."}, PROMPT, lambda value: located(value, Path(), True))
        assert said(Sample(messages, "")) == caption(2, "A bus.")


BAD: dict[str, tuple[Any, str]] = {
    "no known field": ({"picture": "dog.png", "words": "a dog"}, "has picture, words; a sample has one of messages,"),
    "no image": ({"caption": "A dog."}, "a caption without an image"),
    "image missing": ({"image": "wolf.png", "caption": "A wolf."}, "wolf.png"),
    "image unreadable": ({"image": "broken.png", "caption": "A dog."}, "broken.png"),
    "image unreadable (cut)": ({"image": "cut.png", "caption": "A dog."}, "cut.png"),
    "image unreadable (checksum)": ({"image": "flipped.png", "caption": "A dog."}, "flipped.png"),
    "image unreadable (inline)": ({"image": "data:image/png;base64,!", "caption": "A dog."}, "data:image/png;base64"),
    "image is a URL": ({"image": "https://example.com/dog.png", "caption": "A dog."}, "download it first"),
    "image outside its folder": ({"image": "../dog.png", "caption": "A dog."}, "../dog.png is not in"),
    "wrong type (row)": (["dog.png", "A dog."], "the row is list"),
    "wrong type (caption)": ({"image": "dog.png", "caption": 7}, "caption is int, not text"),
    "wrong type (image)": ({"image": 7, "caption": "A dog."}, "an image is int"),
    "wrong type (turns)": ({"messages": "Hi"}, "messages is str"),
    "wrong type (no turns)": ({"messages": []}, "messages is empty"),
    "wrong type (turn)": ({"messages": ["Hi"]}, "turn 1 is str"),
    "wrong type (content)": ({"messages": [{"role": "user"}]}, "turn 1 is NoneType"),
    "unknown role": ({"conversations": [{"from": "tool", "value": "Hi"}]}, "'tool'; known are user"),
    "unknown part": ({"messages": [{"role": "user", "content": [{"type": "video", "video": "x"}]}]}, "video; known are text and image"),
    "images do not match": ({"image": "dog.png", "conversations": [{"from": "human", "value": "<image> <image> Who?"}]}, "2 places for 1 listed images"),
    "images do not match (none)": ({"conversations": [{"from": "human", "value": "<image> Who?"}]}, "1 places for 0"),
    "no answer": ({"image": "dog.png", "question": "Who?", "answer": None}, "the question has no answer"),
    "no text": ({"image": "dog.png", "caption": "  "}, "the assistant's turn 2 is empty"),
    "no text (only images)": ({"messages": [{"role": "user", "content": [{"type": "image", "image": "dog.png"}]}]}, "only images"),
    "no text (system)": ({"messages": [{"role": "system", "content": "Be brief."}]}, "only a system message"),
    "not JSON": ('{"image": "dog.png", ', "Expecting"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows(name: str, pictures: Path) -> None:
    """Each is counted under its reason with its place, and the good row beside it is read."""
    (pictures / "broken.png").write_bytes(b"not a picture")
    (pictures / "cut.png").write_bytes(png(0)[:-30])
    end = png(0).index(b"IEND") - 8  # of the pixels' chunk: its checksum
    (pictures / "flipped.png").write_bytes(png(0)[:end] + bytes(4) + png(0)[end + 4 :])
    row, detail = BAD[name]
    text = row if isinstance(row, str) else json.dumps(row)
    (pictures / "coco.jsonl").write_text(json.dumps(ROWS[0]) + "\n\n" + text + "\n")
    with pytest.warns(UserWarning, match="1 of 2 rows skipped") as caught:
        found = read_samples(pictures / "coco.jsonl")
    reason = name.split(" (")[0]
    assert list(found.skipped) == [reason]
    assert found.skipped[reason][0].startswith("coco.jsonl:3 (")
    assert detail in found.skipped[reason][0]
    assert found.skipped[reason][0] in str(caught[0].message)
    assert [said(s) for s in found] == [caption(0)]


def test_nothing_good(pictures: Path) -> None:
    """The error names path, count, reasons, and shows a row that would do."""
    path = jsonl(pictures / "coco.jsonl", [{"image": "wolf.png", "caption": "x"}, *[{"a": 1}] * 5])
    with pytest.raises(ValueError, match=r"coco.jsonl'?: none of its 6 rows is a sample") as error:
        read_samples(path)
    for part in ("image missing: coco.jsonl:1 (wolf.png)", "no known field: ", "and 2 more", 'A good row: {"image": "dog.jpg"'):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"the file is empty; known are"):
        read_samples(jsonl(pictures / "empty.txt", []))


def test_unknown_formats(pictures: Path) -> None:
    (pictures / "model.bin").write_bytes(bytes(range(128, 256)))
    (pictures / "notes.md").write_text("# Notes")
    (pictures / "odd.json").write_text('{"a": 1}')
    (pictures / "cut.json").write_text('[{"a": 1},')
    (pictures / "nothing").mkdir()
    for name, error in {
        "model.bin": "neither text",
        "notes.md": "not a format",
        "odd.json": "a JSON object with a",
        "cut.json": "neither JSON",
        "nothing": "no pictures",
    }.items():
        with pytest.raises(ValueError, match=rf"{error}(.|\n)*known are JSON|{error}(.|\n)*JSON Lines"):
            read_samples(pictures / name)
    for name in ("nowhere.jsonl", str(pictures / "x"), "./x", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="no such file or folder; known are JSON"):
            read_samples(name)
    with pytest.raises(ValueError, match=r"split='validation': .* has test, train"):
        read_samples(_saved_splits(pictures), split="validation")


def test_hub_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name and its configuration go to `datasets`; without a network the error says what was tried."""
    import datasets

    asked = []

    def load(name: str, configuration: str | None, split: str) -> Any:
        asked.append((name, configuration, split))
        if name == "owner/none":
            raise ConnectionError("offline")
        return _stored()

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = read_samples("owner/set-v1.5:plain", split="test", count=2)
    assert asked == [("owner/set-v1.5", "plain", "test")]
    assert all(said(s) in [caption(i) for i in range(3)] for s in found)
    with pytest.raises(ValueError, match=r"path='owner/none': no such file or folder here, and split='train' of it does not load from the hub: offline"):
        read_samples("owner/none")


def test_absolute_paths(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """They are the user's word, unless images= confines pictures to a folder."""
    path = jsonl(tmp_path_factory.mktemp("notes") / "rows.jsonl", [{"image": str(pictures / "dog.png"), "caption": CAPTIONS[0]}])
    assert said(read_samples(path)[0]) == caption(0)
    assert said(read_samples(path, pictures)[0]) == caption(0)
    with pytest.raises(ValueError, match="image outside its folder"):
        read_samples(path, pictures / "sub")


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


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty rows, every third one bad."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "dog.png").write_bytes(png(0))
    return jsonl(folder / "rows.jsonl", [{"image": "dog.png" if i % 3 else "wolf.png", "caption": f"number {i}"} for i in range(30)])


@given(count=st.integers(1, 30), seed=st.integers(0, 5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_drawing(count: int, seed: int, many: Path) -> None:
    """Deterministic; fewer are the first of more; bad rows are replaced; the summary says so where there are too few."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every, some, again = (read_samples(many, count=n, seed=seed) for n in (None, count, count))
    assert some == again
    assert some.samples == every.samples[:count]
    assert sorted(s.source for s in every) == sorted(f"rows.jsonl:{i + 1}" for i in range(30) if i % 3)
    assert len(some) == min(count, 20)
    assert ("fewer than" in some.summary()) == (count > 20)
    bad = sum(map(len, some.skipped.values()))
    assert (f"{bad} of {bad + len(some)} rows skipped" in some.summary()) == bool(bad)


def test_seeds_differ(many: Path) -> None:
    with pytest.warns(UserWarning, match="10 of 30 rows skipped"):
        first, second = (read_samples(many, seed=seed) for seed in (0, 1))
    assert [s.source for s in first] != [s.source for s in second]


def test_other_pictures_are_not_opened(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only those of rows that are drawn."""
    seen = []
    real = Image.open
    monkeypatch.setattr(Image, "open", lambda file, *a, **k: (seen.append(file), real(file, *a, **k))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_samples(many, count=4)
    assert len(seen) == 8  # each verified, then read


@pytest.mark.parametrize(("argument", "error"), [({"count": 0}, "count=0"), ({"prompt": " "}, "prompt=' '")])
def test_arguments(argument: dict[str, Any], error: str, many: Path) -> None:
    with pytest.raises(ValueError, match=error):
        read_samples(many, **argument)


LINES = st.text(st.sampled_from("aé{} \u2028\u2029\x85\r\n\x0b\x1c"), max_size=9)


@given(st.lists(LINES, min_size=2, max_size=5), st.sampled_from(["\n", "\r\n", "\n\n"]), st.booleans())
def test_json_lines_of_any_text(texts: list[str], end: str, ascii: bool) -> None:
    """A row is what stands between line feeds, whatever else Unicode calls the end of a line."""
    from torchao_qig.lvlm.rows import _text

    rows = _text(Path("a.jsonl"), "".join(json.dumps({"text": t}, ensure_ascii=ascii) + end for t in texts))
    assert [rows.row(i)["text"] for i in range(rows.count)] == texts
    assert [rows.place(i) for i in range(rows.count)] == [f"a.jsonl:{i * end.count(chr(10)) + 1}" for i in range(len(texts))]


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).map(str.strip).filter(bool)


@given(st.lists(st.lists(WORDS, min_size=1, max_size=3).map("\n".join), min_size=1, max_size=5), st.integers(1, 3))
def test_paragraphs(paragraphs: list[str], gap: int) -> None:
    """A text file gives its paragraphs back, with the line where each begins."""
    from torchao_qig.lvlm.rows import _text

    paragraphs = [p for p in paragraphs if p[0] not in "[{"] or ["x"]
    text = ("\n" + " \n" * gap).join(paragraphs)
    rows = _text(Path("a.txt"), text)
    assert [rows.row(i)["text"] for i in range(rows.count)] == paragraphs
    lines = [int(rows.place(i).removeprefix("a.txt:")) for i in range(rows.count)]
    assert [text.split("\n")[n - 1] for n in lines] == [p.split("\n")[0] for p in paragraphs]


@given(st.lists(st.lists(st.one_of(WORDS.filter(lambda w: "<image>" not in w), st.integers(0, 99)), min_size=1, max_size=5), min_size=1, max_size=4))
def test_placeholders_keep_their_order(turns: list[list[str | int]]) -> None:
    """Texts and pictures of a conversation come out as they went in."""
    wanted = [[part for i, part in enumerate(turn) if not (i and isinstance(part, str) and isinstance(turn[i - 1], str))] for turn in turns]
    wanted = [turn if any(isinstance(p, str) for p in turn) else [*turn, "?"] for turn in wanted]
    roles = ["human", "gpt"] * 4
    value = ["".join("<image>\n" if isinstance(p, int) else p for p in turn) for turn in wanted]
    row = {
        "images": [p for turn in wanted for p in turn if isinstance(p, int)],
        "conversations": [{"from": r, "value": v} for r, v in zip(roles, value, strict=False)],
    }
    found = as_messages(row, PROMPT, lambda image: image)
    assert [[part["text"] if part["type"] == "text" else part["image"] for part in m["content"]] for m in found] == wanted


SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["user", "text", "image", "<image>"])
KEYS = st.sampled_from("image images caption text question answer answers messages conversations role from content value type".split())
ODD = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | st.text(max_size=3), inner, max_size=4), max_leaves=12)


@given(ODD)
def test_any_row_is_good_or_bad(row: Any) -> None:
    """No row raises anything else, and good ones have text."""

    def find(value: Any) -> Any:
        return located(value, Path("/nowhere"), True)

    try:
        messages = as_messages(row, PROMPT, find)
    except BadRow:
        return
    assert any(part["type"] == "text" and part["text"] for m in messages for part in m["content"])


def _sample(i: int, answered: bool = True) -> Sample:
    user = {"role": "user", "content": [{"type": "image", "image": i}, {"type": "text", "text": f"q{i}"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": f"a{i}"}]}
    return Sample([{"role": "system", "content": [{"type": "text", "text": f"s{i}"}]}, user, *[answer] * answered], str(i))


@given(n=st.integers(2, 9), shots=st.integers(0, 4), seed=st.integers(0, 9))
def test_few_shot(n: int, shots: int, seed: int) -> None:
    """Every sample is asked once, after others; pictures go with their questions."""
    samples = [_sample(i) for i in range(n)]
    if shots >= n:
        with pytest.raises(ValueError, match=rf"few_shot \(shots\)={shots}: .* there are {n - 1}"):
            few_shot(samples, shots, seed)
        return
    found = few_shot(samples, shots, seed)
    assert found == few_shot(samples, shots, seed)
    for i, sample in enumerate(found):
        assert [m["role"] for m in sample.messages] == ["system"] + ["user", "assistant"] * (shots + 1)
        assert sample.messages[0] == samples[i].messages[0]
        assert sample.messages[-2:] == samples[i].messages[1:]
        assert len(set(sample.images)) == shots + 1
        assert sample.source == " + ".join(map(str, sample.images))
        texts = [m["content"][-1]["text"] for m in sample.messages[1:]]
        assert texts == [f"{role}{image}" for image in sample.images for role in "qa"]


def test_demonstrations_have_answers() -> None:
    samples = [_sample(0), _sample(1, answered=False), _sample(2)]
    assert all("1" not in s.source.split(" + ")[:-1] for seed in range(20) for s in few_shot(samples, 1, seed))
    with pytest.raises(ValueError, match=r"few_shot \(shots\)=2: "):
        few_shot(samples, 2)


@given(n=st.integers(1, 9), per_sample=st.integers(1, 4), seed=st.integers(0, 9))
def test_interleaved(n: int, per_sample: int, seed: int) -> None:
    """Every sample once; pictures before their texts; one conversation that ends with the last one's answer."""
    samples = [_sample(i) for i in range(n)]
    found = interleaved(samples, per_sample, seed)
    assert found == interleaved(samples, per_sample, seed)
    assert sorted(i for s in found for i in s.images) == list(range(n))
    assert [len(s.images) for s in found] == [min(per_sample, n - i) for i in range(0, n, per_sample)]
    for sample in found:
        *before, last = sample.images
        assert [m["role"] for m in sample.messages] == ["system", "user", "assistant"]
        assert sample.messages[0] == samples[last].messages[0]
        parts = [part.get("text", part.get("image")) for part in sample.messages[1]["content"]]
        assert parts == [x for i in before for x in (i, f"a{i}")] + [last, f"q{last}"]
        assert sample.messages[2]["content"][0]["text"] == f"a{last}"


def test_interleaved_text() -> None:
    texts = [Sample([{"role": "user", "content": [{"type": "text", "text": f"t{i}"}]}], str(i)) for i in range(2)]
    only = interleaved(texts, 2)[0]
    assert sorted(part["text"] for part in only.messages[0]["content"]) == ["t0", "t1"]
    with pytest.raises(ValueError, match=r"interleaved \(per_sample\)=0: "):
        interleaved(texts, 0)
