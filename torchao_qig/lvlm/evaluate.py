"""`torchao-qig evaluate`: measure a model on questions with answers, or on lmms-eval's tasks.

On a file of samples, one forward pass per batch gives all measures. "Accuracy" is the share of questions that greedy decoding would answer
exactly right: those where every token of the answer is the likeliest one after the tokens before it. NLL and KL are per token of the answers,
in nats. In texts without answers all tokens count, and there is no accuracy. Intervals are 95 %, bootstrapped over samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchao_qig import PackedIntTensor
from torchao_qig.errors import UserError
from torchao_qig.integrations.transformers import has_packed
from torchao_qig.lvlm import card, command
from torchao_qig.lvlm.check import answer_positions, log_probabilities
from torchao_qig.lvlm.data import IGNORED, calibration_batches
from torchao_qig.lvlm.load import bytes_on_disk, device_of, load_model, load_processor
from torchao_qig.lvlm.samples import Samples, naming_argument, read_samples

RESAMPLES = 2000


def interval(values: Tensor, weights: Tensor, unit: Tensor, seed: int = 0) -> tuple[float, float, float]:
    """sum(values) / sum(weights) with its 95 % interval, bootstrapped over units.

    Args:
        values, weights: one of each for every question or sample.
        unit: for each of them, the number of the unit (sample or picture) that it belongs to. Units are drawn with replacement.
        seed: of the draws.
    """
    where, index = unit.unique(return_inverse=True)
    per = torch.zeros(2, len(where), dtype=torch.float64).index_add(1, index, torch.stack([values.double(), weights.double()]))
    drawn = torch.multinomial(torch.ones(len(where)), RESAMPLES * len(where), True, generator=torch.Generator().manual_seed(seed)).view(RESAMPLES, -1)
    sums = per[:, drawn].sum(-1)
    low, high = (sums[0] / sums[1].clamp(min=1e-9)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(per[0].sum() / per[1].sum()), low, high


def _per_sample(model: nn.Module, batch: dict[str, Tensor], reference: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """Sums over each sample's tokens, and the log-probabilities that they came from."""
    at = answer_positions(batch)
    logp = log_probabilities(model, batch, limit=None)
    target, row = batch["input_ids"].roll(-1, 1)[at], torch.arange(len(at))[:, None].expand_as(at)[at]

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(len(at), dtype=torch.float64).index_add(0, row, values.double())

    answered = batch["labels"] != IGNORED if "labels" in batch else torch.zeros_like(at)
    found = {"tokens": summed(torch.ones(len(row))), "wrong": summed(logp.argmax(-1) != target), "nll": summed(-logp.gather(1, target[:, None])[:, 0])}
    found["kl"] = summed((reference.exp() * (reference - logp)).sum(-1)) if reference is not None else torch.full((len(at),), torch.nan)
    return found | {"answered": answered.any(1)}, logp


def _summary(columns: dict[str, Tensor]) -> dict[str, Any]:
    answered = columns["answered"]
    if answered.any():  # leave out texts without an answer, which cannot be right or wrong
        columns = {name: values[answered] for name, values in columns.items()}
    tokens, unit = columns["tokens"], torch.arange(len(columns["tokens"]))
    right = interval(columns["wrong"] == 0, torch.ones(len(tokens)), unit) if answered.any() else None
    kl = None if columns["kl"].isnan().any() else interval(columns["kl"], tokens, unit)
    return {"accuracy": right, "nll": interval(columns["nll"], tokens, unit), "kl": kl, "samples": len(tokens), "tokens": int(tokens.sum())}


