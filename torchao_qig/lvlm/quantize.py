"""`torchao-qig quantize`: from a recipe to a checkpoint directory.

    OUTPUT/             what save_pretrained writes: weights, configuration, generation configuration, processor, tokenizer
    OUTPUT/README.md    model card: how to load it, what was done, what was measured
    OUTPUT/qig/         recipe.yaml, receipt.json, calibration/, and for the report: sensitivity/, samples.json, samples/

Everything is written into OUTPUT.partial and moved to OUTPUT at the end, so OUTPUT is either complete or absent. OUTPUT.partial also holds the
blocks that are done, with which `resume` continues an interrupted run.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn
from torchao.quantization import quantize_

from torchao_qig import Calibration, PackedIntTensor, __version__, calibrate, plan, save_pretrained
from torchao_qig.calibration.plan import Plan
from torchao_qig.errors import UserError
from torchao_qig.lvlm import card, command, explain, recipe
from torchao_qig.lvlm.check import BrokenModel, check, divergence, references, smallest
from torchao_qig.lvlm.data import Batches, calibration_batches
from torchao_qig.lvlm.load import load_model, load_processor, save_processor
from torchao_qig.lvlm.mixes import mixed
from torchao_qig.lvlm.samples import Sample, Samples, naming_argument, read_samples
from torchao_qig.system import peak_host_bytes

Say = Callable[[str], None]


def partial_of(output: Path) -> Path:
    """The directory that a run works in until OUTPUT is complete."""
    return output.with_name(output.name + ".partial")


def _output_of(wanted: recipe.Recipe, resume: bool) -> Path:
    """The directory for the result. Whatever would make writing it fail at the end raises an error now."""
    output = Path(wanted.output).expanduser().resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={wanted.output!r}: exists already; pass another directory, or delete it")
    if output == Path.cwd() or output.is_mount():
        raise UserError(f"output={wanted.output!r}: cannot be replaced; pass a new directory, or one inside it")
    if partial_of(output).exists() and not resume:
        raise UserError(f"output={wanted.output!r}: {partial_of(output)} holds an interrupted run; continue it with --resume, or delete it")
    return output


@contextmanager
def _working(partial: Path, wanted: recipe.Recipe) -> Iterator[None]:
    """Work in the directory `partial`, which is locked for other runs.

    It is deleted at the end, and also if the model is broken or a fresh run needs other settings. It stays after any other error and after an
    interruption: the blocks that are done may have taken hours, and `resume` continues with them.
    """
    fresh = not partial.exists()
    partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / "lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"output={wanted.output!r}: another run is at it, in {partial}; pass another directory, or wait") from error
    done = False
    try:
        _continue(partial, wanted)
        yield
        done = True
    except BrokenModel:
        done = True
        raise
    except UserError:
        done = fresh
        raise
    finally:
        if done:
            shutil.rmtree(partial, ignore_errors=True)
        lock.release()
        if done:
            with suppress(OSError):
                partial.rmdir()  # still there on systems where an open file (the lock) cannot be deleted


def samples_of(wanted: recipe.Recipe) -> tuple[Sequence[Sample], Samples]:
    """The samples that a recipe asks for, and the samples that were read to make them."""
    prompt = {"prompt": wanted.prompt} if wanted.prompt else {}
    with naming_argument("calib"):
        found = read_samples(wanted.calib, wanted.images, split=wanted.split, count=wanted.samples * wanted.interleaved, seed=wanted.seed, **prompt)
    return mixed(found, wanted.few_shot, wanted.interleaved, wanted.seed), found


def prepared(wanted: recipe.Recipe, say: Say) -> tuple[Any, Sequence[Sample], Batches, dict[str, int]]:
    """The processor, the samples, their batches, and the number of skipped samples by reason. Made before weights are loaded, to fail early."""
    processor = load_processor(wanted.model, wanted.revision)
    samples, read = samples_of(wanted)
    say(read.summary())
    batches = calibration_batches(samples, processor, tokens=wanted.tokens, max_length=wanted.max_length)
    say(batches.summary())
    return processor, samples, batches, {reason: len(places) for reason, places in (read.skipped | batches.skipped).items()}


def run(wanted: recipe.Recipe, resume: bool = False, dry_run: bool = False, say: Say = print) -> Path:
    """Quantize as the recipe says. Returns the directory that was written."""
    wanted.needs("model", "calib", *([] if dry_run else ["output"]))
    output = Path() if dry_run else _output_of(wanted, resume)
    processor, samples, batches, skipped = prepared(wanted, say)
    model = load_model(wanted.model, wanted.dtype, wanted.revision)
    planned = plan(model, wanted.config(calib=list(batches)))
    say(str(planned) if dry_run else planned.outlook())  # calibration shows the rest as it proceeds
    if dry_run:
        return output
    partial = partial_of(output)
    with _working(partial, wanted):
        started = time.perf_counter()
        looked_at = smallest(batches)
        reference = references(model, looked_at)
        shown = [samples[i] for i in sorted(i for rows in batches.rows for i in rows)[: wanted.explain]]
        explained = explain.token_weights(model, wanted, shown, processor, partial / "explained")
        before = {name: linear.weight.nbytes for name, linear in _linears(model).items()}
        started_blocks = time.perf_counter()
        kept = {"checkpoint_dir": partial / "blocks"} if wanted.config().chosen_steps else {}
        calibration = calibrate(model, _drained(batches), wanted.config(calib=None, **kept))
        resumed = calibration.stats["seconds"] - (time.perf_counter() - started_blocks)  # seconds that an interrupted run has spent
        quantize_(model, wanted.config(calib=calibration))
        _correct(planned, model, before)
        found = divergence(reference, model, looked_at)
        check(found, wanted.max_kl)
        say(f"beside full precision: KL {found['kl']:.4f} nats per token, the same likeliest token at {found['agreement']:.1%} of {found['tokens']} tokens")
        receipt = _receipt(wanted, planned, batches, skipped, found, time.perf_counter() - started + max(0.0, resumed))
        _save(partial, output, model, processor, wanted, calibration, explained, receipt)
        if output.exists():
            output.rmdir()  # `_output_of` has checked that it is empty
        os.replace(partial / "saved", output)
    return Path(wanted.output).expanduser()


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}


def _drained(batches: Batches) -> Iterator[dict[str, Any]]:
    """Yield the batches and drop each once it has been read, since pictures are large."""
    while batches:
        yield batches.pop(0)


def _correct(planned: Plan, model: nn.Module, before: dict[str, int]) -> None:
    """Correct the plan by what happened: some linears may have kept all their bits, or no token reached them."""
    packed = {name: m.weight.data for name, m in _linears(model).items() if isinstance(m.weight, PackedIntTensor)}
    stayed = sorted(planned.linears - set(packed))
    if stayed:
        planned.left["in the end: all their bits, or no token"] = stayed
    planned.linears = set(packed)
    planned.bytes_before = sum(before[name] for name in packed)
    planned.bytes_after = sum(weight.nbytes_packed() for weight in packed.values())


def _continue(partial: Path, wanted: recipe.Recipe) -> None:
    """Write down the recipe of this run. Where a run is continued, raise if its recipe was another one."""
    path = partial / "recipe.yaml"
    now = wanted.resolved()
    if path.exists():
        before = recipe.read(path)
        other = [key for key in now if key != "output" and before.get(key) != now[key]]
        if other:
            key = other[0]
            raise UserError(f"{key}={now[key]!r}: the interrupted run in {partial} had {before.get(key)!r}; pass that, or delete the directory")
    wanted.write(path)


def _receipt(wanted: recipe.Recipe, planned: Plan, batches: Batches, skipped: dict[str, int], found: dict[str, Any], seconds: float) -> dict[str, Any]:
    versions = {"torchao_qig": __version__, "torch": torch.__version__, **{name: metadata.version(name) for name in ("torchao", "transformers")}}
    return {
        "model": wanted.model,
        "created": date.today().isoformat(),
        "command": command.quantizing(wanted),
        "versions": versions | {"python": platform.python_version()},
        "device": wanted.device or "cpu",
        "plan": {"quantized": len(planned.linears), "left": planned.left, "bytes_before": planned.bytes_before, "bytes_after": planned.bytes_after,
                 "model_bytes": planned.model_bytes},
        "check": found,
        "seconds": seconds,
        "peak_host_bytes": peak_host_bytes(),
        "recipe": wanted.resolved(),
        "samples": {"used": sum(len(rows) for rows in batches.rows), "skipped": skipped},
    }  # fmt: skip


def _save(
    partial: Path,
    output: Path,
    model: nn.Module,
    processor: Any,
    wanted: recipe.Recipe,
    calibration: Calibration,
    explained: Path | None,
    receipt: dict[str, Any],
) -> None:
    saved = partial / "saved"
    shutil.rmtree(saved, ignore_errors=True)
    try:
        save_pretrained(model, saved)
        save_processor(processor, wanted.model, wanted.revision, saved)
        notes = saved / "qig"
        notes.mkdir()
        calibration.save(notes / "calibration")
        if explained is not None:
            shutil.copytree(explained, notes, dirs_exist_ok=True, ignore=shutil.ignore_patterns(explain.MARKS))
        wanted.write(notes / "recipe.yaml")
        (notes / "receipt.json").write_text(json.dumps(receipt, indent=1) + "\n")
        (saved / "README.md").write_text(card.text(saved, output.name))
    except BaseException:
        shutil.rmtree(saved, ignore_errors=True)  # the blocks that are done stay, for --resume
        raise
