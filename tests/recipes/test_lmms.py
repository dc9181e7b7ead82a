"""lmms-eval on checkpoints of ours, offline, on a task made here: its metrics are those of plain generation."""

from __future__ import annotations

import copy
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the packages below are imported

import datasets
import numpy as np
import pytest
import torch
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from tests.tiny_dirs import PROCESSORS, directory
from torchao_qig.lvlm.load import load_model, load_processor
from torchao_qig_cli import app

pytest.importorskip("lmms_eval", reason="lmms-eval is not here: pip install --no-deps -r recipes/requirements-eval.txt")

from torchao_qig.lvlm import harness

RECIPES = Path(__file__).parents[2] / "recipes"
FAMILIES = {"llava_onevision": "llava_onevision", "qwen2_5_vl": "qwen_vl"}
PICTURES = (1, 1, 0, 2, 1, 0, 2, 1)  # of each question
NEW = 8

UTILS = '''
import zlib

def doc_to_visual(doc):
    return list(doc["images"])

def doc_to_messages(doc):
    """The first picture before the question, others behind it."""
    shown = [{"type": "image", "url": image} for image in doc["images"]]
    return [
        {"role": "system", "content": [{"type": "text", "text": "short"}]},
        {"role": "user", "content": [*shown[:1], {"type": "text", "text": doc["question"]}, *shown[1:]]},
    ]

def process_results(doc, results):
    text = results[0]
    return {"right": float(text == doc["answer"]), "length": len(text), "checksum": zlib.crc32(text.encode()) % 1009}
'''
METRICS = ("right", "length", "checksum")
YAML = """
task: {task}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
{kind}: !function utils.{kind}
generation_kwargs:
  max_new_tokens: {new}
  until: {until}
process_results: !function utils.process_results
metric_list:
{metrics}
"""


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Questions with their pictures."""
    rng = np.random.default_rng(0)

    def picture() -> Image.Image:
        height, width = rng.integers(20, 70, 2)
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    words = ("what", "how many of these are blue", "?", "left or right", "name it", "say", "which of the two is larger, then", "colour")
    return [{"question": word, "images": [picture() for _ in range(n)]} for word, n in zip(words, PICTURES, strict=True)]


@pytest.fixture(scope="module", params=FAMILIES)
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    """A checkpoint that `torchao-qig quantize` wrote."""
    root = tmp_path_factory.mktemp(request.param)
    directory(request.param, root / "model")
    weights = load_file(root / "model" / "model.safetensors")  # a random model hardly prefers one token: sums in another order must not decide
    strong = {name: 5 * t if "layers" in name and "vision" not in name and t.dim() == 2 else t for name, t in weights.items()}
    save_file(strong, root / "model" / "model.safetensors", {"format": "pt"})
    samples = []
    for i, row in enumerate(rows):
        if row["images"]:
            row["images"][0].save(root / f"{i}.png")
            samples.append({"image": f"{i}.png", "caption": f"{i} things"})
    (root / "coco.jsonl").write_text("\n".join(map(json.dumps, samples)))
    config = RECIPES / FAMILIES[request.param] / "w3a16.yaml"
    settings = ["--samples", 4, "--set", "group_size=64", "--set", "explain=0", "--set", "steps=[{compensate: {sweeps: 0}}]"]
    done = run("quantize", root / "model", "--config", config, "--calib", root / "coco.jsonl", "--images", root, "--output", root / "out", *settings)
    assert done.exit_code == 0, done.output
    return root / "out"


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@torch.no_grad()
def plainly(model: nn.Module, processor: Any, messages: list[dict[str, Any]]) -> str:
    """One question, as a person would ask it with transformers alone."""
    options: dict[str, Any] = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    batch = processor.apply_chat_template([messages], **options)
    new = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[0, batch["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(new, skip_special_tokens=True))


def task(folder: Path, name: str, kind: str, rows: list[dict[str, Any]], answers: list[str], until: list[str]) -> None:
    """Its YAML, utils.py and parquet file."""
    stored = []
    for row, answer in zip(rows, answers, strict=True):
        files = [io.BytesIO() for _ in row["images"]]
        for file, image in zip(files, row["images"], strict=True):
            image.save(file, "PNG")
        stored.append({"question": row["question"], "answer": answer, "images": [{"bytes": f.getvalue(), "path": None} for f in files]})
    text = datasets.Value("string")
    features = datasets.Features({"question": text, "answer": text, "images": datasets.List(datasets.Image())})
    datasets.Dataset.from_list(stored, features=features).to_parquet(folder / f"{name}.parquet")
    metrics = "\n".join(f"  - metric: {m}\n    aggregation: mean\n    higher_is_better: true" for m in METRICS)
    (folder / "utils.py").write_text(UTILS)
    made = YAML.format(task=name, data=folder / f"{name}.parquet", kind=kind, new=NEW, until=json.dumps(until), metrics=metrics)
    (folder / f"{name}.yaml").write_text(made)


def functions() -> dict[str, Any]:
    """Those of utils.py, for the expected values."""
    found: dict[str, Any] = {}
    exec(compile(UTILS, "utils.py", "exec"), found)  # our own text, above
    return found


def asked(row: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """A question's chat as the task means it."""
    if kind == "doc_to_visual":
        return [{"role": "user", "content": [*({"type": "image", "image": i} for i in row["images"]), {"type": "text", "text": row["question"]}]}]
    found: list[dict[str, Any]] = copy.deepcopy(functions()["doc_to_messages"](row))
    for part in found[1]["content"]:
        if part["type"] == "image":
            part["image"] = part.pop("url")
    return found


