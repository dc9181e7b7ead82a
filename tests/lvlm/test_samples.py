"""Every format that samples come in, every way in which a row is bad, and that drawing is deterministic."""

import csv
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.lvlm.conftest import COLOURS, FILES, png
from torchao_qig.lvlm.pictures import opened
from torchao_qig.lvlm.samples import PROMPT, Sample, Samples, read_samples

CAPTIONS = ["A dog on grass.", "Two cats asleep.", "A red bus.\nIt stands."]


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
