"""lmms-eval on a model in memory: any transformers LVLM, quantized or not, on any of lmms-eval's tasks that generate.

    lm = InMemory(model, from_processor(processor), partial(tokenizer.decode, skip_special_tokens=True))
    results = lmms_eval.evaluator.simple_evaluate(lm, tasks=["vizwiz_vqa_val", "chartqa"])

A task gives chat messages: text and pictures in their order. Decoding is greedy, whatever a task says about sampling. A task's settings of
length (`max_new_tokens`) and stops (`until`) are used. Needs lmms-eval: pip install --no-deps -r recipes/requirements-eval.txt
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from torch import Tensor, nn
from tqdm import tqdm

from torchao_qig.errors import UserError
from torchao_qig.lvlm.chat import Chat
from torchao_qig.lvlm.messages import Messages, pictures_of

Prepare = Callable[[list[Messages]], dict[str, Tensor]]  # chats up to where the answers begin -> the model's keyword arguments, padded on the left
NEW_TOKENS = 128  # for tasks that set no max_new_tokens


class OtherTask(UserError, NotImplementedError):
    """A task asks for something other than one generated answer."""


def from_processor(processor: Any) -> Prepare:
    """A `Prepare` that uses a Hugging Face processor or tokenizer, and its chat template if it has one."""
    chat = Chat(processor)

    def prepare(chats: list[Messages]) -> dict[str, Tensor]:
        if any(map(pictures_of, chats)) and not chat.sees:
            raise UserError(f"tasks: they show pictures, and {type(processor).__name__} takes none; pass tasks of text alone")
        return chat.prompts(chats)

    return prepare


def messages_of(task_messages: list[dict[str, Any]]) -> Messages:
    """A task's messages in our form: content is a list of parts, and pictures are RGB images."""
    return [{"role": m["role"], "content": [_part(part) for part in _parts(m["content"])]} for m in task_messages]


def _parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] == "image":
        value = next(part[key] for key in ("image", "url") if part.get(key) is not None)
        return {"type": "image", "image": value.convert("RGB") if hasattr(value, "convert") else value}
    raise UserError(f"tasks: one shows a part of type {part['type']!r}; text and images are supported")


def batches(kinds: Sequence[Any], size: int) -> list[list[int]]:
    """Group the indices of `kinds` into batches of at most `size` indices of one kind, in order."""
    groups: dict[Any, list[int]] = {}
    for i, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(i)
    return [group[j : j + size] for group in groups.values() for j in range(0, len(group), size)]


def cut(text: str, stops: str | Sequence[str] | None) -> str:
    """The text up to where the first of the stops begins."""
    found = [text.find(stop) for stop in ([stops] if isinstance(stops, str) else stops or []) if stop]
    return text[: min((at for at in found if at >= 0), default=len(text))]


class InMemory(lmms):
    """A model in memory that lmms-eval can ask. Tasks that generate are supported, tasks of log-likelihoods are not.

    Args:
        model: answers greedily.
        prepare: makes the model's keyword arguments from chats (`from_processor`).
        decode: tokens of an answer -> text.
        batch_size: questions answered at once. Questions share a batch if they have equally many pictures and the same limit of tokens.
    """

    is_simple = False  # so that tasks give chat messages

    def __init__(self, model: nn.Module, prepare: Prepare, decode: Callable[[Tensor], str], batch_size: int = 1) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: pass at least 1")
        self.model, self.prepare, self.decode, self.batch_size = model, prepare, decode, batch_size

    def generate_until(self, requests: list[Instance]) -> list[str]:
        answers = [""] * len(requests)
        kinds = []
        for request in requests:  # a batch has one length, and not every processor takes chats with and without pictures at once
            kinds.append((len(pictures_of(self._messages(request))), int(request.args[2].get("max_new_tokens") or NEW_TOKENS)))
        for rows in tqdm(batches(kinds, self.batch_size), "answering"):
            texts = self.answer([self._messages(requests[i]) for i in rows], kinds[rows[0]][1])
            for i, text in zip(rows, texts, strict=True):
                answers[i] = cut(text, requests[i].args[2].get("until"))
        return answers

    def _messages(self, request: Instance) -> Messages:
        _, messages, _, number, task, split = request.args
        return messages_of(messages(self.task_dict[task][split][number]))

    @torch.no_grad()
    def answer(self, chats: list[Messages], limit: int) -> list[str]:
        """The model's greedy answers to these chats, of up to `limit` tokens."""
        weight = next(p for p in self.model.parameters() if p.is_floating_point())
        batch = {k: v.to(weight.device, weight.dtype if v.is_floating_point() else None) for k, v in self.prepare(chats).items()}
        new = self.model.generate(**batch, max_new_tokens=limit, do_sample=False)[:, batch["input_ids"].shape[1] :]
        return [self.decode(row) for row in new]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise OtherTask("InMemory answers tasks of output_type generate_until; this task asks for log-likelihoods")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise OtherTask("InMemory answers tasks of output_type generate_until; this task has several rounds")


def run(model: nn.Module, processor: Any, tasks: Sequence[str], include: str | None = None, limit: int | None = None, batch_size: int = 1) -> dict[str, Any]:
    """Run lmms-eval's tasks: task -> metric -> value.

    Args:
        include: a folder of task files of your own. With it, lmms-eval's own tasks are not available.
        limit: questions of each task; by default all.
    """
    manager = TaskManager(include_path=include, include_defaults=include is None)
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise UserError(f"tasks={','.join(unknown)!r}: lmms-eval knows no such task{f' in {include}' if include else ''}; `lmms-eval --tasks list` shows all")
    tokenizer = getattr(processor, "tokenizer", processor)
    lm = InMemory(model, from_processor(processor), partial(tokenizer.decode, skip_special_tokens=True), batch_size)
    results = simple_evaluate(lm, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0)
    return dict(results["results"])
