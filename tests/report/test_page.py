"""The page without a browser: complete, with each part missing in turn, and with hostile content."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.report.made import SIZES, write_json
from tests.report.parsed import Page
from torchao_qig import Calibration, report
from torchao_qig.methods.per_sample import MODALITIES

PARTS = {
    "calibration": "errors before and after",
    "sensitivity": "how much each token",
    "samples": "pictures and texts",
    "receipt": "what was quantized",
    "evaluation": "accuracy against size",
    "bench": "speed and memory",
}
HOSTILE = "<script>alert(1)</script>"


def page_of(directory: Path) -> Page:
    return Page(report.write(directory).read_text())


def decoded(uri: str) -> Image.Image:
    head, data = uri.split(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def edited(directory: Path, part: str) -> Any:
    return json.loads((directory / "qig" / f"{part}.json").read_text())


def test_everything_is_on_the_page(page: Path) -> None:
    found = Page(page.read_text())
    for heading in ("What the tokens", "Which kinds of tokens", "Error before and after", "Quality and speed", "Time and memory", "What was quantized"):
        assert any(heading in text for _, text in found.all("h2"))
    head = ("3 bits", "groups of 64", "2.86 MiB to 1.62 MiB", "0.0123", "97.0% of 33 tokens")
    for fact in (*head, "14 linears were quantized, 1 were left", "lm_head", "3 samples were used"):
        assert fact in found.text
    assert "57% of full precision" in found.text
    assert "80.0% (70.0% to 90.0%)" in found.text
    assert "Not here" not in found.text
    assert page.name == "report.html"
    assert page.parent.name == "report"


def test_nothing_is_loaded(page: Path) -> None:
    """No address but data, and a policy that allows nothing else; its script is the one that is hashed."""
    text = page.read_text()
    found = Page(text)
    for _, attributes, _ in found.elements:
        for name in ("src", "href", "xlink:href", "data", "action"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#"))
        assert not any(name.startswith("on") for name in attributes)
    assert "url(http" not in text
    assert "@import" not in text
    script = next(text for attributes, text in found.all("script") if not attributes)
    policy = next(attributes["content"] for attributes, _ in found.all("meta") if attributes.get("http-equiv"))
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy
    assert policy.count("unsafe") == 1  # styles


def test_identifiers_are_unique(page: Path) -> None:
    found = Page(page.read_text())
    names = [attributes["id"] for _, attributes, _ in found.elements if "id" in attributes]
    assert len(names) == len(set(names))
    used = {attributes[name][1:] for _, attributes, _ in found.elements for name in ("href", "xlink:href") if attributes.get(name, "").startswith("#")}
    assert used <= set(names)


def test_tokens_have_their_weights(complete: Path, page: Path) -> None:
    """Every token of every sample, in order, with the mean over the groups, 1 being uniform; runs of vision tokens are one."""
    calibration = Calibration.load(complete / "qig" / "sensitivity")
    found = [(attributes, text) for attributes, text in Page(page.read_text()).all("span", "token") if "data-count" in attributes]
    at = 0
    for number, sample in enumerate(edited(complete, "samples")):
        each = [calibration.token_weights(label) for label in calibration.tokens]
        kept = each[0].modality[number] != MODALITIES["padding"]
        mean = torch.stack([t.weights[number][kept] * kept.sum() for t in each]).mean(0)
        codes = each[0].modality[number][kept].tolist()
        position = 0
        while position < len(codes):
            attributes, text = found[at]
            count = int(attributes["data-count"])
            assert float(attributes["title"].split()[-1]) == pytest.approx(float(mean[position : position + count].mean()), abs=0.0051)
            if codes[position] == MODALITIES["vision"]:
                assert set(codes[position : position + count]) == {MODALITIES["vision"]}
                assert text == f"picture, {count} tokens"
            else:
                assert (count, text) == (1, sample["tokens"][position])
                assert ("answer" in attributes["class"].split()) == (codes[position] == MODALITIES["answer"])
            position += count
            at += 1
    assert at == len(found)


def test_maps_lie_over_pictures(complete: Path, page: Path) -> None:
    """One strip per picture: a map per view, of the layout that the sizes imply; the pictures themselves are there, too."""
    found = Page(page.read_text())
    pictures = [decoded(attributes["src"]) for attributes, _ in found.all("img") if attributes.get("class") != "maps" and attributes["alt"]]
    assert [p.size for p in pictures] == SIZES
    maps = [decoded(attributes["src"]) for attributes, _ in found.all("img", "maps")]
    views = 1 + len(Calibration.load(complete / "qig" / "sensitivity").tokens)
    assert [m.size for m in maps] == [(4, 2 * views), (2, 2 * views), (2, 4 * views)]
    assert all("tokens" in attributes["alt"] for attributes, _ in found.all("img", "maps"))


def test_data_of_the_control(complete: Path, page: Path) -> None:
    """Its weights decode to the calibration's."""
    found = Page(page.read_text())
    data = json.loads(next(text for attributes, text in found.all("script") if attributes.get("id") == "weights"))
    calibration = Calibration.load(complete / "qig" / "sensitivity")
    assert sorted(data["views"]) == ["all", "mlp", "mlp.down_proj", "self_attn", "self_attn.o_proj"]
    [name, view] = data["views"]["mlp"][1]
    assert name == "1"
    steps = np.frombuffer(base64.b64decode(data["weights"][0][view]), dtype=np.uint8)
    weights = calibration.token_weights("model.language_model.layers.1.mlp")
    expected = weights.weights[0] * (weights.modality[0] > 0).sum()
    text = expected[weights.modality[0] != MODALITIES["vision"]].numpy()
    shown = 2 ** ((steps / 127 - 1) * data["span"])
    start = int((weights.modality[0] == MODALITIES["vision"]).int().argmax())
    np.testing.assert_allclose(np.delete(shown, start), np.clip(text, 1 / 64, 64), rtol=0.0171)


