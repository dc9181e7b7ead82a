"""Training of the small LVLM: first the tower alone, on what each patch shows; then everything, on the answers.

The first stage stands in for the pretraining of a real LVLM's tower. Its linear heads are not kept in the model. In the second stage, a
further loss pulls each patch towards the words for what it shows. It stands in for a tower's training on captions.
The questions of a step share their picture (model.pack). The picture and its only tile are the same pixels, so the tower computes
them once here; `check` compares the result with the model's own forward before anything is trained.
"""

from __future__ import annotations

import json
import math
import random
import string
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from recipes.small_lvlm.data import Sample, sample
from recipes.small_lvlm.model import IMAGE_TOKENS, ROW, Packed, pack, pictures, pixel_values
from recipes.small_lvlm.worlds import maps, objects, text
from recipes.small_lvlm.worlds.canvas import COLORS, NUMBERS

WHAT = ["nothing", "cell", *(f"{size} {kind}" for size in objects.RADIUS for kind in objects.SHAPES), *string.ascii_uppercase, *text.DIGITS]
WHAT += [f"{kind} {value}" for kind in ("bar", "point", "digit") for value in range(10)]
COLOR = ["nothing", *COLORS, *maps.TERRAIN]
UNSAID = ("nothing", "cell", "bar", "point", "digit")
PLACES = 7  # no place, and up to six rows or columns
HEADS = [len(WHAT), len(COLOR), PLACES, PLACES]
MUON = 10.0  # Muon's learning rate divided by AdamW's
BASE_FROM = 0.8  # after this share of the steps, the decoder gets both copies of the picture
LENGTH = 256  # tokens of a picture and the questions about it in a step


class Batches(Dataset):  # type: ignore[type-arg]
    """Batch i of the training split: pictures, indices of what each patch shows, and the packed questions if there is a tokenizer."""

    def __init__(self, first: int, size: int, tokenizer: PreTrainedTokenizerFast | None) -> None:
        self.first, self.size, self.tokenizer = first, size, tokenizer

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Packed | None]:
        samples = [sample("train", self.first + step * self.size + i) for i in range(self.size)]
        shown = torch.tensor([[(WHAT.index(m.what), COLOR.index(m.color), m.row + 1, m.column + 1) for m in one.patches] for one in samples])
        packed = pack([shuffled(one, self.first + step) for one in samples], self.tokenizer, LENGTH) if self.tokenizer else None
        return packed.pictures if packed else pictures(samples), shown, packed


def shuffled(one: Sample, seed: int) -> Sample:
    """The sample with its questions in another order, since only the first ones fit into a step."""
    questions = list(one.questions)
    random.Random(f"order {seed}").shuffle(questions)
    return replace(one, questions=tuple(questions))


