"""Join samples to longer ones: demonstrations before a question, or several image-text pairs in one sequence."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from torchao_qig.errors import UserError
from torchao_qig.lvlm.messages import Messages
from torchao_qig.lvlm.samples import Sample


def _without_system(messages: Messages) -> Messages:
    return [message for message in messages if message["role"] != "system"]


def few_shot(samples: Sequence[Sample], shots: int, seed: int = 0) -> list[Sample]:
    """Put `shots` other samples before each sample, as demonstrations. The conversation has the system message of the last sample alone."""
    answered = [i for i, sample in enumerate(samples) if sample.messages[-1]["role"] == "assistant"]
    if shots < 0 or shots >= len(samples) or shots > len(answered) - 1:
        raise UserError(
            f"few_shot (shots)={shots}: demonstrations are other samples with an answer, of which there are {max(len(answered) - 1, 0)}; pass 0 to that many"
        )
    draw = random.Random(seed)
    joined = []
    for i, sample in enumerate(samples):
        demonstrations = [samples[j] for j in draw.sample([j for j in answered if j != i], shots)]
        before = [message for shot in demonstrations for message in _without_system(shot.messages)]
        system = [message for message in sample.messages if message["role"] == "system"]
        places = " + ".join([*(shot.source for shot in demonstrations), sample.source])
        joined.append(Sample(system + before + _without_system(sample.messages), places))
    return joined


def interleaved(samples: Sequence[Sample], per_sample: int, seed: int = 0) -> list[Sample]:
    """Join every `per_sample` samples to one sequence: picture, text, picture, text, and finally a whole sample.

    Each sample is used once, in shuffled order. Of all but the last sample of a sequence, the pictures and answers are kept. Of a sample without
    an answer, all of its text is kept.
    """
    if per_sample < 1:
        raise UserError(f"interleaved (per_sample)={per_sample}: join at least 1 sample")
    order = list(samples)
    random.Random(seed).shuffle(order)
    return [_sequence(order[i : i + per_sample]) for i in range(0, len(order), per_sample)]


def _sequence(group: list[Sample]) -> Sample:
    before: list[dict[str, Any]] = []
    for sample in group[:-1]:
        messages = _without_system(sample.messages)
        answered = any(message["role"] == "assistant" for message in messages)
        before += [part for m in messages for part in m["content"] if part["type"] == "image" or m["role"] == "assistant" or not answered]
    system = [message for message in group[-1].messages if message["role"] == "system"]
    first, *rest = _without_system(group[-1].messages)
    if first["role"] != "user":
        first, rest = {"role": "user", "content": []}, [first, *rest]
    opening = [{**first, "content": before + first["content"]}] if before or first["content"] else []
    return Sample([*system, *opening, *rest], " + ".join(sample.source for sample in group))


def mixed(samples: Sequence[Sample], shots: int, per_sample: int, seed: int = 0) -> Sequence[Sample]:
    """The samples joined as a recipe asks. With 0 shots and 1 per sample they stay as they are."""
    samples = few_shot(samples, shots, seed) if shots else samples
    return interleaved(samples, per_sample, seed) if per_sample > 1 else samples
