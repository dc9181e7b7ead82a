"""The page in a real browser: it loads nothing, fits narrow screens, and its control does what it says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torchao_qig import Calibration
from torchao_qig.methods.per_sample import MODALITIES
from torchao_qig.report import colours

BROWSER = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on the path")

COLOURS = "[...document.querySelectorAll('.card .token')].map(t => getComputedStyle(t).backgroundColor)"
STRIP = """(() => {
  const frame = document.querySelector('.frame:has(.maps)'), a = frame.getBoundingClientRect(), b = frame.querySelector('.maps').getBoundingClientRect();
  return [(a.top - b.top) / a.height, b.height / a.height];
})()"""  # which map is shown, and how many there are
SIDEWAYS = """[...document.querySelectorAll('main *')].filter(
  e => !e.closest('.scroll, .frame, svg') && e.getBoundingClientRect().right > innerWidth + 1).length"""


class Visit:
    """A page opened at one width, and whatever it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, **options: Any) -> None:
        self.page = browser.new_context(viewport={"width": width, "height": 800}, **options).new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        self.address = path.as_uri()

    def ask(self, question: str) -> Any:
        return self.page.evaluate(question)

    @property
    def quiet(self) -> bool:
        return not self.complaints and [url for url in self.requests if not url.startswith("data:")] == [self.address]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        args = ["--disable-gpu", "--disable-quic", "--disable-sync"]
        opened = started.chromium.launch(executable_path=BROWSER, args=args)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def visit(browser: Any, page: Path) -> Iterator[Visit]:
    found = Visit(browser, page)
    yield found
    assert found.quiet


def test_it_is_quiet_and_whole(visit: Visit) -> None:
    """No complaints, no requests, every picture decoded."""
    images = visit.ask("Promise.all([...document.images].map(async i => { await i.decode(); return [i.complete, i.naturalWidth] }))")
    assert len(images) == 9  # three samples: the picture, the picture below the map, the map
    assert all(complete and width > 0 for complete, width in images)
    assert visit.quiet


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(browser: Any, page: Path, width: int, scheme: str) -> None:
    """No scrolling sideways but inside figures and tables; text stands out from its ground."""
    found = Visit(browser, page, width, color_scheme=scheme)
    assert found.ask("document.documentElement.scrollWidth") <= width
    assert found.ask(SIDEWAYS) == 0
    numbers = "getComputedStyle(document.body)[name].match(/[0-9.]+/g).slice(0, 3).map(Number)"
    ink, ground = (found.ask(f"(name => {numbers})('{name}')") for name in ("color", "backgroundColor"))
    assert abs(sum(ink) - sum(ground)) > 450
    assert (sum(ground) < 200) == (scheme == "dark")
    assert found.ask("getComputedStyle(document.querySelector('svg text')).fill") == found.ask("getComputedStyle(document.body).color")
    assert found.quiet


def test_every_token_is_coloured(visit: Visit, complete: Path) -> None:
    samples = json.loads((complete / "qig" / "samples.json").read_text())
    count = "[...document.querySelectorAll('.card')].map(c => [...c.querySelectorAll('.token')].reduce((n, t) => n + Number(t.dataset.count), 0))"
    assert visit.ask(count) == [len(sample["tokens"]) for sample in samples]
    titled = "[...document.querySelectorAll('.card .token')].every(t => /(: |mean )[0-9.]+$/.test(t.title) && /rgb/.test(getComputedStyle(t).backgroundColor))"
    assert visit.ask(titled)
    assert visit.ask(f"new Set({COLOURS}).size") > 3


def shown(visit: Visit, number: int = 0) -> bytes:
    return bytes(visit.page.locator(".card").nth(number).locator(".frame:has(.maps)").screenshot())


