"""`torchao-qig bench`: speed, memory and size of checkpoints. Each model is measured in a process of its own, and the processes take turns.

    found = bench("model-int3", against="model")
    print(card.bench_table(found))

A process, `python -m torchao_qig.lvlm.bench DIR --json`, loads and compiles its model and writes facts about it as a line of JSON. For every
line that it then reads, it answers one prompt and writes a line with the times. At the end of its input it writes its peak memory. All models
are in memory at once, but only one computes at a time. Every process starts with an empty compiler cache, so its warm-up takes as long as on
a new machine. Medians are over rounds, and ratios are those of the medians.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchao_qig import PackedIntTensor
from torchao_qig.errors import UserError, UserFileError
from torchao_qig.lvlm import card, command, serve
from torchao_qig.lvlm.load import bytes_on_disk, device_of, load_model, load_processor
from torchao_qig.system import peak_host_bytes

RATIOS = ("decode_tokens_per_second", "prefill_tokens_per_second", "first_token_seconds", "bytes_on_disk", "peak_bytes")
FILLER = "Look at it again. "
SHOWN = 15  # last lines of a failed process's errors


def peak_bytes(device: torch.device) -> int:
    """The peak memory of this process in bytes: host memory if the device is the CPU, else memory of the device."""
    return peak_host_bytes() if device.type == "cpu" else int(torch.accelerator.max_memory_allocated(device))


def device_name(device: torch.device) -> str:
    if device.type != "cpu":
        return str(torch.get_device_module(device).get_device_name(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def machine(device: torch.device) -> dict[str, Any]:
    """The device, the number of threads and the versions with which figures were measured."""
    import torchao
    import transformers

    versions = {"torch": torch.__version__, "torchao": torchao.__version__, "transformers": transformers.__version__}
    return {"device": device_name(device), "threads": torch.get_num_threads(), "system": platform.system(), "python": platform.python_version(), **versions}


def prompt_inputs(model: nn.Module, processor: Any, image: Any, tokens: int) -> dict[str, Tensor]:
    """The model's inputs for a question of about `tokens` tokens, or of more if the picture alone takes more."""

    def asked(repeats: int) -> dict[str, Tensor]:
        return serve.inputs_of(model, processor, image, FILLER * repeats + "What is it?")

    short, longer = (asked(n)["input_ids"].shape[1] for n in (0, 8))
    return asked(max(0, round((tokens - short) * 8 / max(1, longer - short))))


def one_round(model: nn.Module, inputs: dict[str, Tensor], new_tokens: int) -> dict[str, float]:
    """Answer one prompt: the seconds to the first token, and the tokens per second after it."""
    clock = serve.Clock()
    model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens, streamer=clock)
    return {"first_token_seconds": clock.times[1] - clock.times[0], "decode_tokens_per_second": clock.tokens_per_second()}


