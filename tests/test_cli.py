"""The command line as a person uses it: the whole way on a tiny checkpoint, and everything that a person gets wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from PIL import Image
from safetensors.torch import load_file
from torchao.quantization import quantize_
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

import torchao_qig.lvlm.check
import torchao_qig.lvlm.quantize
from torchao_qig import Calibration, Compensate, PackedIntTensor
from torchao_qig.calibration.chain import ChainRun
from torchao_qig.lvlm import recipe
from torchao_qig.lvlm.load import load_processor
from torchao_qig_cli import app

FLAGS = ["--group-size", "64", "--samples", "6"]


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


def quantize(*more: str, model: str = "model", calib: str = "coco.jsonl", images: str = "images", output: str = "out") -> Result:
    return run("quantize", model, "--calib", calib, "--images", images, "--output", output, "--bits", "3", *FLAGS, *more)


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in ("model", "images", "coco.jsonl"))


def tokens_of(model: torch.nn.Module, folder: Path) -> list[int]:
    processor = load_processor(str(folder))
    content = [{"type": "image", "image": Image.open("images/0.png")}, {"type": "text", "text": "what is it?"}]
    options: dict[str, Any] = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    batch = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    return model.generate(**batch, max_new_tokens=6, do_sample=False)[0].tolist()


def test_the_whole_way(here: Path) -> None:
    """quantize, from_pretrained, generate, evaluate, report; the recipe that was written gives the same weights again."""
    video = Path("model/video_preprocessor_config.json")
    video.write_text('{"size": {"height": 28, "width": 28}}')  # of a part that needs torchvision
    dry = quantize("--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "14 linears in model.language_model.layers.0" in dry.output
    assert leftovers(here) == []

    done = quantize()
    assert done.exit_code == 0, done.output
    assert "written: out" in done.output
    assert leftovers(here) == ["out"]
    model = AutoModelForImageTextToText.from_pretrained("out")
    assert Path("out", video.name).read_text() == video.read_text()
    packed = {n: p for n, p in model.named_parameters() if isinstance(p, PackedIntTensor)}
    assert len(packed) == 14
    assert all((p.bits, p.group_size) == (3, 64) for p in packed.values())
    assert len(tokens_of(model, here / "out")) > 6
    found = Calibration.load("out/qig/calibration")
    assert all(torch.equal(found.weights[n.removesuffix(".weight")].qdata, p.qdata) for n, p in packed.items())
    receipt = json.loads(Path("out/qig/receipt.json").read_text())
    assert receipt["command"] == "torchao-qig quantize model --output out --calib coco.jsonl --images images --bits 3 --group-size 64 --samples 6"
    assert 2**26 < receipt["peak_host_bytes"] < 2**37
    assert receipt["samples"]["used"] == 6
    assert 0 < receipt["check"]["kl"] < 0.5
    shown = json.loads(Path("out/qig/samples.json").read_text())
    weights = Calibration.load("out/qig/sensitivity")
    for i, sample in enumerate(shown):
        assert len(sample["tokens"]) == int((weights.modality[i] != 0).sum())
        assert sample["tokens"].count("<image>") == int((weights.modality[i] == 2).sum())
        assert Path("out/qig", sample["images"][0]["file"]).exists()

    told = run("evaluate", "out", "--data", "coco.jsonl", "--images", "images", "--against", "model")
    assert told.exit_code == 0, told.output
    evaluation = json.loads(Path("out/qig/evaluation.json").read_text())
    assert evaluation["command"] == "torchao-qig evaluate out --data coco.jsonl --images images --against model"
    rows = {row["name"]: row for row in evaluation["rows"]}
    assert rows["full precision"]["kl"] is None
    assert 0 < rows["quantized"]["kl"][0] < 0.5
    assert rows["quantized"]["bytes"] < rows["full precision"]["bytes"]
    assert abs(rows["quantized"]["nll"][0] - rows["full precision"]["nll"][0]) < 0.5
    card = Path("out/README.md").read_text()
    assert f"{rows['quantized']['nll'][0]:.4f}" in card
    assert 'from_pretrained("out")' in card
    assert receipt["command"] in card
    assert evaluation["command"] in card

    page = run("report", "out")
    assert page.exit_code == 0, page.output
    assert Path("out/qig/report/report.html").stat().st_size > 10_000

    again = run("quantize", "--config", "out/qig/recipe.yaml", "--output", "again")
    assert again.exit_code == 0, again.output
    assert json.loads(Path("again/qig/receipt.json").read_text())["command"] == receipt["command"].replace("output out", "output again")
    other = AutoModelForImageTextToText.from_pretrained("again")
    assert all(torch.equal(p.qdata, packed[n].qdata) for n, p in other.named_parameters() if isinstance(p, PackedIntTensor))


def test_plan_reads_no_weights(here: Path) -> None:
    (here / "model" / "model.safetensors").unlink()
    done = run("plan", "model", "--bits", "3", "--group-size", "64")
    assert done.exit_code == 0, done.output
    assert "14 linears" in done.output
    assert "128 samples, 131,072 tokens" in done.output


def test_files_and_flags_say_the_same(here: Path) -> None:
    """Later files go over earlier ones, flags over files."""
    Path("a.yaml").write_text("bits: 4\ngroup_size: 64\nmodel: model\n")
    Path("b.yaml").write_text("bits: 2\n")
    texts = [
        run("plan", "--config", "a.yaml").output,
        run("plan", "model", "--bits", "4", "--group-size", "64").output,
        run("plan", "--config", "b.yaml", "--config", "a.yaml").output,
        run("plan", "--config", "a.yaml", "--config", "b.yaml", "--set", "bits=4").output,
    ]
    lines = {text.splitlines()[0] for text in texts}
    assert len(lines) == 1
    assert run("plan", "--config", "a.yaml", "--config", "b.yaml").output.splitlines()[0] not in lines


def test_the_version() -> None:
    assert run("--version").output == f"torchao_qig {torchao_qig.__version__}\n"


def test_some_bad_rows_are_named_and_skipped(here: Path) -> None:
    with open("coco.jsonl", "a") as file:
        file.write('{"image": "absent.png", "caption": "x"}\nno json\n{"image": "0.png"}\n')
    with pytest.warns(UserWarning, match="rows skipped"):
        done = quantize("--samples", "13", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "coco.jsonl:11" in done.output
    assert "coco.jsonl:12" in done.output


def test_a_broken_model_is_an_error(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose packed weights are all zero; nothing is left that another try would have to clear away."""

    def breaking(model: torch.nn.Module, config: object) -> None:
        quantize_(model, config)
        for p in model.parameters():
            if isinstance(p, PackedIntTensor):
                p.scale.zero_()

    with monkeypatch.context() as patched:
        patched.setattr(torchao_qig.lvlm.quantize, "quantize_", breaking)
        done = quantize("--set", "max_kl=0.6")
    assert done.exit_code == 3, done.output
    assert "diverges from full precision" in done.output
    assert leftovers(here) == []
    assert quantize("--set", "max_kl=0.6", "--bits", "4").exit_code == 0


