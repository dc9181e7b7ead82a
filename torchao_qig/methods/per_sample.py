"""Results per sample, gathered from all ranks and in the loader's order."""

from typing import Any

import torch
from torch import Tensor

from torchao_qig.watch import ranks
from torchao_qig.watch.block import GroupState
from torchao_qig.watch.stream import MicroBatch

MODALITIES = {"padding": 0, "text": 1, "vision": 2, "answer": 3}


def _in_order(mine: dict[tuple[int, int], Any]) -> list[Any]:
    """The values of all ranks, sorted by their keys (batch, row)."""
    every = {key: value for part in ranks.gathered(mine) for key, value in part.items()}
    return [every[key] for key in sorted(every)]


def token_weights(state: GroupState, pieces: list[MicroBatch]) -> tuple[list[Tensor], Tensor] | None:
    """Every sample's token weights in a group, and the samples' completeness errors (NaN where there are none). None without any weights."""
    mine: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for p in state.parts:
        piece = pieces[p.piece]
        if p.weights is None or p.weights.shape[0] != len(piece.rows):
            continue
        error = p.completeness if p.completeness is not None else torch.full((1,), torch.nan)
        error = error if len(error) == len(piece.rows) else error.expand(len(piece.rows))
        mine |= {(piece.batch, row): (w.cpu(), e.cpu()) for row, w, e in zip(piece.rows, p.weights, error, strict=True)}
    every = _in_order(mine)
    return ([w for w, _ in every], torch.stack([e for _, e in every])) if every else None


def modalities(pieces: list[MicroBatch]) -> list[Tensor]:
    """What every sample's tokens are: values of MODALITIES."""
    mine: dict[tuple[int, int], Tensor] = {}
    for p in pieces:
        if p.tokens.counted is not None:
            kinds = p.tokens.counted.to(torch.uint8) * MODALITIES["text"]
            for mask, kind in ((p.tokens.answer, "answer"), (p.tokens.vision, "vision")):
                if mask is not None:
                    kinds = torch.where(mask & p.tokens.counted, MODALITIES[kind], kinds)
            mine |= {(p.batch, row): k for row, k in zip(p.rows, kinds.to(torch.uint8), strict=True)}
    return _in_order(mine)
