"""Calibrate and quantize a small transformers model built in memory; print its size, its error, and its speed once compiled.

    python -m recipes.demo [--bits 3 4] [--layers 4] [--no-compile]

The model has random weights (no download) whose norms make some channels large, as trained ones do: sizes and speed are those of
a real model of this shape (the linears of a 0.5 B Qwen2), the error is what quantization does to these weights. "QIG" is calibrated
on other tokens than those that the error is measured on.
"""

import argparse
import copy
import os
import shutil
import statistics
import tempfile
import time
import warnings

import torch
from torch import Tensor, nn
from torchao.quantization import quantize_
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

import torchao_qig
from torchao_qig import PackedIntTensor, PackedIntWeightOnlyConfig, QIGWeightOnlyConfig


def build(layers: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=layers, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=4096, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "layernorm" in name:
                p.copy_(torch.randn(p.shape).exp())  # some channels are large, as in trained models
    return model


def decoder_bytes(model: nn.Module) -> int:
    """Bytes of the linears in the decoder's blocks."""
    weights = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
    return sum(w.nbytes_packed() if isinstance(w, PackedIntTensor) else w.numel() * w.element_size() for w in weights)


@torch.no_grad()
def divergence(model: nn.Module, tokens: Tensor, reference: Tensor) -> float:
    """Mean KL of the next-token distribution to the reference logits, in nats."""
    p, q = reference.float().log_softmax(-1), model(tokens).logits.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
def milliseconds_per_token(models: dict[str, nn.Module], repeats: int = 30) -> dict[str, float]:
    """One decode step of the compiled blocks, the models taking turns."""
    token = torch.tensor([[7]])
    steps = {name: torch.compile(model.model, fullgraph=True, dynamic=False) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in steps.values():
        step(token, use_cache=False)
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step(token, use_cache=False)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="torch")

    full = build(args.layers)
    tokens = torch.randint(0, 4096, (2, 64))
    with torch.no_grad():
        reference = full(tokens).logits
    models: dict[str, nn.Module] = {"bf16": full}
    for bits in args.bits:
        models[f"int{bits}"] = copy.deepcopy(full)
        quantize_(models[f"int{bits}"], PackedIntWeightOnlyConfig(bits=bits))
    lowest = min(args.bits)
    models[f"int{lowest} QIG"] = copy.deepcopy(full)
    batches = [{"input_ids": torch.randint(0, 4096, (4, 64))} for _ in range(2)]
    quantize_(models[f"int{lowest} QIG"], QIGWeightOnlyConfig(bits=lowest, calib=batches))
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        print("no C++ compiler found, which torch.compile needs on a CPU: no speed is measured")
        args.compile = False
    step = milliseconds_per_token(models) if args.compile else {}

    print(f"Qwen2, {args.layers} blocks of 896 x 4864, random weights, group 128, rounded to nearest or calibrated, {torch.get_num_threads()} CPU threads")
    print(f"{'weights':9} {'MB':>7} {'smaller':>8} {'KL to bf16':>11}" + (f" {'ms/token':>9} {'faster':>7}" if step else ""))
    for name, model in models.items():
        size = decoder_bytes(model)
        line = f"{name:9} {size / 1e6:7.2f} {decoder_bytes(full) / size:7.2f}x {divergence(model, tokens, reference):11.4f}"
        print(line + (f" {step[name]:9.2f} {step['bf16'] / step[name]:6.2f}x" if step else ""))

    name, model = list(models.items())[-1]
    with tempfile.TemporaryDirectory() as directory:
        torchao_qig.save_pretrained(model, directory)
        loaded = Qwen2ForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        same = torch.equal(loaded(tokens).logits, model(tokens).logits)
    print(f"{name} saved with save_pretrained and loaded with from_pretrained: logits {'bit-identical' if same else 'DIFFER'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
