"""Check a quantized model: compare its next-token distributions with those of the full-precision model, on a few samples."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

BATCHES, POSITIONS = 2, 256  # batches to compare on; positions of each


class BrokenModel(RuntimeError):
    """The quantized model puts out NaN or infinity, or diverges too far from full precision."""


def answer_positions(batch: dict[str, Tensor]) -> Tensor:
    """(B, T) bool: positions whose next token is part of an answer. In samples without answers, all positions before a real token count."""
    ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    answers, real = torch.zeros_like(ids, dtype=torch.bool), torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    if labels is not None:
        answers[:, :-1] = labels[:, 1:] != -100
    every = real & torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], 1)
    return torch.where(answers.any(1, keepdim=True), answers, every)


def smallest(batches: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The batches to compare on: those with the fewest tokens."""
    return sorted(batches, key=lambda batch: batch["input_ids"].numel())[:BATCHES]


@torch.no_grad()
def log_probabilities(model: nn.Module, batch: dict[str, Tensor], limit: int | None = POSITIONS) -> Tensor:
    """The model's log-probabilities at the first `limit` of the batch's `answer_positions`: (positions, vocabulary), float32, on the host."""
    device = next(p.device for p in model.parameters())
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    inputs = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in batch.items() if k not in ("labels", "vision_mask", "answer_mask")}
    at = answer_positions(batch).to(device)
    logits = model(**inputs, use_cache=False).logits[at][:limit]
    return logits.float().log_softmax(-1).cpu()


def references(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """The model's log-probabilities on these batches, for a later comparison."""
    return [log_probabilities(model, batch) for batch in batches]


def divergence(reference: list[Tensor], model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, Any]:
    """Mean KL per token in nats, the share of tokens whose likeliest successor is the same, and the number of tokens."""
    kl = same = count = 0.0
    for logp, batch in zip(reference, batches, strict=True):
        now = log_probabilities(model, batch)
        kl += float((logp.exp() * (logp - now)).sum(dtype=torch.float64))
        same += float((logp.argmax(-1) == now.argmax(-1)).sum())
        count += len(logp)
    return {"kl": kl / max(count, 1), "agreement": same / max(count, 1), "tokens": int(count)}


def check(found: dict[str, Any], max_kl: float) -> None:
    """Raise `BrokenModel` if the KL in `found`, from `divergence`, is not finite or larger than `max_kl`."""
    if not math.isfinite(found["kl"]):
        raise BrokenModel("the quantized model puts out NaN or infinity; try more bits, another --dtype, or --device cpu. Nothing was written.")
    if found["kl"] > max_kl:
        raise BrokenModel(
            f"the quantized model diverges from full precision by {found['kl']:.3f} nats per token (max_kl={max_kl:g}) and agrees on"
            f" {found['agreement']:.0%} of {found['tokens']} tokens; use more bits, smaller groups, or samples like your data. Nothing was written."
        )
