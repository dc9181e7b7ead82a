"""`torchao-qig`, the command line. Exit codes: 0 done; 2 something in the input is wrong; 3 the quantized model is broken; 4 files cannot be
written; 5 out of memory; 130 interrupted; 1 anything else, with a traceback.

This file lies beside the package and imports it only when a command runs: importing torchao_qig imports torch, which `--help` does not need."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(help="Vision-language models at 3 or 4 bits.", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
RECIPES = ("PIL", "datasets", "matplotlib", "sklearn", "num2words", "jinja2", "markupsafe")  # what the extra `recipes` brings

Model = Annotated[str | None, typer.Argument(help="directory, or name on the hub", show_default=False)]
Method = Annotated[str | None, typer.Option(help="how to calibrate: default, rtn, awq, mbq, qig, qig-paper, gptq, ...", show_default=False)]
Given = typer.Option(show_default=False)  # the default is that of the recipe


def _fail(code: int, text: object) -> NoReturn:
    typer.echo(f"error: {text}", err=True)
    raise typer.Exit(code)


def _renamed(advice: str) -> Any:
    """A hidden option for a former name: whoever uses it gets `advice`, which says what to write now."""

    def refuse(given: str | None) -> None:
        if given is not None:
            _fail(2, advice)

    return typer.Option(hidden=True, callback=refuse)


@contextmanager
def _exiting_on_errors() -> Iterator[None]:
    """Show an error that the user can fix as one line, and exit with its code. Other errors keep their traceback."""
    try:
        with _naming_extras():
            yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        _fail(130, "interrupted; `quantize --resume` continues after the last whole block")
    except Exception as error:
        code = None if os.environ.get("TORCHAO_QIG_TRACEBACK") else _code(error)
        if code is None:
            raise
        _fail(code, f"{error} (out of memory: fewer --tokens or --samples, --device cpu, or max_host_memory)" if code == 5 else error)


def _code(error: Exception) -> int | None:
    """The exit code for an error; None for a defect of ours, which keeps its traceback."""
    if "torchao_qig" not in sys.modules:  # the package itself, or torch, could not be imported
        return None
    from safetensors import SafetensorError

    from torchao_qig.errors import UserError
    from torchao_qig.lvlm.check import BrokenModel
    from torchao_qig.system import out_of_memory

    if isinstance(error, UserError):
        return 2
    if isinstance(error, BrokenModel):
        return 3
    if out_of_memory(error):
        return 5
    return 4 if isinstance(error, (OSError, SafetensorError)) else None


@contextmanager
def _naming_extras() -> Iterator[None]:
    """If an optional package is missing, exit and say how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").split(".")[0]
        if missing == "recipes":
            _fail(2, "the demo needs the repository: run it from a clone")
        if missing not in (*RECIPES, "lmms_eval"):
            raise
        advice = 'pip install "torchao_qig[recipes]"'
        if missing == "lmms_eval":
            advice = 'pip install "torchao_qig[eval]"; beside a CPU build of torch: pip install --no-deps -r recipes/requirements-eval.txt, in the repository'
        _fail(2, f"this needs {missing}: {advice}")


def _layers(config: list[Path] | None, settings: list[str] | None, flags: dict[str, Any]) -> Any:
    """The recipe made from files, `--set` and flags; later ones of these override earlier ones."""
    from torchao_qig.lvlm import recipe

    given = {k: v for k, v in flags.items() if v not in (None, [], ())}
    return recipe.recipe(*(recipe.read(path) for path in config or []), recipe.pairs(settings or []), given)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"torchao_qig {metadata.version('torchao_qig')}")
        raise typer.Exit


@app.callback()
def main(version: Annotated[bool, typer.Option("--version", help="print the version", callback=_say_version, is_eager=True)] = False) -> None:
    """Vision-language models at 3 or 4 bits."""


@app.command()
def plan(
    model: Model = None,
    config: Annotated[list[Path] | None, typer.Option("--config", help="YAML file; may be given several times")] = None,
    bits: Annotated[int | None, Given] = None,
    group_size: Annotated[int | None, Given] = None,
    int8_activations: Annotated[bool | None, typer.Option("--int8-activations", help="W4A8 and the like")] = None,
    method: Method = None,
    modules: Annotated[list[str] | None, typer.Option(help="parts to quantize instead of the decoder's blocks")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="any other setting, key=value")] = None,
) -> None:
    """Show what would be quantized, what would not and why, and bytes, memory and time. Reads the model's configuration, not its weights."""
    with _exiting_on_errors():
        from torchao_qig import plan as planned
        from torchao_qig.lvlm.load import shape_of

        flags = dict(model=model, bits=bits, group_size=group_size, int8_activations=int8_activations, method=method, modules=modules)
        recipe = _layers(config, settings, flags)
        recipe.needs("model")
        typer.echo(str(planned(shape_of(recipe.model, recipe.dtype, recipe.revision), recipe.config())))


