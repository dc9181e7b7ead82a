"""Messages that the pages quote are messages that the code gives; exit codes are those of the command line."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import torchao_qig_cli
from tests.docs.pages import DOCS, ROOT

PAGE = DOCS / "troubleshooting.md"
HOLE = "\0"  # where a message has a value
HEADING = re.compile(r"^### (?P<quotes>(?:`[^`\n]+`(?:, )?)+)(?: \((?P<library>\w+)\))?$", re.MULTILINE)
LIBRARIES = ("torchao", "transformers", "torch")


def constants(tree: ast.AST) -> Iterator[str]:
    """Texts in a program, values in them as holes, and pieces joined by + as one."""

    def text(node: ast.AST) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(text(value) or HOLE for value in node.values)
        if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.IfExp):
            return text(node.value.body)  # what is said in the more interesting case
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and (text(node.left) or text(node.right)):
            return (text(node.left) or HOLE) + (text(node.right) or HOLE)
        return None

    for node in ast.walk(tree):
        if found := text(node):
            yield found


@cache
def ours() -> list[str]:
    files = [ROOT / "torchao_qig_cli.py", *sorted((ROOT / "torchao_qig").rglob("*.py"))]
    return [t for path in files for t in constants(ast.parse(path.read_text()))]


def quoted(page: Path) -> list[tuple[str, str | None]]:
    return [(quote, m["library"]) for m in HEADING.finditer(page.read_text()) for quote in re.findall(r"`([^`]+)`", m["quotes"])]


def given(quote: str, found: list[str]) -> bool:
    """Whether one template has the quotation's fixed parts, in order; `...` is any text, and a value where the template has one."""
    parts = [part for part in quote.split("...") if part]

    def holds(template: str) -> bool:
        at = 0
        for part in parts:
            at = template.find(part, at) + len(part)
            if at < len(part):
                return False
        return True

    return len("".join(parts).strip()) >= 8 and any(map(holds, found))


def test_messages_are_ours() -> None:
    mine = [quote for quote, library in quoted(PAGE) if library is None]

    assert len(mine) > 60
    wrong = [quote for quote in mine if not given(quote, ours())]
    assert not wrong, wrong


def test_messages_of_others_are_theirs() -> None:
    theirs = [(quote, library) for quote, library in quoted(PAGE) if library is not None]

    assert {library for _, library in theirs} <= set(LIBRARIES)
    assert len(theirs) >= 5
    for quote, library in theirs:
        if library == "torch":
            continue  # said by compiled code
        spec = importlib.util.find_spec(library)
        assert spec is not None
        assert spec.origin is not None
        parts = [part for part in re.split(r"\.\.\.|QIGWeightOnlyConfig", quote) if len(part.strip()) > 3]
        texts = (path.read_text(errors="replace") for path in Path(spec.origin).parent.rglob("*.py"))
        assert any(all(part in text for part in parts) for text in texts), quote


def test_reasons_for_bad_rows_are_all_there() -> None:
    """The table has every reason that a row is refused for, and no other."""
    reasons = set()
    for path in sorted((ROOT / "torchao_qig" / "lvlm").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "BadRow" and isinstance(node.args[0], ast.Constant):
                reasons.add(node.args[0].value)
    section = PAGE.read_text().split("### Reasons for which a row is skipped")[1].split("###")[0]
    told = {reason for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for reason in re.findall(r"`([^`]+)`", row)}

    assert len(reasons) > 12
    assert told == reasons


def test_exit_codes() -> None:
    """Those in the page are those in the command line's docstring."""
    told = torchao_qig_cli.__doc__ or ""

    assert {int(code) for code in re.findall(r"\b(\d+)\b", told)} == {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE.read_text(), re.MULTILINE)}


@pytest.mark.parametrize(
    "quote, expected",
    [
        ("model=...: no such directory; pass one that", True),
        ("model=...: no such folder; pass one that", False),
        ("no such directory; pass one that", True),
        ("pass one that ... no such directory", False),
        ("...", False),
        ("bits=...: pass an integer from 1 to 8", True),
        ("bits=...: pass an integer from 1 to 9", False),
    ],
)
def test_a_wrong_quotation_is_noticed(quote: str, expected: bool) -> None:
    assert given(quote, ours()) == expected
