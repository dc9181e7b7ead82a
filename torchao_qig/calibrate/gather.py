"""What was found per sample, from all ranks, in the loader's order."""

from typing import Any

import torch
from torch import Tensor

from torchao_qig.calibrate import ranks
from torchao_qig.calibrate.result import MODALITIES
from torchao_qig.calibrate.stream import Piece
from torchao_qig.calibrate.work import Work


def _in_order(mine: dict[tuple[int, int], Any]) -> list[Any]:
    """By batch and row."""
    every = {key: value for part in ranks.gathered(mine) for key, value in part.items()}
    return [every[key] for key in sorted(every)]


def token_weights(work: Work, pieces: list[Piece]) -> tuple[list[Tensor], Tensor] | None:
    """Every sample's weights in a group, and the samples' completeness errors (NaN where there are none)."""
    mine: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for p in work.parts:
        piece = pieces[p.piece]
        if p.weights is None or p.weights.shape[0] != len(piece.rows):
            continue
        error = p.completeness if p.completeness is not None else torch.full((1,), torch.nan)
        error = error if len(error) == len(piece.rows) else error.expand(len(piece.rows))
        mine |= {(piece.batch, row): (w.cpu(), e.cpu()) for row, w, e in zip(piece.rows, p.weights, error, strict=True)}
    every = _in_order(mine)
    return ([w for w, _ in every], torch.stack([e for _, e in every])) if every else None


def modalities(pieces: list[Piece]) -> list[Tensor]:
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
