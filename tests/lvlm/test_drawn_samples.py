"""Which samples are drawn, texts as samples, and samples that are made of several."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.lvlm.conftest import png
from tests.lvlm.test_samples import jsonl
from torchao_qig.lvlm.messages import as_messages
from torchao_qig.lvlm.mixes import few_shot, interleaved
from torchao_qig.lvlm.pictures import BadRow, located
from torchao_qig.lvlm.samples import PROMPT, Sample, read_samples


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