@app.command()
def quantize(
    model: Model = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="directory to write")] = None,
    calib: Annotated[str | None, typer.Option(help="samples: .json, .jsonl, .txt, a folder, or a dataset")] = None,
    images: Annotated[str | None, typer.Option(help="folder that the samples' pictures lie in")] = None,
    config: Annotated[list[Path] | None, typer.Option("--config", help="YAML file; may be given several times")] = None,
    bits: Annotated[int | None, Given] = None,
    group_size: Annotated[int | None, Given] = None,
    int8_activations: Annotated[bool | None, typer.Option("--int8-activations", help="W4A8 and the like")] = None,
    method: Method = None,
    modules: Annotated[list[str] | None, typer.Option(help="parts to quantize instead of the decoder's blocks")] = None,
    samples: Annotated[int | None, Given] = None,
    seed: Annotated[int | None, Given] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens; longer samples are left out")] = None,
    dtype: Annotated[str | None, typer.Option(help="to load in: auto, float32, bfloat16, float16")] = None,
    device: Annotated[str | None, typer.Option(help="where blocks are computed, one at a time")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="any other setting, key=value")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue an interrupted run")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="stop after the plan")] = False,
    sensitivity: Annotated[str | None, _renamed("--sensitivity is --method now: awq, mbq, qig, default+qig, ...; or --set 'steps=[{equalize: {...}}]'")] = None,
) -> None:
    """Calibrate, quantize and check a model, and save it in a directory that from_pretrained loads."""
    with _exiting_on_errors():
        flags = dict(
            model=model, output=output, calib=calib, images=images, bits=bits, group_size=group_size, int8_activations=int8_activations,
            method=method, modules=modules, samples=samples, seed=seed, max_length=max_length, dtype=dtype, device=device,
        )  # fmt: skip
        recipe = _layers(config, settings, flags)
        from torchao_qig.lvlm.quantize import run

        written = run(recipe, resume, dry_run, typer.echo)
        if not dry_run:
            typer.echo(f"written: {written}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="directory that quantize wrote")],
    data: Annotated[str | None, typer.Option(help="questions with answers, as --calib of quantize")] = None,
    images: Annotated[str | None, typer.Option(help="folder that the pictures lie in")] = None,
    against: Annotated[str | None, typer.Option(help="the full-precision model, for the divergence from it")] = None,
    tasks: Annotated[str | None, typer.Option(help="lmms-eval's tasks, with commas between")] = None,
    include: Annotated[str | None, typer.Option(help="folder with task files of your own")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="of the data, and of each task; all")] = None,
    seed: int = 0,
    split: str = "train",
    dtype: str = "auto",
    device: str = "cpu",
    keep_packed: Annotated[bool, typer.Option("--keep-packed", help="slower, in less memory; the same numbers")] = False,
    reference: Annotated[str | None, _renamed("--reference is called --against, as in bench")] = None,
) -> None:
    """Measure accuracy, NLL and divergence on a file of questions, or lmms-eval's tasks. Brings the model card up to date."""
    with _exiting_on_errors():
        from torchao_qig.lvlm.evaluate import run

        found = run(model, data, images, against, tasks.split(",") if tasks else [], include, samples, seed, split, dtype, device, keep_packed)
        typer.echo(found)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="directory that quantize wrote")],
    against: Annotated[str | None, typer.Option(help="the full-precision model")] = None,
    image: Annotated[str | None, typer.Option(help="a picture to ask about")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="about so many, more where the picture takes more")] = 512,
    new_tokens: Annotated[int, typer.Option(min=2)] = 128,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    device: Annotated[str | None, typer.Option(help="the accelerator if there is one")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile")] = True,
    against_dtype: Annotated[str, typer.Option(help="of the full-precision model; auto: as stored")] = "bfloat16",
) -> None:
    """Measure tokens per second, time to the first token, memory and size. Brings the model card up to date."""
    with _exiting_on_errors():
        from torchao_qig.lvlm.bench import run

        options = dict(
            image=image, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, threads=threads, device=device, compiled=compiled,
            against_dtype=against_dtype,
        )  # fmt: skip
        typer.echo(run(model, against, **options))


@app.command()
def report(
    model: Annotated[Path, typer.Argument(help="directory that quantize wrote")],
    output: Annotated[Path | None, typer.Option(help="file to write; OUT/qig/report/report.html")] = None,
    show: Annotated[bool, typer.Option("--open", help="open it in a browser")] = False,
) -> None:
    """Write one HTML page: which tokens counted, errors before and after, bits, accuracy, size."""
    with _exiting_on_errors():
        page = import_module("torchao_qig.report").write(model, output)
        typer.echo(f"written: {page}")
        if show:
            typer.launch(str(page))


@app.command()
def demo(
    bits: Annotated[int, typer.Option(min=1, max=8, help="bits per weight")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="pictures to calibrate on")] = 128,
    pictures: Annotated[int, typer.Option(min=1, help="test pictures, about four questions each")] = 250,
    speed: Annotated[bool, typer.Option(help="compile and time the decoders")] = True,
) -> None:
    """Quantize the small LVLM of the repository; print accuracy, size, speed and an answer."""
    with _exiting_on_errors():
        run: Callable[..., None] = import_module("recipes.demo").main
        run(bits, samples, pictures, speed)


if __name__ == "__main__":
    sys.exit(app())