@pytest.mark.parametrize("flags", [["--set", "bits=auto", "--set", "budget=6"], ["--set", "bits=auto", "--set", "max_bytes=110000"], ["--method", "rtn"], []])
def test_the_receipt_says_what_happened(here: Path, flags: list[str]) -> None:
    done = run("quantize", "model", "--calib", "coco.jsonl", "--images", "images", "--output", "out", *FLAGS, *flags)
    assert done.exit_code == 0, done.output
    model = AutoModelForImageTextToText.from_pretrained("out")
    packed = {n.removesuffix(".weight"): p for n, p in model.named_parameters() if isinstance(p, PackedIntTensor)}
    plan = json.loads(Path("out/qig/receipt.json").read_text())["plan"]
    assert plan["quantized"] == len(packed)
    assert plan["bytes_after"] == sum(p.nbytes_packed() for p in packed.values())
    assert not {name for names in plan["left"].values() for name in names} & set(packed)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {name for names in plan["left"].values() for name in names} | set(packed) == linears


def test_only_one_run_at_a_time(here: Path) -> None:
    """Another process holds the lock; killed, it holds it no more. Nothing of it is in what is written."""
    (here / "out.partial").mkdir()
    holds = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holds, "out.partial/lock"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        done = quantize("--resume")
        other.kill()
    assert done.exit_code == 2
    assert "output='out': another run is at it, in " in done.output
    assert Path("out.partial/lock").exists()
    assert quantize("--resume").exit_code == 0
    assert leftovers(here) == ["out"]
    assert not list(Path("out").rglob("*lock"))


