"""Token weights on a common scale: a token has the weight 1 if all tokens of its sample count the same."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchao_qig.calibration.result import Calibration
from torchao_qig.methods.per_sample import MODALITIES
from torchao_qig.report.names import place, rows

KINDS = {"text": "question and template", "vision": "picture", "answer": "answer"}
ALL = "all"


class Sample(NamedTuple):
    """The tokens of a sample without padding: what each token is (values of MODALITIES), and its weight in each view."""

    modality: NDArray[np.int64]
    weights: NDArray[np.float64]  # (views, tokens)


class View(NamedTuple):
    """Groups of linears that are shown as one, by their mean weights. `kind` and `layer` are "all" for the mean over all groups."""

    kind: str
    layer: str
    labels: list[str]


def views(calibration: Calibration) -> list[View]:
    """The views: the mean of all groups, then one view for each kind and layer. The experts of a layer share a view."""
    found: dict[tuple[str, str], list[str]] = {}
    for label, layer in rows(calibration.tokens).items():
        found.setdefault((place(label).kind, layer), []).append(label)
    return [View(ALL, ALL, list(calibration.tokens)), *(View(kind, at, labels) for (kind, at), labels in found.items())]


def samples(calibration: Calibration, chosen: list[View], most: int) -> list[Sample]:
    """The weights of the first samples, at most `most`."""
    found = {label: calibration.token_weights(label) for label in calibration.tokens}
    result: list[Sample] = []
    for i in range(min((most, *(len(t.weights) for t in found.values())))):
        some = next(iter(found.values())).modality[i].numpy().astype(np.int64)
        kept = some != MODALITIES["padding"]
        by_label = {label: t.weights[i].double().numpy()[kept] for label, t in found.items()}
        relative = {label: w * kept.sum() / w.sum() if w.sum() > 0 else np.ones_like(w) for label, w in by_label.items()}
        result.append(Sample(some[kept], np.stack([np.mean([relative[label] for label in view.labels], axis=0) for view in chosen])))
    return result


def by_modality(calibration: Calibration) -> dict[str, dict[str, float]]:
    """Group -> kind of token -> the mean weight of such a token."""
    result: dict[str, dict[str, float]] = {}
    for label in calibration.tokens:
        found = calibration.token_weights(label)
        parts: dict[str, list[NDArray[np.float64]]] = {kind: [] for kind in KINDS}
        for weights, modality in zip(found.weights, found.modality, strict=True):
            codes, values = modality.numpy(), weights.double().numpy()
            for kind in KINDS:
                parts[kind].append(values[codes == MODALITIES[kind]] * int((codes > 0).sum()))
        result[label] = {kind: float(np.concatenate(p).mean()) for kind, p in parts.items() if sum(map(len, p))}
    return result