def expected(texts: list[str], answers: list[str], until: list[str]) -> dict[str, float]:
    process = functions()["process_results"]
    found = [process({"answer": answer}, [harness.cut(text, until)]) for text, answer in zip(texts, answers, strict=True)]
    return {name: sum(one[name] for one in found) / len(found) for name in METRICS}


def values(found: dict[str, Any]) -> dict[str, float]:
    return {name.split(",")[0]: v for name, v in found.items() if name.split(",")[0] in METRICS}


@pytest.mark.parametrize("kind", ["doc_to_visual", "doc_to_messages"])
def test_metrics_are_those_of_plain_generation(quantized: Path, kind: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """Text alone, one picture, several; `until`, `max_new_tokens`, `--samples`; batches of one and of three."""
    model, processor = load_model(str(quantized)), load_processor(str(quantized))
    texts = [plainly(model, processor, asked(row, kind)) for row in rows]
    assert len(set(texts)) > 3, "the questions make a difference"
    said = Counter(c for text in texts for c in set(text[1:]))
    stop = next(c for c, n in said.most_common() if n < len(texts))  # some are cut, some are as long as they may be
    until = [stop, "never said"]
    assert 0 < sum(harness.cut(text, until) == text for text in texts) < len(texts)
    answers = [harness.cut(text, until) if i % 2 else "something else" for i, text in enumerate(texts)]
    task(tmp_path, "local_task", kind, rows, answers, until)

    done = run("evaluate", quantized, "--tasks", "local_task", "--include", tmp_path)
    assert done.exit_code == 0, done.output
    noted = json.loads((quantized / "qig" / "tasks.json").read_text())
    wanted = expected(texts, answers, until)
    assert wanted["right"] == 0.5
    assert values(noted["tasks"]["local_task"]) == pytest.approx(wanted)
    assert "| local_task | right | 0.5 |" in done.output
    assert "| local_task | right | 0.5 |" in (quantized / "README.md").read_text()

    few = run("evaluate", quantized, "--tasks", "local_task", "--include", tmp_path, "--samples", 3)
    assert few.exit_code == 0, few.output
    noted = json.loads((quantized / "qig" / "tasks.json").read_text())
    assert values(noted["tasks"]["local_task"]) == pytest.approx(expected(texts[:3], answers[:3], until))

    sides = processor.tokenizer.padding_side
    together = harness.run(model, processor, ["local_task"], str(tmp_path), batch_size=3)
    assert values(together["local_task"]) == pytest.approx(wanted)
    assert processor.tokenizer.padding_side == sides


@pytest.mark.parametrize("family", PROCESSORS)
def test_any_processor_any_batch(family: str, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    """Every tiny family, a text model too: answers in batches are those of questions asked alone, and nothing about the processor changes."""
    directory(family, tmp_path)
    model, processor = load_model(str(tmp_path)), load_processor(str(tmp_path))
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "right"
    lm = harness.InMemory(model, harness.from_processor(processor), lambda row: tokenizer.decode(row, skip_special_tokens=True))
    seen = 0
    for pictures in (0, 1, 2):
        chats = [asked(row, "doc_to_visual") for row in rows if len(row["images"]) == pictures]
        if pictures and tokenizer is processor:
            with pytest.raises(ValueError, match="takes none"):
                lm.answer(chats, NEW)
            continue
        assert lm.answer(chats, NEW) == [lm.answer([chat], NEW)[0] for chat in chats]
        seen += len(chats)
    assert seen >= 2
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "<pad>")


def test_a_tokenizer_without_padding_has_none_afterwards() -> None:
    tokenizer = PROCESSORS["qwen2"]()
    tokenizer.pad_token = None
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in ("ab", "abcdef")]
    batch = harness.from_processor(tokenizer)(chats)
    assert batch["attention_mask"].tolist()[0] == [0] * 4 + [1] * (batch["input_ids"].shape[1] - 4)
    assert tokenizer.pad_token is None