def test_the_control_changes_what_is_shown(visit: Visit) -> None:
    """Each layer of each kind of module shows another map, other colours and other numbers; the first view comes back."""
    titles = "[...document.querySelectorAll('.card .token')].map(t => t.title).join()"
    views = json.loads(visit.ask("document.getElementById('weights').textContent"))["views"]
    before = [shown(visit), visit.ask(f"{COLOURS}.join()"), visit.ask(titles)]
    seen = [before]
    for kind in ("mlp", "self_attn"):
        visit.page.select_option(".controls select", kind)
        for place, (name, view) in enumerate(views[kind]):
            visit.page.locator("[name=layer]").fill(str(place))
            top, height = visit.ask(STRIP)
            assert top == pytest.approx(view, abs=0.01)
            assert height == pytest.approx(sum(map(len, views.values())), abs=0.01)
            assert visit.ask("document.querySelector('.controls output').value") == name
            seen.append([shown(visit), visit.ask(f"{COLOURS}.join()"), visit.ask(titles)])
    for part in zip(*seen, strict=True):
        assert len(set(part)) == len(seen)
    visit.page.select_option(".controls select", "all")
    assert [shown(visit), visit.ask(f"{COLOURS}.join()"), visit.ask(titles)] == before


def test_colours_and_numbers_are_the_weights(visit: Visit, complete: Path) -> None:
    """Of the view that is chosen, token by token, on the scale that the legend shows."""
    found = Calibration.load(complete / "qig" / "sensitivity").token_weights("model.language_model.layers.1.self_attn")
    visit.page.select_option(".controls select", "self_attn")
    visit.page.locator("[name=layer]").fill("1")
    reach = json.loads(visit.ask("document.getElementById('weights').textContent"))["reach"]
    drawn = visit.ask(f"{COLOURS}.slice(0, document.querySelector('.card').querySelectorAll('.token').length)")
    titles = visit.ask("[...document.querySelector('.card').querySelectorAll('.token')].map(t => Number(t.title.split(' ').pop()))")
    kept = (found.weights[0] * (found.modality[0] > 0).sum())[found.modality[0] != MODALITIES["vision"]].numpy()
    start = int((found.modality[0] == MODALITIES["vision"]).int().argmax())  # the picture's tokens are one
    del drawn[start], titles[start]
    np.testing.assert_allclose(titles, kept, rtol=0.0171, atol=0.0051)  # a byte each, then two decimals
    for shade, weight in zip(drawn, kept, strict=True):
        number = int(colours.level(np.array([weight]), reach)[0])
        near = [colours.rgba(n) for n in range(max(0, number - 1), min(colours.LEVELS, number + 2))]  # a byte may round to the next level
        assert any(np.allclose([float(part) for part in re.findall(r"[0-9.]+", shade)], one, atol=0.003) for one in near)
    visit.page.select_option(".controls select", "all")


def test_the_map_can_be_faded_out(visit: Visit) -> None:
    """Without its colours the picture beside it is left."""
    strength = visit.page.locator("[name=strength]")
    coloured = shown(visit)
    strength.fill("0")
    assert shown(visit) != coloured
    assert visit.ask("getComputedStyle(document.querySelector('.maps')).opacity") == "0"
    strength.fill("100")
    assert shown(visit) == coloured


def test_it_is_readable_without_its_script(browser: Any, page: Path) -> None:
    """The first view is there, and the control is not."""
    scripted, found = Visit(browser, page), Visit(browser, page, java_script_enabled=False)
    assert found.ask(STRIP)[0] == 0
    assert found.ask(COLOURS) == scripted.ask(COLOURS)
    assert found.ask(f"new Set({COLOURS}).size") > 3
    assert not found.page.locator(".controls").is_visible()
    assert scripted.page.locator(".controls").is_visible()


def test_it_prints(visit: Visit) -> None:
    """On paper the control is gone; the pictures are not."""
    visit.page.emulate_media(media="print")
    assert not visit.page.locator(".controls").is_visible()
    assert visit.page.locator(".maps").first.is_visible()
    visit.page.emulate_media(media="screen")