def test_other_data_under_an_interrupted_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed token weights are those of the samples that are there now; blocks that were calibrated on others are refused."""
    with monkeypatch.context() as patched:
        patched.setattr(torchao_qig.lvlm.quantize, "calibrate", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert quantize().exit_code == 130
    assert (here / "out.partial" / "explained").exists()
    rows = [json.loads(line) | {"caption": "the data changed"} for line in (here / "coco.jsonl").read_text().splitlines()]
    (here / "coco.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert quantize("--resume").exit_code == 0
    assert all("the data changed" in "".join(s["tokens"]) for s in json.loads(Path("out/qig/samples.json").read_text()))
    assert not Path("out/qig/marks.json").exists()

    with monkeypatch.context() as patched:
        _interrupt_after_a_block(patched)
        assert quantize(output="next").exit_code == 130
    rows[0]["caption"] = "and again"
    (here / "coco.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    done = quantize("--resume", output="next")
    assert done.exit_code == 2
    assert "holds another calibration" in done.output
    assert leftovers(here) == ["next.partial", "out"]


def _interrupt_after_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ChainRun.run_block

    def once(self: ChainRun, name: str) -> Any:
        if name.endswith("layers.1") and self.job.steps == [Compensate()]:  # the run itself, not the token weights for the report
            raise KeyboardInterrupt
        return original(self, name)

    monkeypatch.setattr(ChainRun, "run_block", once)


def test_an_interrupted_run_is_resumed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantize(output="whole").exit_code == 0
    with monkeypatch.context() as patched:
        _interrupt_after_a_block(patched)
        done = quantize()
    assert done.exit_code == 130
    assert "--resume" in done.output
    assert leftovers(here) == ["out.partial", "whole"]

    refused = quantize()
    assert refused.exit_code == 2
    assert "interrupted run" in refused.output
    other = quantize("--resume", "--seed", "1")
    assert other.exit_code == 2
    assert "seed=1" in other.output

    explained = (here / "out.partial" / "explained" / "samples.json").stat().st_mtime_ns
    blocks: list[str] = []
    run_block = ChainRun.run_block
    monkeypatch.setattr(ChainRun, "run_block", lambda self, name: (blocks.append(name), run_block(self, name))[1])
    done = quantize("--resume")
    assert done.exit_code == 0, done.output
    assert [b.rsplit(".", 1)[-1] for b in blocks] == ["1"]
    assert (here / "out" / "qig" / "samples.json").stat().st_mtime_ns == explained
    assert leftovers(here) == ["out", "whole"]
    resumed, whole = (load_file(here / name / "model.safetensors") for name in ("out", "whole"))
    assert set(resumed) == set(whole)
    assert all(torch.equal(t, whole[name]) for name, t in resumed.items())
    assert len(Calibration.load("out/qig/calibration").stats["block_seconds"]) == 2


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files as Unix does")
def test_a_full_disk_leaves_nothing_half_written(here: Path) -> None:
    """Files may not grow beyond 200 kB, as on a full disk, from the moment the checkpoint is written. Then there is room, and the run goes on."""
    script = (
        "import resource, sys; import torchao_qig.lvlm.quantize as q; from torchao_qig_cli import app\n"
        "save = q.save_pretrained\n"
        "def full(*args):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); save(*args)\n"
        "q.save_pretrained = full; app()"
    )
    args = ["quantize", "model", "--calib", "coco.jsonl", "--images", "images", "--output", "out", "--bits", "3", *FLAGS]
    assert (here / "model" / "model.safetensors").stat().st_size > 2 * 200_000
    done = subprocess.run([sys.executable, "-c", script, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "error: " in done.stderr
    assert leftovers(here) == ["out.partial"]
    assert not (here / "out.partial" / "saved").exists()
    assert quantize("--resume").exit_code == 0
    assert leftovers(here) == ["out"]


def test_any_setting_goes_through_a_recipe() -> None:
    """Every key that a recipe writes is one that it reads, and gives the same config."""
    for int8 in (False, True):
        first = recipe.recipe({"int8_activations": int8, "bits": 4, "compute_dtype": "bfloat16", "device": "cpu"})
        again = recipe.recipe(yaml.safe_load(yaml.safe_dump(first.resolved())))
        assert set(first.resolved()) == set(recipe.keys(int8))
        assert again.config() == first.config()
        assert again.config().running.compute_dtype is torch.bfloat16
        assert (again.config().public(), again.config().device) == (first.config().public(), first.config().device)