def test_figures_are_files_too(page: Path) -> None:
    names = {"sensitivity", "errors", "size", "time"}
    assert {p.stem for p in page.parent.glob("*.svg")} == names
    for name in names:
        assert ET.fromstring((page.parent / f"{name}.svg").read_text()).tag.endswith("svg")
        with Image.open(page.parent / f"{name}.png") as image:
            assert min(image.size) > 100
    labels = [attributes["aria-label"] for attributes, _ in Page(page.read_text()).all("svg")]
    assert len(labels) == len(names)
    assert all(label.endswith(".") for label in labels)


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("part", PARTS)
def test_what_is_missing_is_said(copied: Path, part: str) -> None:
    """With the command that adds it; the rest stays."""
    if part in ("calibration", "sensitivity"):
        shutil.rmtree(copied / "qig" / part)
    else:
        (copied / "qig" / f"{part}.json").unlink()
    found = page_of(copied)
    notes = [text for attributes, text in found.all("p") if "Not here" in text]
    assert len(notes) == 1
    assert PARTS[part] in notes[0]
    command = {"evaluation": "evaluate", "bench": "bench"}.get(part, "quantize")
    assert any(f"torchao-qig {command} " in text for _, text in found.all("code"))
    assert len(list(found.all("article"))) == 3
    assert (len(list(found.all("img", "maps"))) > 0) == (part != "sensitivity")


def test_an_empty_folder_still_gives_a_page(tmp_path: Path) -> None:
    (tmp_path / "model" / "qig").mkdir(parents=True)
    found = page_of(tmp_path / "model")
    assert found.text.count("Not here") == len(PARTS)
    assert "model" in next(text for _, text in found.all("h1"))


@pytest.mark.usefixtures("without_figures")
def test_no_pictures_left(copied: Path) -> None:
    """The thumbnails are gone: maps stay, and the page says so."""
    shutil.rmtree(copied / "qig" / "samples")
    found = page_of(copied)
    assert "samples/0-0.png is missing" in found.text
    assert len(list(found.all("img", "maps"))) == 3


@pytest.mark.usefixtures("without_figures")
def test_damaged_pictures_and_other_files_are_not_shown(copied: Path) -> None:
    (copied / "qig" / "samples" / "0-0.png").write_bytes(b"no picture")
    (copied / "secret.png").write_bytes((copied / "qig" / "samples" / "1-0.png").read_bytes())
    samples = edited(copied, "samples")
    samples[1]["images"][0]["file"] = "../secret.png"
    write_json(copied / "qig" / "samples.json", samples)
    found = page_of(copied)
    assert "samples/0-0.png is missing" in found.text
    assert "../secret.png is missing" in found.text
    assert len([a for a, _ in found.all("img") if a.get("class") != "maps" and a["alt"]]) == 1


