"""How a processor turns chats into tokens, and which of the tokens are answers. Both are found by trying the processor and its chat template."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from torchao_qig.errors import UserError
from torchao_qig.lvlm.messages import Messages, pictures_of

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # in templates that mark answers themselves
PROBE = "Probe"  # a message to try a template with
SIDE = "right"  # side of the padding: on the right, a causal model's real tokens do not see it


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The length of the common beginning of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Chat:
    """A processor or a tokenizer, and what was observed about it.

    Attributes:
        sees: whether it takes pictures.
        own: whether it has a chat template itself; a processor may leave that to its tokenizer.
        template: the chat template that is used; empty or None if there is none.
        plain: whether chats are turned into plain text before they are given to it.
        parts: whether its template takes content as a list of parts.
        marks: whether its template marks answers.
        place: the token that stands for a picture in plain text.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.sees = hasattr(processor, "image_processor")
        own, words = getattr(processor, "chat_template", None), getattr(self.tokenizer, "chat_template", None)
        self.own, self.template = bool(own), own or words
        self.plain = not own and (self.sees or not words)  # pictures' places are written into the text
        self.parts = bool(self.template) and self._takes_parts()
        self.marks = isinstance(self.template, str) and not self.plain and bool(GENERATION.search(self.template))
        self.place = ""

    def _takes_parts(self) -> bool:
        """Whether the template takes content as parts, [{"type": "text", "text": ...}], rather than as text. Raises if it takes neither."""
        error: object = "it writes no text"
        for content in ([{"type": "text", "text": PROBE}], PROBE):
            try:
                text = self._render([{"role": "user", "content": content}])
            except Exception as failure:  # templates raise any kind of exception on content that they do not expect
                error = failure
                continue
            if PROBE.lower() in text.lower() and "'type'" not in text and '"type"' not in text:
                return content != PROBE
        raise UserError(
            f"{type(self.processor).__name__}: its chat template takes a message neither as parts nor as text: {error}; set processor.chat_template"
        )

    def _render(self, messages: Messages, prompt: bool = False) -> str:
        other = {} if self.own else {"chat_template": self.template}
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **other)

    def _shaped(self, messages: Messages) -> Messages:
        """The messages with their content in the form that this template takes: parts, or one text."""
        if self.parts and not self.plain:
            return messages
        return [{"role": m["role"], "content": self._flat(m["content"])} for m in messages]

    def _flat(self, parts: list[dict[str, Any]]) -> str:
        return "\n".join(part.get("text", self.place) for part in parts)

    def text(self, messages: Messages, prompt: bool = False) -> str:
        """The chat as text. With `prompt` it ends where the model should answer."""
        if self.template:
            return self._render(self._shaped(messages), prompt) if messages else ""
        return "\n".join(self._flat(m["content"]) for m in messages) + "\n" * (prompt and bool(messages))

    def words(self, text: str) -> list[int]:
        """The tokens of the text, with one token for each picture."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def spells(self, messages: Messages, token: int) -> bool:
        """Whether a text of the messages contains this token."""
        return any(token in self.words(part["text"]) for m in messages for part in m["content"] if part["type"] == "text")

    def columns(self, chats: list[Messages], **options: Any) -> dict[str, Any]:
        """The model's inputs for these chats, padded to the same length."""
        images = [pictures_of(chat) for chat in chats]
        if any(images) and not self.sees:
            raise UserError(f"{type(self.processor).__name__} has no image processor; pass the model's processor, or samples without images")
        with _padding(self.tokenizer):
            if self.plain:
                return dict(self._process([self.text(chat) for chat in chats], images))
            shaped = [self._shaped(chat) for chat in chats]
            common = {"tokenize": True, "return_dict": True, "return_tensors": "pt", **options}
            taken = inspect.signature(self.processor.apply_chat_template).parameters
            if "processor_kwargs" in taken:
                return dict(self.processor.apply_chat_template(shaped, processor_kwargs={"padding": True, "padding_side": SIDE}, **common))
            if "tokenizer_kwargs" in taken:
                return dict(self.processor.apply_chat_template(shaped, padding=True, tokenizer_kwargs={"padding_side": SIDE}, **common))
            return dict(self.processor.apply_chat_template(shaped, padding=True, padding_side=SIDE, **common))

    def prompts(self, chats: list[Messages]) -> dict[str, Any]:
        """The model's inputs to answer these chats: each chat up to where its answer begins, padded on the left."""
        for messages in chats:
            self.find_place(messages)
        with _padding(self.tokenizer):
            return dict(self._process([self.text(chat, prompt=True) for chat in chats], [pictures_of(chat) for chat in chats], "left"))

    def _process(self, texts: list[str], images: list[list[Any]], side: str = SIDE) -> Any:
        begins = self.tokenizer.bos_token
        options = {"add_special_tokens": False} if begins and texts[0].startswith(begins) else {}
        pictures = {"images": images} if any(images) else {}
        return self.processor(text=texts, **pictures, return_tensors="pt", padding=True, padding_side=side, **options)

    def find_place(self, messages: Messages) -> None:
        """Set `place`, for plain text, to the first of the processor's picture tokens that the processor accepts."""
        if not self.plain or self.place or not pictures_of(messages):
            return
        names = [name for name in ("boi_token", "image_token") if isinstance(getattr(self.processor, name, None), str)]
        errors = []
        for name in names:
            self.place = getattr(self.processor, name)
            try:
                found = self.columns([messages])["input_ids"][0].tolist()
                if len(found) >= len(self.words(self.text(messages))):
                    return
            except Exception as error:  # processors refuse with any kind of exception
                errors.append(f"{name}={self.place!r}: {error}")
        self.place = ""
        why = "; ".join(errors) or "it names no image token"
        raise UserError(f"{type(self.processor).__name__} has no chat template, and takes no picture in plain text: {why}. Set processor.chat_template")

    def grown(self, messages: Messages, ids: list[int]) -> Counter[int]:
        """The tokens that pictures added to a chat, with their counts: those of `ids`, the whole chat, less those of its text."""
        return Counter(ids) - Counter(self.words(self.text(messages)))

    def picture_token(self, grown: Counter[int]) -> int | None:
        """The token that pictures consist of: the most frequent one in `grown`. Of equally frequent tokens, a special one is preferred."""
        special = {token for token, entry in self._added().items() if entry.special} | set(self.tokenizer.all_special_ids)
        return max(grown, key=lambda token: (grown[token], token in special, -token), default=None)

    def answers(self, messages: Messages, ids: list[int]) -> list[bool]:
        """For each of the chat's tokens `ids`, whether it belongs to an answer. The token that ends an answer belongs to it."""
        if self.marks:
            marked = self.columns([messages], return_assistant_tokens_mask=True)
            mask = [bool(m) for m in torch.as_tensor(marked["assistant_masks"]).flatten().tolist()]
            if any(mask) and torch.as_tensor(marked["input_ids"])[0].tolist() == ids:
                return mask
        whole = self.text(messages)
        words = self.words(whole)
        mask, last = [False] * len(ids), 0
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start, last = self._span(messages, i, whole, last)
                lo, hi = (_common(self.words(whole[:at]), words) for at in (start, last))
                first = self._position(messages, i, (start, last), ids, len(words) - lo)
                hi = self._end(words, lo, hi)
                if lo >= hi or ids[first : first + hi - lo] != words[lo:hi]:
                    raise UserError(f"the template hides where the answer of turn {i + 1} is; pass answers=False to do without labels")
                mask[first : first + hi - lo] = [True] * (hi - lo)
        return mask

    def _span(self, messages: Messages, i: int, whole: str, since: int) -> tuple[int, int]:
        """Start and end of turn i's answer in the chat's text `whole`: from the end of the prompt for it to the end of the turn."""
        said = [part["text"].strip() for part in messages[i]["content"] if part["type"] == "text"]
        start = _common(self.text(messages[:i], prompt=True), whole)
        end = _common(self.text(messages[: i + 1]), whole)
        if start < max(since, _common(self.text(messages[:i]), whole)) or not all(text in whole[start:end] for text in said):
            start, at = whole.find(said[0], since), whole.find(said[-1], since)  # the template writes past turns differently: look for the words themselves
            end = at + len(said[-1])
            if start < 0 or at < start:
                raise UserError(f"the template does not write the answer of turn {i + 1} as it is; pass answers=False to do without labels")
        stop = self.tokenizer.eos_token
        if stop and (at := whole.rfind(stop, start + len(said[-1]), end)) >= 0:
            end = at + len(stop)  # a model never generates what follows
        return start, end

    def _end(self, words: list[int], lo: int, hi: int) -> int:
        """The end of the answer words[lo:hi] without white space after its end token: the template writes it, the model never generates it."""
        end = hi
        while end > lo and not self.tokenizer.decode([words[end - 1]]).strip():
            end -= 1
        return end if lo < end < hi and words[end - 1] in {*self._added(), *self.tokenizer.all_special_ids} else hi

    def _added(self) -> dict[int, Any]:
        return getattr(self.tokenizer, "added_tokens_decoder", {})

    def _position(self, messages: Messages, i: int, span: tuple[int, int], ids: list[int], rest: int) -> int:
        """The position in `ids` at which turn i's answer begins. `rest`: the number of text tokens from there to the end.

        Pictures from this turn on take tokens, too, and how many may depend on all pictures together. If there are any, the chat is processed
        again without the answer: the answer begins where the tokens differ.
        """
        if not pictures_of(messages[i:]):
            return len(ids) - rest
        whole = self.text(messages)
        other = whole[: span[0]] + (self.tokenizer.eos_token or "") + whole[span[1] :]
        return _common(ids, self._process([other], [pictures_of(messages)])["input_ids"][0].tolist())


@contextmanager
def _padding(tokenizer: Any) -> Iterator[None]:
    """While this runs, a tokenizer without a padding token pads with its end token. The attention mask tells padding from tokens."""
    if tokenizer.pad_token is not None or tokenizer.eos_token is None:
        yield
        return
    tokenizer.pad_token = tokenizer.eos_token
    try:
        yield
    finally:
        tokenizer.pad_token = None
