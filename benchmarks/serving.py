"""Compares serving a text model at 3 bits with serving it in bf16, through `torchao_qig.lvlm.bench`.

The model has blocks like those of a 0.5 B model, of hidden size 896 (mlp 4864, 14 heads, 2 of keys and values), with random weights, and a
vocabulary of 1000. Also counts how often anything is compiled anew over five prompts of other lengths after the warm-up.

    python -m benchmarks.serving --threads 2
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torchao.quantization import quantize_

import torchao_qig
from benchmarks.timing import machine, write
from torchao_qig import PackedIntWeightOnlyConfig
from torchao_qig.lvlm import serve
from torchao_qig.lvlm.bench import bench
from torchao_qig.lvlm.load import load_model, load_processor

VOCABULARY = 1000
LENGTHS = (5, 40, 90, 200, 333)  # words


def tokenizer() -> hf.PreTrainedTokenizerFast:
    """A tokenizer of single bytes, with unused tokens that fill up the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: i for i, token in enumerate(["<end>", *alphabet, *(f"<{i}>" for i in range(VOCABULARY - 1 - len(alphabet)))])}
    backend = Tokenizer(models.BPE(words, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def checkpoints(folder: Path, layers: int, bits: int) -> tuple[Path, Path]:
    """Write the model quantized and in full precision. Returns the two directories in this order."""
    torch.manual_seed(0)
    config = hf.Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=layers, num_attention_heads=14, num_key_value_heads=2, vocab_size=VOCABULARY,
        max_position_embeddings=4096, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = hf.Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    full, packed = folder / "bf16", folder / f"int{bits}"
    model.save_pretrained(full)
    quantize_(model.model.layers, PackedIntWeightOnlyConfig(bits=bits))
    torchao_qig.save_pretrained(model, packed, PackedIntWeightOnlyConfig(bits=bits))
    for path in (full, packed):
        tokenizer().save_pretrained(path)
    return packed, full


def recompiled(directory: str, threads: int) -> dict[str, float]:
    """The number of graphs compiled in the warm-up, the number compiled later for prompts of other lengths, and the seconds of the warm-up."""
    torch.set_num_threads(threads)
    model, processor = load_model(directory), load_processor(directory)
    serve.compiled(model)
    seconds = serve.warm_up(model, processor)
    stats = torch._dynamo.utils.counters["stats"]
    before = stats["unique_graphs"]
    for length in LENGTHS:
        for _ in serve.answer(model, processor, None, "a" * length, 80):
            pass
    return {"graphs": before, "graphs later": stats["unique_graphs"] - before, "warm_up_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--name", default="serving")
    parser.add_argument("--recompiles", metavar="DIR", help="only count compilations, as JSON")
    args = parser.parse_args()
    if args.recompiles:
        print(json.dumps(recompiled(args.recompiles, args.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        packed, full = checkpoints(Path(folder), args.layers, args.bits)
        found = bench(packed, full, prompt_tokens=args.prompt_tokens, repeats=args.repeats, threads=args.threads, device="cpu")
        eager = bench(packed, full, prompt_tokens=args.prompt_tokens, repeats=1, new_tokens=2, threads=args.threads, device="cpu", compiled=False)
        counted = subprocess.run(
            [sys.executable, "-m", "benchmarks.serving", "--threads", str(args.threads), "--recompiles", str(packed)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    counts = json.loads(counted.stdout.splitlines()[-1])
    rows = [
        {
            "weights": row["dtype"], "MiB on disk": f"{row['bytes_on_disk'] / 2**20:.1f}", "decode tokens/s": f"{row['decode_tokens_per_second']:.1f}",
            "prefill tokens/s": f"{row['prefill_tokens_per_second']:.0f}", "first token s": f"{row['first_token_seconds']:.3f}",
            "warm-up s": f"{row['warm_up_seconds']:.1f}", "peak MiB": f"{row['peak_bytes'] / 2**20:.0f}",
            "uncompiled decode tokens/s": f"{slow['decode_tokens_per_second']:.1f}", "uncompiled prefill tokens/s": f"{slow['prefill_tokens_per_second']:.0f}",
        }
        for row, slow in zip(found["rows"], eager["rows"], strict=True)
    ]  # fmt: skip
    about = {
        **machine(), "threads": args.threads, "blocks": args.layers, "prompt tokens": found["rows"][0]["prompt_tokens"], "new tokens": found["new_tokens"],
        "decode, times bf16's speed": round(found["ratios"]["decode_tokens_per_second"], 2),
        "graphs compiled in the warm-up, and over five prompts later": f"{counts['graphs']}, {counts['graphs later']}",
    }  # fmt: skip
    write(args.name, about, rows)
    print(about, *rows, sep="\n")


if __name__ == "__main__":
    main()
