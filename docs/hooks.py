"""A hook of mkdocs: files outside docs/ that pages link to (results, recipes) become part of the site.

A link means the same on the code host and in the site: `../benchmarks/results/accuracy.md` in a page is that file. The hook gives such a file a place
below `repository/` and rewrites the links to it. Files that those files link to come along.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
OUTSIDE = "repository"
LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=(?:#[^)\s]*)?\))")  # a relative target, without its anchor
CODE = re.compile(r"^(```|~~~).*?^\1[^\S\n]*$|`[^`\n]+`", re.MULTILINE | re.DOTALL)


def links(text: str) -> Iterator[str]:
    """Relative targets, not those in code."""
    yield from LINK.findall(CODE.sub("", text))


def place(path: Path) -> str:
    """Where a file of the repository is among the site's sources."""
    return path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else f"{OUTSIDE}/{path.relative_to(ROOT).as_posix()}"


def linked(start: list[Path]) -> set[Path]:
    """Files outside docs/ that these pages link to, directly or through each other."""
    found: set[Path] = set()
    waiting = list(start)
    while waiting:
        page = waiting.pop()
        for target in links(page.read_text(encoding="utf-8")):
            path = Path(os.path.normpath(page.parent / target))
            if path.is_file() and path.is_relative_to(ROOT) and not path.is_relative_to(DOCS) and path not in found:
                found.add(path)
                waiting += [path] if path.suffix == ".md" else []
    return found


def on_files(files: Files, config: Any) -> Files:
    results = set((ROOT / "benchmarks" / "results").glob("*.md"))
    for path in sorted(results | linked([*DOCS.glob("*.md"), *results])):
        files.append(File.generated(config, place(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page, with links to files of the repository rewritten to their places in the site."""
    inside = page.file.src_uri.removeprefix(f"{OUTSIDE}/")
    source = ROOT / inside if page.file.src_uri.startswith(f"{OUTSIDE}/") else DOCS / inside
    here = os.path.dirname(page.file.src_uri)

    def anew(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(source.parent / match[0]))
        return os.path.relpath(place(path), here).replace(os.sep, "/") if path.is_file() and path.is_relative_to(ROOT) else match[0]

    pieces, at = [], 0
    for code in CODE.finditer(markdown):
        pieces += [LINK.sub(anew, markdown[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*pieces, LINK.sub(anew, markdown[at:])])
