"""The site builds without a warning, its links and anchors lead somewhere, and its pages load nothing from a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from docs.hooks import linked, links, place
from tests.docs.pages import DOCS, ROOT

LOADED = {  # tag -> attributes that make a browser fetch something
    "script": ("src",), "img": ("src", "srcset"), "source": ("src", "srcset"), "iframe": ("src",), "embed": ("src",), "object": ("data",),
    "video": ("src", "poster"), "audio": ("src",), "track": ("src",), "use": ("href", "xlink:href"), "input": ("src",),
}  # fmt: skip
LINK_RELATIONS = {"stylesheet", "icon", "shortcut", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "manifest", "apple-touch-icon"}
ELSEWHERE = re.compile(r"^\s*(?:https?:)?//", re.IGNORECASE)


class Page(HTMLParser):
    """What one page links to, which places it has, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.loads: list[str] = []
        self._style = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.places |= {found[name] for name in ("id", "name") if name in found}
        self._style = tag == "style"
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        self.loads += [found[name] for name in LOADED.get(tag, ()) if name in found]
        if tag == "link" and LINK_RELATIONS & set(found.get("rel", "").lower().split()):
            self.loads.append(found.get("href", ""))
        self.loads += loads_of_css(found.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._style:
            self.loads += loads_of_css(data)

    def handle_endtag(self, tag: str) -> None:
        self._style = False


def loads_of_css(text: str) -> list[str]:
    quoted = re.findall(r"url\(\s*['\"]?([^'\")]+)|@import\s+['\"]([^'\"]+)", text)
    return [first or second for first, second in quoted]


def loaded_from_elsewhere(site: Path) -> list[str]:
    found = [(page, load) for page in site.rglob("*.html") for load in Page(page.read_text(encoding="utf-8")).loads]
    found += [(sheet, load) for sheet in site.rglob("*.css") for load in loads_of_css(sheet.read_text(encoding="utf-8"))]
    return [f"{path.relative_to(site)}: {load}" for path, load in found if ELSEWHERE.match(load)]


def broken(site: Path) -> list[str]:
    """Links within the site that lead nowhere, and anchors that are not on their page."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            base = site if parts.path.startswith("/") else path.parent
            target = Path(os.path.normpath(base / unquote(parts.path).lstrip("/"))) if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file() or not target.is_relative_to(site):
                wrong.append(f"{path.relative_to(site)}: {link}")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].places:
                wrong.append(f"{path.relative_to(site)}: {link}: no such anchor")
    return wrong


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(site)]
    return subprocess.run(command, cwd=config.parent, capture_output=True, text=True, timeout=300, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return folder


def test_links_lead_somewhere(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > 20
    assert broken(site) == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert loaded_from_elsewhere(site) == []


def test_every_page_is_in_the_navigation() -> None:
    def pages(nav: object) -> list[str]:
        parts = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else []
        return [nav] if isinstance(nav, str) else [page for part in parts for page in pages(part)]

    told = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])

    assert len(told) == len(set(told))
    assert {path.name for path in DOCS.glob("*.md")} == {page for page in told if "/" not in page}


def test_what_is_wrong_is_found(site: Path, tmp_path: Path) -> None:
    """A link to nowhere, an anchor that is not there, a script, a style sheet, a font and a picture from elsewhere."""
    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    page = copy / "quickstart.html"
    page.write_text(
        page.read_text().replace(
            "</body>",
            '<a href="nowhere.html">x</a><a href="settings.html#nowhere">x</a><script src="https://cdn.example/x.js"></script>'
            '<link rel="stylesheet" href="//cdn.example/x.css"><style>@font-face{src:url(https://cdn.example/x.woff2)}</style>'
            '<img srcset="https://cdn.example/x.png 2x"><a href="https://example.org">fine</a></body>',
        )
    )

    assert [line.split(": ", 1)[1] for line in broken(copy)] == ["nowhere.html", "settings.html#nowhere: no such anchor"]
    assert [line.rsplit("/", 1)[1] for line in loaded_from_elsewhere(copy)] == ["x.js", "x.css", "x.woff2", "x.png 2x"]


def test_a_broken_page_does_not_build(tmp_path: Path) -> None:
    """`--strict` is strict: a page with a link to nowhere ends the build."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[x](nowhere.md)\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    kept = settings[settings.index("validation:") : settings.index("nav:\n  - Home")]
    (tmp_path / "mkdocs.yml").write_text(f"site_name: x\n{kept}")

    assert build(tmp_path / "mkdocs.yml", tmp_path / "site").returncode != 0


def test_files_of_the_repository_come_along(site: Path) -> None:
    """A link out of docs/ is a page of the site; links in code are not links."""
    assert list(links("a [b](../x.md#c) `[d](e.md)`\n```text\n[f](g.md)\n```\n[h](https://i) [j](#k)")) == ["../x.md"]
    assert place(ROOT / "benchmarks" / "results" / "accuracy.md") == "repository/benchmarks/results/accuracy.md"
    assert place(DOCS / "index.md") == "index.md"
    assert ROOT / "benchmarks" / "results" / "accuracy.md" in linked([DOCS / "small_lvlm.md"])
    assert (site / "repository" / "benchmarks" / "results" / "accuracy.html").is_file()