def said(tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """Which tokens name each thing that a patch may show, and which tokens name each color: two tables (names, vocabulary) of 0 and 1."""

    def named(names: list[str]) -> Tensor:
        table = torch.zeros(len(names), len(tokenizer))
        for row, name in zip(table, names, strict=True):
            words = [NUMBERS[int(word)] if word.isdigit() and len(name) > 1 else word for word in name.split() if word not in UNSAID]
            row[[i for word in words for i in tokenizer(f" {word}", add_special_tokens=False)["input_ids"]]] = 1
        return table

    return named(WHAT), named(COLOR)


def seen(model: LlavaOnevisionForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The tower's features of each picture, (pictures, patches, width)."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]


def embedded(model: LlavaOnevisionForConditionalGeneration, ids: Tensor, features: Tensor) -> Tensor:
    """The decoder's inputs, as LlavaOnevision lays them out: the picture, its tile with newlines, the text."""
    image = model.model.multi_modal_projector(features)
    newline = model.model.image_newline.expand(len(image), ROW, 1, -1)
    tile = torch.cat([image.unflatten(1, (ROW, ROW)), newline], 2).flatten(1, 2)
    words = model.model.get_input_embeddings()(ids)
    shown = torch.cat([image, tile], 1) if ids[0, IMAGE_TOKENS] == ids[0, 1] else tile  # see Packed.without_base
    return torch.cat([words[:, :1], shown, words[:, 1 + shown.shape[1] :]], 1)


def decode(decoder: nn.Module, embeddings: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    return decoder(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state


def logits(model: LlavaOnevisionForConditionalGeneration, batch: Packed, features: Tensor, run: Callable[..., Tensor] = decode) -> Tensor:
    """The logits at the positions before an answer's tokens. `run`: `decode`, compiled or not."""
    return model.lm_head(run(model.model.language_model, embedded(model, batch.ids, features), batch.mask(), batch.positions)[batch.answer])


@torch.no_grad()
def check(model: LlavaOnevisionForConditionalGeneration, batch: Packed) -> None:
    """Raise if `logits` differs from the model's own forward."""
    ours = logits(model, batch, seen(model, pixel_values(batch.pictures)[:, 0]))
    theirs = model(**batch.keywords()).logits[batch.answer]
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def optimizers(modules: list[nn.Module], matrices: list[nn.Parameter], high: float) -> list[torch.optim.Optimizer]:
    """Muon for `matrices` (half the steps that AdamW needs here, docs/LOG.md), AdamW for the rest. Vectors do not decay."""
    other = [p for module in modules for p in module.parameters() if not any(p is m for m in matrices)]
    groups = [{"params": [p for p in other if p.dim() > 1], "weight_decay": 0.05}, {"params": [p for p in other if p.dim() < 2], "weight_decay": 0.0}]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=high, betas=(0.9, 0.98), fused=True)]
    return [*found, torch.optim.Muon(matrices, lr=MUON * high, weight_decay=0.05)] if matrices else found


def rate(step: int, steps: int, warmup: int) -> float:
    """The learning rate at a step as a share of its peak: a linear warm-up, then a cosine to 2 %."""
    return min((step + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def train(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path, *, tower_steps: int, steps: int, size: int = 16,
    tower_rate: float = 1e-3, peak: float = 1e-3, save_every: int = 250, compiled: bool = True,
) -> None:  # fmt: skip
    """Train the model in place. A run that was killed continues from the last state in `folder`."""
    torch.manual_seed(1)
    head = nn.Linear(256, sum(HEADS))
    tower = model.model.vision_tower
    log, state = folder / "log.jsonl", folder / "state.pt"
    everything = nn.ModuleList([model, head])

    run = torch.compile(decode, dynamic=False) if compiled else decode

    def patch_loss(features: Tensor, shown: Tensor) -> Tensor:
        parts = head(features).flatten(0, 1).split(HEADS, -1)
        return sum((F.cross_entropy(part, shown.flatten(0, 1)[:, i]) for i, part in enumerate(parts)), torch.zeros(()))

    words = said(tokenizer)

    def word_loss(features: Tensor, shown: Tensor) -> Tensor:
        image = model.model.multi_modal_projector(features).flatten(0, 1)
        meant = sum((table[shown.flatten(0, 1)[:, i]] for i, table in enumerate(words)), torch.zeros(()))
        there = meant.sum(1) > 0
        likely = (image[there] @ model.get_input_embeddings().weight.T).log_softmax(-1)
        return -(meant[there] / meant[there].sum(1, keepdim=True) * likely).sum(1).mean()

    def tower_loss(features: Tensor, shown: Tensor, batch: Packed | None, part: float) -> tuple[Tensor, Tensor]:
        loss = patch_loss(features, shown)
        return loss, loss.detach()

    def answer_loss(features: Tensor, shown: Tensor, batch: Packed, part: float) -> tuple[Tensor, Tensor]:
        batch = batch if part >= BASE_FROM else batch.without_base()
        loss = F.cross_entropy(logits(model, batch, features, run), batch.target[batch.answer])
        return loss + (1 - part) * (0.1 * patch_loss(features, shown) + 0.2 * word_loss(features, shown)), loss.detach()

    matrices = [p for p in model.model.language_model.layers.parameters() if p.dim() == 2]
    stages: list[tuple[str, int, Batches, list[nn.Module], list[nn.Parameter], float, Callable[..., tuple[Tensor, Tensor]]]] = [
        ("tower", tower_steps, Batches(0, 4 * size, None), [tower, head], [], tower_rate, tower_loss),
        ("answers", steps, Batches(10_000_000, size, tokenizer), [model, head], matrices, peak, answer_loss),
    ]
    done = torch.load(state, weights_only=True) if state.exists() else {"stage": "tower", "step": 0}
    if "model" in done:
        everything.load_state_dict(done["model"])
    for stage, count, data, modules, matrices, high, losses in stages:
        if done["stage"] == "answers" and stage == "tower":
            continue
        start = done["step"] if done["stage"] == stage else 0
        used = optimizers(modules, matrices, high)
        if start:
            for optimizer, state_of in zip(used, done["optimizers"], strict=True):
                optimizer.load_state_dict(state_of)
        begin = time.time() - (done["seconds"] if start else 0.0)
        smooth = done["smooth"] if start else None
        ahead = DataLoader(data, batch_size=None, sampler=range(start, count), num_workers=1, prefetch_factor=4)  # a process of its own
        for step, (pixels, shown, batch) in enumerate(ahead, start):
            for optimizer, factor in zip(used, (1, MUON), strict=False):
                for group in optimizer.param_groups:
                    group["lr"] = factor * high * rate(step, count, 200)
            loss, plain = losses(seen(model, pixel_values(pixels)[:, 0]), shown, batch, step / count)
            everything.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for module in modules for p in module.parameters()], 1.0)
            for optimizer in used:
                optimizer.step()
            smooth = float(plain) if smooth is None else 0.95 * smooth + 0.05 * float(plain)
            if (step + 1) % 25 == 0 or step + 1 == count:
                line = {"stage": stage, "step": step + 1, "loss": round(smooth, 4), "seconds": round(time.time() - begin, 1)}
                with log.open("a") as out:
                    out.write(json.dumps(line) + "\n")
                print(line, flush=True)
            if (step + 1) % save_every == 0 or step + 1 == count:
                progress = {"stage": stage, "step": step + 1, "seconds": time.time() - begin, "smooth": smooth}
                torch.save(
                    {**progress, "model": everything.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in used]}, state.with_suffix(".new")
                )
                state.with_suffix(".new").replace(state)