def compare(models: dict[str, nn.Module], batches: Iterable[dict[str, Tensor]]) -> dict[str, dict[str, Any]]:
    """Accuracy and NLL of every model, and its KL to the first model. Models are run batch by batch, and only sums are kept of a batch."""
    columns: dict[str, list[dict[str, Tensor]]] = {name: [] for name in models}
    for batch in tqdm(batches, "evaluating"):
        first: Tensor | None = None
        for name, model in models.items():
            found, logp = _per_sample(model, batch, first)
            columns[name].append(found)
            first = logp if first is None else first
    return {name: _summary({key: torch.cat([part[key] for part in parts]) for key in parts[0]}) for name, parts in columns.items()}


def answers(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> dict[str, Any]:
    """Accuracy and NLL of one model."""
    return compare({"": model}, batches)[""]


def batches_of(samples: Samples, processor: Any, at_once: int = 64) -> Iterator[dict[str, Tensor]]:
    """Yield batches, made from `at_once` samples at a time: the pictures of a whole data set would not fit into memory."""
    used, refused = False, ""
    for first in range(0, len(samples), at_once):
        try:
            yield from calibration_batches(samples[first : first + at_once], processor)
            used = True
        except UserError as error:  # none of these samples can be used; others may
            refused = str(error)
    if not used:
        raise UserError(refused)


def run(
    model: str, data: str | None = None, images: str | None = None, against: str | None = None, tasks: Sequence[str] = (), include: str | None = None,
    samples: int | None = None, seed: int = 0, split: str = "train", dtype: str = "auto", device: str = "cpu", keep_packed: bool = False,
) -> str:  # fmt: skip
    """Measure a model and return the results as tables.

    If `quantize` wrote the model, the results are also stored there (qig/evaluation.json, qig/tasks.json, the card).
    """
    given = dict(
        data=data, images=images, against=against, tasks=tasks, include=include, samples=samples, seed=seed, split=split, dtype=dtype, device=device,
        keep_packed=keep_packed,
    )  # fmt: skip
    about = {"command": command.command_line("evaluate", run, model, given), "date": date.today().isoformat()}
    if not data and not tasks:
        raise UserError("data: nothing to evaluate on; pass --data with questions and answers, or --tasks with lmms-eval's")
    processor, place, read = load_processor(model), device_of(device), None
    if data:  # read it now, so that its faults are found before weights are loaded
        with naming_argument("data"):
            read = read_samples(data, images, split=split, count=samples, seed=seed)
    loaded = load_model(model, dtype, device=place)
    tables = []
    if read is not None:
        sources = ({"full precision": against} if against is not None else {}) | {"quantized" if has_packed(loaded) else "as given": model}
        models = {name: load_model(source, dtype, device=place) if source != model else loaded for name, source in sources.items()}
        found = compare(models, batches_of(read, processor))
        rows = [{"name": name, "bytes": _size(sources[name], models[name]), **figures} for name, figures in found.items()]
        evaluation = {"rows": rows, "data": data, **about}
        card.note(model, "evaluation.json", evaluation)
        tables.append(card.evaluation_table(evaluation))
        del models
    if tasks:
        from torchao_qig.lvlm import harness

        answered = {"tasks": harness.run(loaded if keep_packed else unpacked(loaded), processor, tasks, include, samples), **about}
        card.note(model, "tasks.json", answered)
        tables.append(card.tasks_table(answered))
    return "\n\n".join(tables)


def _size(source: str, model: nn.Module) -> int:
    """The bytes of the weight files, or of the loaded weights where the files are not in the directory."""
    stored = bytes_on_disk(Path(source).expanduser())
    return stored or sum(p.nbytes_packed() if isinstance(p, PackedIntTensor) else p.numel() * p.element_size() for p in model.parameters())


def unpacked(model: nn.Module) -> nn.Module:
    """Dequantize the model's packed weights, where this changes no bit of its results. Uncompiled linears would do it at every call."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point() and not isinstance(p, PackedIntTensor))  # that of the linears' inputs
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(weight, PackedIntTensor) and not weight.int8_activations and weight.act_pre_scale is None:
            module.weight = nn.Parameter(weight.dequantize(dtype), requires_grad=False)
    return model