def test_a_model_in_bfloat16(tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are given in the model's dtype."""
    directory("internvl", tmp_path, torch.bfloat16)
    model, processor = load_model(str(tmp_path)), load_processor(str(tmp_path))
    assert model.dtype == torch.bfloat16
    kept: dict[str, torch.dtype] = {}
    generate = model.generate

    def noting(**batch: Any) -> Any:
        kept.update({name: value.dtype for name, value in batch.items() if isinstance(value, torch.Tensor)})
        return generate(**batch)

    monkeypatch.setattr(model, "generate", noting)
    lm = harness.InMemory(model, harness.from_processor(processor), lambda row: str(row.tolist()))
    lm.answer([asked(rows[0], "doc_to_visual")], 2)
    assert kept["pixel_values"] == torch.bfloat16
    assert kept["input_ids"] == torch.int64


def test_what_cannot_be_done_is_said(quantized: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    task(tmp_path, "local_task", "doc_to_visual", rows[:1], ["x"], ["x"])
    done = run("evaluate", quantized, "--tasks", "local_tusk", "--include", tmp_path)
    assert done.exit_code == 2
    assert "local_tusk" in done.output
    lm = harness.InMemory(nn.Identity(), lambda chats: {}, str)
    with pytest.raises(NotImplementedError, match="log-likelihoods"):
        lm.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        lm.generate_until_multi_round([])
    with pytest.raises(ValueError, match="batch_size=0"):
        harness.InMemory(nn.Identity(), lambda chats: {}, str, batch_size=0)
    with pytest.raises(ValueError, match="'video'"):
        harness.messages_of([{"role": "user", "content": [{"type": "video", "url": "v.mp4"}]}])


@given(kinds=st.lists(st.tuples(st.integers(0, 2), st.sampled_from([16, 128]))), size=st.integers(1, 5))
def test_batches(kinds: list[tuple[int, int]], size: int) -> None:
    """Every index once, one kind in each, none larger than asked; as few as there can be."""
    found = harness.batches(kinds, size)
    assert sorted(i for batch in found for i in batch) == list(range(len(kinds)))
    assert all(len(batch) <= size and len({kinds[i] for i in batch}) == 1 for batch in found)
    assert len(found) == sum(-(-n // size) for n in Counter(kinds).values())


@given(text=st.text("abc"), stops=st.lists(st.text("abc", max_size=2), max_size=3))
def test_cut(text: str, stops: list[str]) -> None:
    """The longest beginning of the text after which no stop begins, whatever their order."""
    found = harness.cut(text, stops)
    begins = [i for i in range(len(text)) if text.startswith(tuple(stop for stop in stops if stop), i)]
    assert found == text[: min(begins, default=len(text))]
    assert harness.cut(text, stops[::-1]) == found
    assert harness.cut(text, stops[0] if len(stops) == 1 else stops) == found
    assert harness.cut(text, None) == text
