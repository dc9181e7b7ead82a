"""Make batches for calibration from samples and a processor, with labels on the answers and little padding.

Every sample is first processed alone, which shows its length. Samples of similar length then share a batch, up to a budget of tokens.
Samples that the processor refuses or that are too long are skipped and named. No sample is cut, since models fail on cut pictures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchao_qig.errors import UserError
from torchao_qig.lvlm.chat import Chat
from torchao_qig.lvlm.messages import Messages
from torchao_qig.lvlm.pictures import BadRow, opened
from torchao_qig.lvlm.samples import Sample, describe_skipped

WASTE = 0.1  # largest share of padding among a batch's positions
IGNORED = -100  # label of a token that is not part of an answer


class Batches(list[dict[str, Tensor]]):
    """A list of batches, each the keyword arguments of the model's forward.

    Attributes:
        rows: for each batch, the numbers of its samples among those given.
        lengths: for each batch, the number of tokens of each of its samples.
        skipped: reason -> places of the samples that were skipped for it.
    """

    def __init__(self, batches: Iterable[dict[str, Tensor]], rows: list[list[int]], lengths: list[list[int]], skipped: dict[str, list[str]]) -> None:
        super().__init__(batches)
        self.rows, self.lengths, self.skipped = rows, lengths, skipped

    @property
    def padding(self) -> float:
        """The share of padding among all positions."""
        padded = sum(len(tokens) * max(tokens) for tokens in self.lengths)
        return 1 - sum(map(sum, self.lengths)) / padded

    def shares(self) -> dict[str, float]:
        """The shares of pictures, answers and other tokens among the tokens that are no padding."""
        total = sum(map(sum, self.lengths))
        picture = sum(int((_vision(batch) != 0).sum()) for batch in self if _vision(batch) is not None)
        answer = sum(int((batch["labels"] != IGNORED).sum()) for batch in self if "labels" in batch)
        return {"picture": picture / total, "answer": answer / total, "other": (total - picture - answer) / total}

    def summary(self) -> str:
        """The numbers of samples, batches, tokens and skipped samples, as text."""
        tokens = sorted(n for lengths in self.lengths for n in lengths)
        shares = ", ".join(f"{name} {share:.1%}" for name, share in self.shares().items())
        lines = [
            f"{len(tokens)} samples in {len(self)} batches, {sum(tokens)} tokens, {self.padding:.1%} padding",
            f"tokens per sample: {tokens[0]} to {tokens[-1]}, median {tokens[len(tokens) // 2]}",
            f"tokens: {shares}",
        ]
        if self.skipped:
            bad = sum(map(len, self.skipped.values()))
            lines.append(f"{bad} of {bad + len(tokens)} samples skipped: {describe_skipped(self.skipped)}")
        return "\n".join(lines)


def _vision(batch: dict[str, Tensor]) -> Any:
    return batch.get("vision_mask", batch.get("mm_token_type_ids"))


@dataclass(frozen=True)
class Measured:
    """What processing a sample alone shows about it."""

    ids: list[int]
    answer: list[bool] | None
    pictures: int
    typed: bool  # the processor itself says which tokens are pictures


def _in_memory(messages: Messages) -> Messages:
    """The messages with their pictures opened."""

    def loaded(part: dict[str, Any]) -> dict[str, Any]:
        return {**part, "image": opened(part["image"])} if part["type"] == "image" else part

    return [{**message, "content": [loaded(part) for part in message["content"]]} for message in messages]


def _measure(chat: Chat, sample: Sample, answers: bool, max_length: int | None, gained: Counter[int]) -> Measured:
    """Process a sample alone; raises `BadRow` if it cannot be used. The tokens that its pictures add are counted in `gained`."""
    try:
        messages = _in_memory(sample.messages)
        chat.find_place(messages)
        columns = chat.columns([messages])
        ids = columns["input_ids"][0].tolist()
        if max_length is not None and len(ids) > max_length:
            raise BadRow("too long", f"{len(ids)} tokens, max_length={max_length}")
        if sample.images:
            gained.update(chat.grown(messages, ids))
        mask = chat.answers(messages, ids) if answers else None
    except BadRow:
        raise
    except UserError as error:
        raise BadRow("refused by the processor", str(error)) from error
    except Exception as error:  # templates and processors refuse with any kind of exception
        reason = str(error).strip().splitlines()
        raise BadRow("refused by the processor", f"{type(error).__name__}: {reason[0][:200] if reason else 'no reason given'}") from error
    return Measured(ids, mask, len(sample.images), "mm_token_type_ids" in columns)


def packed(lengths: Sequence[int], tokens: int, waste: float = WASTE) -> list[list[int]]:
    """Group the indices of `lengths` into batches of similar length, longest first.

    The size of a batch times its longest length is at most `tokens`, and its share of padding is at most `waste`. An index whose length alone
    is above `tokens` has a batch of its own.
    """
    batches: list[list[int]] = []
    used = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches:
            room = (len(batches[-1]) + 1) * lengths[batches[-1][0]]
            if room <= tokens and used + lengths[i] >= (1 - waste) * room:
                batches[-1].append(i)
                used += lengths[i]
                continue
        batches.append([i])
        used = lengths[i]
    return batches


def calibration_batches(samples: Sequence[Sample], processor: Any, *, tokens: int = 4096, max_length: int | None = None, answers: bool = True) -> Batches:
    """Batches for `torchao_qig.calibrate`, or for the model itself.

    Args:
        samples: from `read_samples`.
        processor: the model's: `load_processor(name)`; a tokenizer for samples without pictures.
        tokens: largest number of tokens of a batch, padding included. A longer sample has a batch of its own.
        max_length: samples with more tokens are skipped; with None, no sample is too long.
        answers: whether batches have `labels`: the tokens of the assistant's turns, -100 elsewhere. The chat template shows where turns are.
    """
    for name, value in (("tokens", tokens), ("max_length", max_length)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    chat = Chat(processor)
    found: dict[int, Measured] = {}
    skipped: dict[str, list[str]] = {}
    gained: Counter[int] = Counter()

    def skip(i: int, error: BadRow) -> None:
        skipped.setdefault(error.reason, []).append(f"{samples[i].source} ({error.detail})")

    for i, sample in enumerate(samples):
        try:
            found[i] = _measure(chat, sample, answers, max_length, gained)
        except BadRow as error:
            skip(i, error)
    picture = chat.picture_token(gained)
    for i in [i for i in found if picture is not None and chat.spells(samples[i].messages, picture)]:
        del found[i]
        skip(i, BadRow("text holds the picture token", "the model would look for another picture"))
    if not found:
        raise UserError(f"samples: none of {len(samples)} can be used with {type(processor).__name__}: {describe_skipped(skipped) or 'there are none'}")

    # Samples with and without pictures go into different batches: not every processor takes both at once.
    groups = [[i for i, one in found.items() if bool(one.pictures) is has] for has in (True, False)]
    rows = [[group[j] for j in batch] for group in groups for batch in packed([len(found[i].ids) for i in group], tokens)]
    made = [one for batch in rows for one in _made(chat, samples, found, batch, picture)]
    order = sorted(range(len(made)), key=lambda k: (-len(found[made[k][1][0]].ids), made[k][1][0]))
    rows = [made[k][1] for k in order]
    return Batches([made[k][0] for k in order], rows, [[len(found[i].ids) for i in batch] for batch in rows], skipped)


def _made(chat: Chat, samples: Sequence[Sample], found: dict[int, Measured], rows: list[int], picture: int | None) -> list[tuple[dict[str, Tensor], list[int]]]:
    """The batch of the samples `rows`, or a batch for each of them if the processor cannot join them.

    A processor may refuse to join pictures of different sizes, or make other tokens of a sample in a batch than of the sample alone.
    """
    try:
        batch = chat.columns([_in_memory(samples[i].messages) for i in rows])
        ids = batch["input_ids"]
        real = batch["attention_mask"] != 0 if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
        for i, row, mask in zip(rows, ids, real, strict=True):
            if row[mask].tolist() != found[i].ids:
                raise UserError(f"{samples[i].source}: {type(chat.processor).__name__} makes other tokens of it than before; its file has changed meanwhile")
    except Exception:  # of any kind: each sample alone raised none
        if len(rows) == 1:
            raise
        return [one for i in rows for one in _made(chat, samples, found, [i], picture)]
    if picture is not None and not found[rows[0]].typed:
        batch["vision_mask"] = (ids == picture) & real
    if found[rows[0]].answer is not None:
        labels = torch.full_like(ids, IGNORED)
        for i, row, mask, label in zip(rows, ids, real, labels, strict=True):
            label[mask] = torch.where(torch.tensor(found[i].answer), row[mask], IGNORED)
        batch["labels"] = labels
    return [(batch, rows)]
