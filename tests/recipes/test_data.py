"""The script says what a calibration would see, from a directory and a file."""

import json
from pathlib import Path

import pytest
from PIL import Image

from recipes import data
from tests import tiny_dirs
from torchao_qig.lvlm.load import load_processor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A processor, pictures, and captions, of which one has no picture."""
    path = tmp_path_factory.mktemp("recipe")
    tiny_dirs.PROCESSORS["qwen2_vl"]().save_pretrained(path / "model")
    (path / "model" / "config.json").write_text('{"model_type": "qwen2_vl"}')
    (path / "pictures").mkdir()
    for i in range(5):
        Image.new("RGB", (30 + 10 * i, 40), (50 * i, 0, 0)).save(path / "pictures" / f"{i}.png")
    (path / "coco.jsonl").write_text("".join(json.dumps({"image": f"{i}.png", "caption": "word " * (i + 1)}) + "\n" for i in range(6)))
    return path


def run(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    data.main(["--model", str(folder / "model"), "--calib", str(folder / "coco.jsonl"), "--images", str(folder / "pictures"), *more])
    return capsys.readouterr().out


def test_what_a_calibration_would_see(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(folder, capsys, "--tokens", "256")
    with pytest.warns(UserWarning, match="1 of 6 rows skipped"):
        samples = data.read_samples(folder / "coco.jsonl", folder / "pictures")
    batches = data.calibration_batches(samples, load_processor(str(folder / "model")), tokens=256)
    assert said == f"{samples.summary()}\n{batches.summary()}\n"
    for part in ("5 samples from", "1 of 6 rows skipped: image missing: coco.jsonl:6 (5.png)", "tokens per sample:", "picture", "answer", "other", "padding"):
        assert part in said


def test_choices(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, capsys) != run(folder, capsys, "--prompt", "What?")
    assert "3 samples in" in run(folder, capsys, "--interleaved", "2")
    assert "5 samples in" in run(folder, capsys, "--few-shot", "2")
    assert "2 samples from" in run(folder, capsys, "--count", "2")
    assert "samples skipped: too long: coco.jsonl:" in run(folder, capsys, "--max-length", "60")
    with pytest.raises(SystemExit):
        data.main(["--calib", "x"])
