"""The paper's benchmarks as lmms-eval 0.7.3 has them, on rows made here in their form: what the model is shown, and that right answers count as right."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the packages below are imported

import datasets
import numpy as np
import pytest
from PIL import Image
from torch import nn

from tests.tiny_dirs import PROCESSORS

pytest.importorskip("lmms_eval", reason="lmms-eval is not here: pip install --no-deps -r recipes/requirements-eval.txt")

import lmms_eval
from lmms_eval.tasks import TaskManager

from torchao_qig.lvlm import harness
from torchao_qig.lvlm.messages import Messages

RECIPES = Path(__file__).parents[2] / "recipes"
TASKS = Path(lmms_eval.__file__).parent / "tasks"
PICTURE = Image.fromarray(np.zeros((30, 40, 3), dtype=np.uint8))

ASKED = {"question": "Which?", "image": PICTURE}
MMMU = {"id": "validation_Art_1", "question": "See <image 1>.", "options": "['x', 'y']", "answer": "B", "question_type": "multiple-choice", "image_1": PICTURE}


@dataclass
class Benchmark:
    """A task's file, split and metric, one of its rows, a right and a wrong answer, and what the model is to be shown."""

    file: str
    split: str
    metric: str
    row: dict[str, Any]
    right: str
    wrong: str
    shown: list[str]


BENCHMARKS = {
    "vizwiz_vqa_val": Benchmark(
        "vizwiz_vqa/vizwiz_vqa_val.yaml", "val", "exact_match,none",
        ASKED | {"answers": ["Cup"] * 10, "question_id": "1", "category": "other"}, "cup", "cap", ["image", "Which?\nWhen the provided information is"],
    ),
    "mmmu_val": Benchmark("mmmu/mmmu_val.yaml", "validation", "mmmu_acc,none", MMMU, "B", "A", ["See", "image", ".\nA. x\nB. y"]),
    "chartqa": Benchmark(
        "chartqa/chartqa.yaml", "test", "relaxed_overall,none", ASKED | {"answer": "100", "type": "human_test"}, "104", "106",
        ["image", "Which?\nAnswer the question with a single word."],
    ),
    "ai2d": Benchmark(
        "ai2d/ai2d.yaml", "test", "exact_match,flexible-extract", ASKED | {"options": ["p", "q", "r", "s"], "answer": "2"}, "C.", "B.",
        ["image", "Which?\nA. p\nB. q\nC. r\nD. s"],
    ),
    "scienceqa_img": Benchmark(
        "scienceqa/scienceqa_img.yaml", "test", "exact_match,none", ASKED | {"choices": ["p", "q"], "answer": 1, "hint": ""}, "B", "A",
        ["image", "Which?\nA. p\nB. q"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("task", BENCHMARKS)
@pytest.mark.parametrize("right", [True, False])
def test_benchmark(task: str, right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = BENCHMARKS[task]
    data = datasets.Dataset.from_list([one.row]).cast_column("image_1" if "image_1" in one.row else "image", datasets.Image())
    datasets.DatasetDict({one.split: data}).save_to_disk(tmp_path / "data")
    local = f"include: {TASKS / one.file}\ntask: local\ndataset_path: {tmp_path / 'data'}\ndataset_name: null\ndataset_kwargs:\n  load_from_disk: true\n"
    (tmp_path / "local.yaml").write_text(local)
    asked: list[Messages] = []

    def answered(self: harness.InMemory, chats: list[Messages], limit: int) -> list[str]:
        asked.extend(chats)
        return [one.right if right else one.wrong] * len(chats)

    monkeypatch.setattr(harness.InMemory, "answer", answered)
    found = harness.run(nn.Identity(), PROCESSORS["llava_onevision"](), ["local"], str(tmp_path))
    assert found["local"][one.metric] == float(right)
    assert len(asked) == 1
    parts = asked[0][-1]["content"]
    assert [part["type"] for part in parts] == ["image" if text == "image" else "text" for text in one.shown]
    for part, text in zip(parts, one.shown, strict=True):
        if part["type"] == "image":
            assert part["image"].size == PICTURE.size
        else:
            assert part["text"].startswith(text)


def test_the_tasks_of_the_readmes_exist() -> None:
    named = set()
    for path in RECIPES.glob("*/README.md"):
        named |= {task for tasks in re.findall(r"--tasks ([\w,]+)", path.read_text()) for task in tasks.split(",")}
    assert named >= set(BENCHMARKS)
    assert named <= set(TaskManager().all_tasks)