@pytest.mark.usefixtures("without_figures")
def test_unknown_places_are_a_strip(copied: Path) -> None:
    """Without a size no layout can be known: the tokens are shown in order, beside the picture."""
    samples = edited(copied, "samples")
    del samples[0]["images"][0]["width"]
    write_json(copied / "qig" / "samples.json", samples)
    found = page_of(copied)
    assert "which of the vision tokens belong to which picture is not known" in found.text
    assert "14 tokens in the order of the sample" in found.text
    assert decoded(next(found.all("img", "maps"))[0]["src"]).width == 32


@pytest.mark.usefixtures("without_figures")
def test_tokens_that_do_not_fit_are_numbered(copied: Path) -> None:
    samples = edited(copied, "samples")
    samples[0]["tokens"].pop()
    write_json(copied / "qig" / "samples.json", samples)
    found = page_of(copied)
    assert "tokens are shown by their numbers" in found.text
    assert next(text for attributes, text in found.all("span", "token") if "data-count" in attributes) == "#0"


def test_hostile_strings_are_text(copied: Path) -> None:
    """Tokens, names, reasons, settings and group labels are shown as they are and run nothing."""
    quotes = f"\"><img src=x onerror='alert(1)'>{HOSTILE} {{{{7*7}}}} $x^2$"
    samples = edited(copied, "samples")
    samples[0]["tokens"][0] = HOSTILE
    samples[0]["source"] = quotes
    samples[0]["images"][0]["file"] = quotes
    write_json(copied / "qig" / "samples.json", samples)
    receipt = edited(copied, "receipt") | {"model": quotes, "created": quotes, "command": quotes, "device": quotes, "recipe": {quotes: quotes}}
    receipt["plan"]["left"] = {quotes: [quotes]}
    receipt["samples"]["skipped"] = {quotes: 1}
    write_json(copied / "qig" / "receipt.json", receipt)
    for part in ("evaluation", "bench"):
        table = edited(copied, part)
        table["rows"][0]["name"] = table["command"] = quotes
        write_json(copied / "qig" / f"{part}.json", table)
    path = copied / "qig" / "sensitivity" / "calibration.json"
    path.write_text(path.read_text().replace("self_attn.o_proj", "self_attn.</script><script>alert(2)//"))
    text = report.write(copied).read_text()
    found = Page(text)
    assert HOSTILE not in text
    assert "<img src=x" not in text
    assert next(t for _, t in found.all("h1")) == quotes
    assert len(list(found.all("script"))) == 2
    assert any(t == HOSTILE for _, t in found.all("span", "token"))
    assert "49" not in next(t for _, t in found.all("title"))
    assert all(attributes["src"].startswith("data:") for attributes, _ in found.all("img"))
    json.loads(next(t for attributes, t in found.all("script") if attributes.get("id") == "weights"))


@pytest.mark.usefixtures("without_figures")
def test_padding_is_dropped_on_either_side(copied: Path) -> None:
    """Padded rows give the page that the same rows without padding give."""
    before = report.write(copied).read_text()
    path = copied / "qig" / "sensitivity"
    calibration = Calibration.load(path)
    pads = [(3, 0), (0, 2), (1, 1)]
    calibration.modality = [torch.nn.functional.pad(m, pad) for m, pad in zip(calibration.modality, pads, strict=True)]
    calibration.tokens = {k: [torch.nn.functional.pad(w, pad) for w, pad in zip(ws, pads, strict=True)] for k, ws in calibration.tokens.items()}
    calibration.save(path)
    assert report.write(copied).read_text() == before


def test_the_output_can_be_elsewhere(complete: Path, tmp_path: Path) -> None:
    path = report.write(complete, tmp_path / "new" / "page.html")
    assert path == tmp_path / "new" / "page.html"
    assert path.with_name("errors.svg").exists()


def test_no_quantized_directory(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=re.escape(f"directory={str(directory)!r}: no folder qig/")):
            report.write(directory)


@pytest.mark.parametrize("content", ["{", "3", '{"rows": [1]}', '[["a"]]'])
def test_damaged_json_is_named(copied: Path, content: str) -> None:
    (copied / "qig" / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=r"file='.*evaluation\.json': .* run the command"):
        report.write(copied)


@pytest.mark.parametrize("file", ["calibration.json", "calibration.safetensors"])
def test_a_damaged_calibration_is_named(copied: Path, file: str) -> None:
    (copied / "qig" / "calibration" / file).write_bytes(b"\x00")
    with pytest.raises(ValueError, match=r"directory='.*calibration': cannot read this calibration"):
        report.write(copied)