def _child(args: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> None:
    """Measure one model. Says the facts about it, then one round for each line of standard input, then the peak memory."""
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model = load_model(args.directory, args.dtype, device=device)
    loaded = time.perf_counter() - start
    bits = sorted({p.bits for p in model.parameters() if isinstance(p, PackedIntTensor)})
    inputs = prompt_inputs(model, load_processor(args.directory), args.image, args.prompt_tokens)
    prompt = inputs["input_ids"].shape[1]
    start = time.perf_counter()
    if args.compiled:
        serve.compiled(model, prompt + args.new_tokens)
    for _ in range(1 + args.compiled):  # the first prompt runs uncompiled
        one_round(model, inputs, 3)
    warm = time.perf_counter() - start
    dtype = str(model.dtype).removeprefix("torch.")
    weights = f"int{'/'.join(map(str, bits))} in {dtype}" if bits else dtype
    say({"dtype": weights, "prompt_tokens": prompt, "load_seconds": loaded, "warm_up_seconds": warm, "machine": machine(device)})
    for _ in sys.stdin:
        say(one_round(model, inputs, args.new_tokens))
    say({"peak_bytes": peak_bytes(device)})


class _Process:
    """A process that measures one model."""

    def __init__(self, directory: Path, dtype: str, options: list[str], threads: int | None) -> None:
        self.directory, self.cache = directory, tempfile.TemporaryDirectory()
        self.errors = Path(self.cache.name) / "stderr"
        threads_of_libraries = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        environment = {**os.environ, **threads_of_libraries, "TORCHINDUCTOR_CACHE_DIR": self.cache.name, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        words = [sys.executable, "-m", "torchao_qig.lvlm.bench", str(directory), "--json", "--dtype", dtype, *options]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)

    def hear(self) -> dict[str, Any]:
        """The next line that the process writes; raises if it has ended or writes an error."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            last = "\n".join(self.errors.read_text(errors="replace").splitlines()[-SHOWN:])
            raise RuntimeError(f"{self.directory}: the process that measured it ended with code {code}; the last it said:\n{last}")
        facts = dict(json.loads(line))
        if "error" in facts:
            raise UserError(facts["error"])
        return facts

    def round(self) -> dict[str, Any]:
        assert self.process.stdin
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended: `hear` raises an error that says why
        return self.hear()

    def peak(self) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.close()
        return self.hear()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe and not pipe.closed:
                pipe.close()
        self.cache.cleanup()


def _directory(argument: str, name: str | os.PathLike[str]) -> Path:
    path = Path(name).expanduser()
    if not (path / "config.json").exists():
        raise UserFileError(f"{argument}={str(name)!r}: no checkpoint there; pass a directory that save_pretrained or torchao-qig quantize wrote")
    return path


def bench(
    directory: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    repeats: int = 5,
    threads: int | None = None,
    device: str | torch.device | None = None,
    image: str | os.PathLike[str] | None = None,
    compiled: bool = True,
    against_dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Measure the size, memory and speed of a checkpoint, and of another one to compare it with.

    Args:
        directory: the checkpoint, measured as stored.
        against: another checkpoint, usually the full-precision model, loaded in `against_dtype` ("auto": as stored).
        prompt_tokens: approximate length of the prompt; with `image` it is at least what the picture takes.
        new_tokens: tokens of every answer.
        repeats: number of answers of each model.
        threads: number of CPU threads; by default PyTorch's choice.
        device: where the models run; by default the accelerator if there is one.
        image: a picture to ask about; by default none.
        compiled: whether the models run through `serve.compiled`.

    Returns:
        `rows`, one for each model, and `ratios` of the first model to the second; also the settings, the command, the date and the machine.
    """
    for name, value, least in (("prompt_tokens", prompt_tokens, 1), ("new_tokens", new_tokens, 2), ("repeats", repeats, 1), ("threads", threads or 1, 1)):
        if value < least:
            raise UserError(f"{name}={value}: pass at least {least}")
    wanted = [(_directory("model", directory), "auto")] + ([(_directory("against", against), against_dtype)] if against is not None else [])
    if image is not None and not Path(image).is_file():
        raise UserFileError(f"image={str(image)!r}: no such file")
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    place = device_of(str(device)) if device else found or torch.device("cpu")
    if compiled:
        serve.check_compiler(place)
    options = {"prompt-tokens": prompt_tokens, "new-tokens": new_tokens, "threads": threads, "device": place, "image": image}
    flags = [f"--{name}={value}" for name, value in options.items() if value is not None] + ([] if compiled else ["--no-compile"])

    processes: list[_Process] = []
    try:
        facts: list[dict[str, Any]] = []
        for path, dtype in wanted:
            processes.append(_Process(path, dtype, flags, threads))
            facts.append(processes[-1].hear())  # wait before the next one starts: they must not compile at the same time
        rounds = [[process.round() for process in processes] for _ in range(repeats)]
        peaks = [process.peak() for process in processes]
    finally:
        for process in processes:
            process.close()

    rows = []
    for i, (path, _) in enumerate(wanted):
        first, decode = (statistics.median(r[i][key] for r in rounds) for key in ("first_token_seconds", "decode_tokens_per_second"))
        rows.append({
            "name": path.resolve().name, **{k: v for k, v in facts[i].items() if k != "machine"}, "bytes_on_disk": bytes_on_disk(path),
            "first_token_seconds": first, "prefill_tokens_per_second": facts[i]["prompt_tokens"] / first, "decode_tokens_per_second": decode, **peaks[i],
        })  # fmt: skip
    ratios = {key: rows[0][key] / rows[1][key] if rows[1][key] else math.nan for key in RATIOS} if len(rows) > 1 else {}
    asked = dict(
        against=against, image=image, prompt_tokens=prompt_tokens, new_tokens=new_tokens, repeats=repeats, threads=threads, device=device, compiled=compiled,
        against_dtype=against_dtype,
    )  # fmt: skip
    settings = {"new_tokens": new_tokens, "repeats": repeats, "compiled": compiled, "command": command.command_line("bench", bench, directory, asked)}
    return {"rows": rows, "ratios": ratios, **settings, "date": date.today().isoformat(), "machine": facts[0]["machine"]}


def run(model: str, against: str | None = None, **options: Any) -> str:
    """Run `bench` and return its table. If `quantize` wrote the model, the results are also stored there (qig/bench.json, the card)."""
    found = bench(model, against, **options)
    card.note(model, "bench.json", found)
    return card.bench_table(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--json", action="store_true", required=True, help="talk in lines of JSON")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--image")
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    args = parser.parse_args()
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print goes to standard error

    def say(facts: dict[str, Any]) -> None:
        print(json.dumps(facts), file=out, flush=True)

    try:
        _child(args, say)
    except UserError as error:
        say({"error": str(error)})
        sys.exit(2)


if __name__ == "__main__":
    main()
