"""`torchao-qig evaluate`: questions with their answers, or lmms-eval's tasks.

On a file of samples one forward pass per batch gives everything. Greedy decoding answers a question exactly right if and only if every
token of the answer is the likeliest one after those before it; that is "accuracy". NLL and KL are per token of the answers, in nats; of
texts without answers all tokens count, and there is no accuracy. Intervals are 95 %, bootstrapped over samples.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchao_qig import PackedIntTensor
from torchao_qig.calibrate.store import Store
from torchao_qig.lvlm import card
from torchao_qig.lvlm.check import answer_positions, log_probabilities
from torchao_qig.lvlm.data import IGNORED, Batches, calibration_batches
from torchao_qig.lvlm.load import load_model, load_processor
from torchao_qig.lvlm.samples import called, read_samples

RESAMPLES = 2000
IN_MEMORY = 2**31  # bytes of full-precision distributions; more goes to temporary files


def interval(values: Tensor, weights: Tensor, unit: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """sum(values) / sum(weights) and its 95 % interval, units (samples, pictures) drawn with replacement."""
    where, index = unit.unique(return_inverse=True)
    per = torch.zeros(2, len(where), dtype=torch.float64).index_add(1, index, torch.stack([values.double(), weights.double()]))
    drawn = torch.multinomial(torch.ones(len(where)), RESAMPLES * len(where), True, generator=torch.Generator().manual_seed(seed)).view(RESAMPLES, -1)
    sums = per[:, drawn].sum(-1)
    low, high = (sums[0] / sums[1].clamp(min=1e-9)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(per[0].sum() / per[1].sum()), low, high


def answers(
    model: nn.Module, batches: Batches, reference: list[Tensor] | None = None, keep: list[Tensor] | None = None, store: Store | None = None
) -> dict[str, Any]:
    """Accuracy, NLL, and KL to `reference`. `keep` collects, in `store`, what another model's `reference` needs."""
    columns: dict[str, list[Tensor]] = {name: [] for name in ("tokens", "wrong", "nll", "kl")}
    for number, batch in enumerate(tqdm(batches, "evaluating")):
        at = answer_positions(batch)
        logp = log_probabilities(model, batch, limit=None)
        target = batch["input_ids"].roll(-1, 1)[at]
        row = torch.arange(len(at))[:, None].expand_as(at)[at]

        def per_sample(values: Tensor, row: Tensor = row, size: int = len(at)) -> Tensor:
            return torch.zeros(size, dtype=torch.float64).index_add(0, row, values.double())

        columns["tokens"].append(per_sample(torch.ones(len(row))))
        columns["wrong"].append(per_sample(logp.argmax(-1) != target))
        columns["nll"].append(per_sample(-logp.gather(1, target[:, None])[:, 0]))
        if reference is not None:
            columns["kl"].append(per_sample((reference[number].exp() * (reference[number] - logp)).sum(-1)))
        if keep is not None and store is not None:
            keep.append(store.put(logp))
    tokens, wrong, nll = (torch.cat(columns[name]) for name in ("tokens", "wrong", "nll"))
    unit = torch.arange(len(tokens))
    found: dict[str, Any] = {"accuracy": None, "nll": interval(nll, tokens, unit), "kl": None}
    if any(bool((batch["labels"] != IGNORED).any()) for batch in batches if "labels" in batch):  # texts without answers are right or wrong nowhere
        found["accuracy"] = interval(wrong == 0, torch.ones(len(tokens)), unit)
    if reference is not None:
        found["kl"] = interval(torch.cat(columns["kl"]), tokens, unit)
    return found | {"samples": len(tokens), "tokens": int(tokens.sum())}


def run(
    model: str, data: str | None, images: str | None, reference: str | None, tasks: list[str], include: str | None, samples: int | None, seed: int, split: str,
    dtype: str, device: str, keep_packed: bool = False,
) -> str:  # fmt: skip
    """Measure, note it beside the model (qig/evaluation.json, qig/tasks.json, the card), and return it as tables."""
    if not data and not tasks:
        raise ValueError("data: nothing to evaluate on; pass --data with questions and answers, or --tasks with lmms-eval's")
    processor, tables = load_processor(model), []
    quantized = load_model(model, dtype, device=device)
    size = _bytes(quantized)
    quantized = quantized if keep_packed else unpacked(quantized)
    if data:
        with called("data"):
            batches = calibration_batches(read_samples(data, images, split=split, count=samples, seed=seed), processor)
        rows: list[dict[str, Any]] = []
        kept: list[Tensor] | None = None
        if reference is not None:
            exact, kept = load_model(reference, dtype, device=device), []
            rows.append({"name": "full precision", "bytes": _bytes(exact), **answers(exact, batches, keep=kept, store=Store(IN_MEMORY))})
            del exact
        rows.append({"name": "quantized", "bytes": size, **answers(quantized, batches, kept)})
        tables.append(_note(model, "evaluation.json", {"rows": rows, "data": data}, card.evaluation_table))
    if tasks:
        from torchao_qig.lvlm import harness

        tables.append(_note(model, "tasks.json", {"tasks": harness.run(quantized, processor, tasks, include, samples)}, card.tasks_table))
    return "\n\n".join(tables)


def unpacked(model: nn.Module) -> nn.Module:
    """The model with dense weights, where that changes no bit: uncompiled linears dequantize at every call, here it is done once."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, PackedIntTensor) and not weight.int8_activations and weight.act_pre_scale is None:
            module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    return model


def _bytes(model: nn.Module) -> int:
    """As stored."""
    return sum(p.nbytes_packed() if isinstance(p, PackedIntTensor) else p.numel() * p.element_size() for p in model.parameters())


def _note(model: str, file: str, found: dict[str, Any], table: Callable[[dict[str, Any]], str]) -> str:
    """Keep a result beside a model that `quantize` wrote; its table."""
    found |= {"command": " ".join(["torchao-qig", *sys.argv[1:]]), "date": date.today().isoformat()}
    notes = Path(model) / "qig"
    if (notes / "receipt.json").exists():
        (notes / file).write_text(json.dumps(found, indent=1, default=float) + "\n")
        card.rewrite(Path(model))
    return table(found)
