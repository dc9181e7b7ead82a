"""Compares other tools with ours on the small LVLM: the same weights, calibration samples, grid and test questions.

    pip install -r benchmarks/requirements-peers.txt -e .      # an environment of its own: other versions than the tested set
    python -m benchmarks.peers [--settings W3g128 W2g64] [--tools ours auto-round ...] [--seed 0] [--pictures 1000]

Each tool quantizes in a process of its own. The table has accuracy, KL to full precision, and the seconds and peak memory of quantizing.
A tool that fails is listed with its error. Writes results/peers.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import quantize_

from benchmarks.accuracy import SETTINGS, percent
from benchmarks.timing import header, machine, store
from recipes.evaluate import answer, batches, scores
from recipes.methods import METHODS, calibration_batches
from recipes.small_lvlm.data import chosen
from recipes.small_lvlm.model import load
from torchao_qig import PackedIntWeightOnlyConfig
from torchao_qig.system import peak_host_bytes

DECODER = "model.language_model.layers."
Batches = list[dict[str, Tensor]]


def ours(method: str) -> Callable[..., nn.Module]:
    def run(model: nn.Module, data: Batches, bits: int, group_size: int) -> nn.Module:
        quantize_(model, METHODS[method](bits=bits, group_size=group_size, calib=data, verbose=False))
        return model

    return run


def in_decoder(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and name.startswith(DECODER)


def torchao_awq(model: nn.Module, data: Batches, bits: int, group_size: int) -> nn.Module:
    """torchao's AWQ search over our packed weights, since its own int3 has none."""
    from torchao.prototype.awq import AWQConfig

    base = PackedIntWeightOnlyConfig(bits=bits, group_size=group_size)
    quantize_(model, AWQConfig(base, step="prepare"), in_decoder)
    with torch.no_grad():
        for batch in data:
            model(**batch)
    quantize_(model, AWQConfig(base, step="convert"), lambda module, name: hasattr(module, "act_obs"))
    return model


def torchao_hqq(model: nn.Module, data: Batches, bits: int, group_size: int) -> nn.Module:
    """HQQ as torchao has it for 3 and 2 bits: symmetric, without data."""
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    dtype = {2: torch.int2, 3: torch.int3, 4: torch.int4}[bits]
    quantize_(model, IntxWeightOnlyConfig(dtype, PerGroup(group_size), intx_choose_qparams_algorithm="hqq_scale_only"), in_decoder)
    return model


def auto_round(model: nn.Module, data: Batches, bits: int, group_size: int) -> nn.Module:
    """AutoRound with its default 200 steps, an asymmetric grid, the vision tower left alone. It needs batches of one length."""
    from auto_round import AutoRound

    tokenizer, _ = load()
    longest = max(batch["input_ids"].shape[1] for batch in data)
    samples = []
    for batch in data:
        missing = (0, longest - batch["input_ids"].shape[1])
        ids, mask = nn.functional.pad(batch["input_ids"], missing, value=tokenizer.pad_token_id), nn.functional.pad(batch["attention_mask"], missing)
        samples.append({"input_ids": ids, "attention_mask": mask, "pixel_values": batch["pixel_values"], "image_sizes": batch["image_sizes"]})
    count = sum(len(batch["input_ids"]) for batch in data)
    rounding = AutoRound(
        model, tokenizer, processor=tokenizer, bits=bits, group_size=group_size, sym=False, dataset=samples, nsamples=count, batch_size=16,
        iters=200, device_map="cpu", quant_nontext_module=False, enable_torch_compile=False,
    )  # fmt: skip
    return rounding.quantize()[0]


# llm-compressor's own patterns would match the linears of the vision tower first
LAYER = "re:.*language_model.layers.*"
MAPPINGS = [
    {"smooth_layer": f"{LAYER}input_layernorm$", "balance_layers": [f"{LAYER}{name}_proj$" for name in "qkv"]},
    {"smooth_layer": f"{LAYER}v_proj$", "balance_layers": [f"{LAYER}o_proj$"]},
    {"smooth_layer": f"{LAYER}post_attention_layernorm$", "balance_layers": [f"{LAYER}gate_proj$", f"{LAYER}up_proj$"]},
    {"smooth_layer": f"{LAYER}up_proj$", "balance_layers": [f"{LAYER}down_proj$"]},
]


