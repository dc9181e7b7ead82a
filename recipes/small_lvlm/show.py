"""Draws what QIG is about, on the small LVLM: outliers in its activations, and how much each kind of token counts.

    python -m recipes.small_lvlm.show [--bits 3] [--output docs/small_lvlm]

Writes activations.png, gradients.png, sensitivity.png, picture.png, and figures.json with the numbers behind them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor, nn

from recipes.methods import METHODS, calibration_batches
from recipes.small_lvlm.data import chosen
from recipes.small_lvlm.model import ROW, inputs, load
from torchao_qig import calibrate
from torchao_qig.report.weights import by_modality

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

KINDS = ("text", "vision", "answer")


@torch.no_grad()
def activations(model: nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Each decoder linear's largest |input| by channel, and each block's largest |output| by token (first sample)."""
    channels: dict[str, Tensor] = {}
    tokens: list[Tensor] = []
    handles: list[Any] = []
    for name, module in model.model.language_model.layers.named_modules():  # type: ignore[union-attr, operator]
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: channels.update({name: args[0].abs().flatten(0, -2).amax(0)})))
        elif name.isdigit():
            handles.append(module.register_forward_hook(lambda _, args, out: tokens.append((out[0] if isinstance(out, tuple) else out)[0].abs().amax(-1))))
    model(**{k: v for k, v in batch.items() if k != "labels"})
    for handle in handles:
        handle.remove()
    return channels, tokens


def gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[dict[str, float]]:
    """For each block and kind of token, the mean norm of the gradient at the block's input, divided by that of all tokens.

    The gradient is that of the answers' NLL.
    """
    norms: list[dict[str, list[Tensor]]] = []
    for batch in batches:
        hidden: list[Tensor] = []
        blocks = model.model.language_model.layers  # type: ignore[union-attr]
        handles = [b.register_forward_pre_hook(lambda _, args, hidden=hidden: hidden.append(args[0])) for b in blocks]  # type: ignore[union-attr]
        with torch.enable_grad():
            loss = model(**batch).loss
            found = torch.autograd.grad(loss, hidden)
        for handle in handles:
            handle.remove()
        answer = batch["labels"] != -100
        vision = batch["input_ids"] == model.config.image_token_id
        places = {"text": (batch["attention_mask"] == 1) & ~answer & ~vision, "vision": vision, "answer": answer}
        norms = norms or [{kind: [] for kind in KINDS} for _ in found]
        for per_kind, g in zip(norms, found, strict=True):
            for kind in KINDS:
                per_kind[kind].append(g.norm(dim=-1)[places[kind]])
    rows = [{kind: torch.cat(parts) for kind, parts in per_kind.items()} for per_kind in norms]
    return [{kind: float(part.mean() / torch.cat(list(row.values())).mean()) for kind, part in row.items()} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("docs/small_lvlm"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer, model = load()
    config = METHODS["qig"](bits=args.bits)

    example = next(one for one in chosen("validation", 50) if "objects" in one.scene)
    question = next(q for q in example.questions if q.family in ("spatial", "attribute"))
    batch = inputs(tokenizer, [example.pixels], [question.text], [question.answer])
    channels, tokens = activations(model, batch)
    ratios = {name: float(values.max() / values.median()) for name, values in channels.items()}
    peaks = [float(values.max() / values.median()) for values in tokens]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    for kind in ("q_proj", "o_proj", "up_proj", "down_proj"):
        left.plot([value for name, value in ratios.items() if name.endswith(kind)], marker="o", label=f"input of {kind}")
    left.set(xlabel="block", ylabel="largest channel / median channel", yscale="log", title="Channels: outliers")
    left.legend()
    for i, values in enumerate(tokens):
        right.plot(values, label=f"after block {i}", linewidth=1)
    right.set(xlabel="token (0: start, 1-105: picture, then question and answer)", ylabel="largest |activation|", yscale="log", title="Tokens")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(args.output / "activations.png", dpi=100)

    data = calibration_batches(tokenizer)
    by_block = gradients(model, data)
    figure, axis = plt.subplots(figsize=(6, 4))
    for kind, label in zip(KINDS, ("question", "picture", "answer"), strict=True):
        axis.plot([row[kind] for row in by_block], marker="o", label=label)
    axis.set(xlabel="block", ylabel="mean gradient norm of a token (1: all tokens)", yscale="log", title="Gradient of the answers' NLL at the blocks' inputs")
    axis.legend()
    figure.tight_layout()
    figure.savefig(args.output / "gradients.png", dpi=100)

    calibration = calibrate(model, data, config)
    weights = by_modality(calibration)
    figure, axis = plt.subplots(figsize=(8, 0.3 * len(weights) + 1.5))
    grid = np.array([[row[kind] for kind in KINDS] for row in weights.values()])
    image = axis.imshow(np.log2(grid), cmap="coolwarm", vmin=-2, vmax=2, aspect="auto")
    axis.set(xticks=range(3), xticklabels=["question", "picture", "answer"], yticks=range(len(weights)), title="Mean weight of a token (1: uniform)")
    axis.set_yticklabels([label.split("layers.")[-1] for label in weights], fontsize=7)
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7)
    figure.colorbar(image, label="log2")
    figure.tight_layout()
    figure.savefig(args.output / "sensitivity.png", dpi=100)

    one = calibrate(model, [batch], config)
    label = list(one.tokens)[len(one.tokens) // 2]
    share = one.token_weights(label).weights[0]
    patches = share[1 : 1 + ROW * ROW].view(ROW, ROW)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4))
    left.imshow(example.pixels)
    left.set(title=f"{question.text}  {question.answer}", xticks=[], yticks=[])
    right.imshow(example.pixels)
    heat = right.imshow(patches * int((one.modality[0] > 0).sum()), cmap="magma", alpha=0.6, extent=(0, 111, 111, 0))
    right.set(title=f"weight of each patch (1: uniform), {label.split('layers.')[-1]}", xticks=[], yticks=[])
    figure.colorbar(heat)
    figure.tight_layout()
    figure.savefig(args.output / "picture.png", dpi=100)

    mean = {kind: float(np.mean([row[kind] for row in weights.values()])) for kind in KINDS}
    numbers = {"channel_ratio": ratios, "token_ratio_by_block": peaks, "weight_by_group": weights, "mean_weight": mean, "gradient_by_block": by_block}
    (args.output / "figures.json").write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"largest over median channel: up to {max(ratios.values()):.0f}; largest over median token: up to {max(peaks):.0f}")
    print("mean gradient norm of a token, by block: " + "; ".join(", ".join(f"{k} {v:.2f}" for k, v in row.items()) for row in by_block))
    print("mean weight of a token (1: uniform): " + ", ".join(f"{kind} {value:.2f}" for kind, value in mean.items()))


if __name__ == "__main__":
    main()