def llm_compressor(modifier: str, **settings: Any) -> Callable[..., nn.Module]:
    def run(model: nn.Module, data: Batches, bits: int, group_size: int) -> nn.Module:
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from llmcompressor import oneshot
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQModifier

        weights = QuantizationArgs(num_bits=bits, type="int", symmetric=False, strategy="group", group_size=group_size)
        grid = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
        left = ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
        recipe: list[Any] = [GPTQModifier(config_groups=grid, ignore=left, **settings)]
        if modifier == "awq":
            recipe = [AWQModifier(mappings=MAPPINGS), QuantizationModifier(config_groups=grid, ignore=left)]
        loader = torch.utils.data.DataLoader(data, batch_size=None)  # type: ignore[arg-type]
        oneshot(model=model, processor=load()[0], dataset=loader, recipe=recipe, num_calibration_samples=len(data), pipeline="basic")
        return model

    return run


TOOLS: dict[str, Callable[..., nn.Module]] = {
    "rounding": ours("rtn"), "ours, AWQ": ours("awq"), "ours, default": ours("default"),
    "torchao AWQ": torchao_awq, "torchao HQQ": torchao_hqq, "auto-round": auto_round, "llm-compressor AWQ": llm_compressor("awq"),
    "llm-compressor GPTQ": llm_compressor("gptq", actorder="static"),
}  # fmt: skip
PACKAGES = ("torch", "torchao", "transformers", "auto-round", "llmcompressor", "compressed-tensors")


def one(tool: str, setting: str, seed: int, pictures: int) -> dict[str, Any]:
    """Quantize with one tool and measure the result. Runs in a process of its own, so that the peak memory is the tool's."""
    tokenizer, model = load()
    data = calibration_batches(tokenizer, 128, seed)
    full = copy.deepcopy(model)
    before = peak_host_bytes()
    start = time.perf_counter()
    model = TOOLS[tool](model, data, **SETTINGS[setting])
    seconds = time.perf_counter() - start
    peak = peak_host_bytes()
    asked = batches(chosen("test", pictures), tokenizer)
    reference: list[Tensor] = []
    answer(full, asked, keep=reference, progress=False)
    found = scores(answer(model.eval().float(), asked, reference, progress=False))
    return {"tool": tool, "setting": setting, "seconds": seconds, "mb_above_the_model": (peak - before) / 2**20, **found}


def markdown(result: dict[str, Any]) -> str:
    lines = [f"`{result['command']}`, {result['date']}, {result['device']}, " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".", ""]
    head = ("tool", "accuracy %", "NLL", "KL to full precision", "seconds", "MB of memory above the model")
    for setting in dict.fromkeys(r["setting"] for r in result["rows"]):
        lines += [f"### {setting}", "", *header(head)]
        for r in (r for r in result["rows"] if r["setting"] == setting):
            if "error" in r:
                lines.append(f"| {r['tool']} | {r['error']} | | | | |")
                continue
            kl = "{:.4f} [{:.4f}, {:.4f}]".format(*r["all"]["kl"])
            lines.append(
                f"| {r['tool']} | {percent(r['all']['accuracy'])} | {r['all']['nll'][0]:.4f} | {kl} | {r['seconds']:.0f} | {r['mb_above_the_model']:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=["W3g128", "W2g64"], choices=list(SETTINGS))
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--into", type=Path, help="run the one tool and write what it gives here")
    args = parser.parse_args()
    if args.into:
        args.into.write_text(json.dumps(one(args.tools[0], args.settings[0], args.seed, args.pictures)))
        return

    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    result: dict[str, Any] = {**machine(), "versions": versions, "threads": torch.get_num_threads(), "rows": []}
    for setting in args.settings:
        for tool in args.tools:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "found.json"
                command = [sys.executable, "-m", "benchmarks.peers", "--tools", tool, "--settings", setting, "--seed", str(args.seed)]
                done = subprocess.run([*command, "--pictures", str(args.pictures), "--into", str(file)], capture_output=True, text=True)
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                found = json.loads(file.read_text()) if file.exists() else {"tool": tool, "setting": setting, "error": f"failed: {last}"}
            result["rows"].append(found)
            shown = f"KL {found['all']['kl'][0]:.4f}, {found['seconds']:.0f} s" if "all" in found else found["error"]
            print(f"{setting} {tool}: {shown}", flush=True)
            store("peers", result, markdown(result))


if __name__ == "__main__":
    main()
