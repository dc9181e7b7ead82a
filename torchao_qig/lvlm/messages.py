"""Turn one row of a data set into chat messages, whose content is a list of parts: texts and pictures in their order.

A row's fields tell what kind it is: messages, conversations, question with answer, caption, or text. Beside each of them there may be pictures
(image, images, file_name or file_names).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchao_qig.lvlm.pictures import BadRow

Messages = list[dict[str, Any]]
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
PLACE = "<image>"  # where a picture belongs in a text
FIELDS = ("messages", "conversations", "question", "caption", "text")
PICTURES = ("image", "images", "file_name", "file_names")
EXAMPLE = '{"image": "dog.jpg", "caption": "A dog on grass."}'


def as_messages(row: Any, prompt: str, find: Callable[[Any], Any]) -> Messages:
    """The row's messages; raises `BadRow` if it is no sample.

    Args:
        row: fields with values.
        prompt: the question that a caption answers.
        find: gives the picture that a value in the row names.
    """
    if not isinstance(row, Mapping):
        raise BadRow("wrong type", f"the row is {type(row).__name__}, not fields with values")
    images = _images(row)
    kind = next((f for f in FIELDS if row.get(f) is not None), None)
    if kind is None:
        raise BadRow("no known field", f"has {', '.join(map(str, row)) or 'none'}; a sample has one of {', '.join(FIELDS)}")
    if kind in ("messages", "conversations"):
        turns = _turns(row[kind], kind)
    elif kind == "question":
        turns = [("user", _split(_text(row, kind))), ("assistant", [_part(_answer(row))])]
    elif images:
        turns = [("user", [_part(prompt)]), ("assistant", [_part(_text(row, kind))])]
    elif kind == "caption":
        raise BadRow("no image", "a caption without an image; pure text has the field text")
    else:
        turns = [("user", [_part(_text(row, kind))])]
    return _checked(_placed(turns, images, find))


def _images(row: Mapping[str, Any]) -> list[Any]:
    found = [row[name] for name in PICTURES if row.get(name) is not None][:1]
    return found if not found or not isinstance(found[0], (list, tuple)) else list(found[0])


def _part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{where} is {type(value).__name__}, not text")
    return value.strip()


def _text(row: Mapping[str, Any], field: str) -> str:
    """A field's text. If the field is a list, such as five captions of a picture, the first text in it that is not blank."""
    value = row[field]
    if isinstance(value, (list, tuple)):
        value = next((v for v in value if not isinstance(v, str) or v.strip()), "")
    return _string(value, field)


def _answer(row: Mapping[str, Any]) -> str:
    field = next((f for f in ("answer", "answers") if row.get(f) not in (None, [], "")), None)
    if field is None:
        raise BadRow("no answer", "the question has no answer")
    return _text(row, field)


def _split(text: str) -> list[dict[str, Any]]:
    """Split a text at each <image> into parts. White space beside a picture is dropped, since the chat template decides about it."""
    pieces = text.split(PLACE)
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(pieces):
        parts += [{"type": "image"}] * (i > 0) + [_part(piece.strip())] * bool(piece.strip())
    return parts


def _turns(turns: Any, field: str) -> list[tuple[str, list[dict[str, Any]]]]:
    if not isinstance(turns, (list, tuple)) or not turns:
        raise BadRow("wrong type", f"{field} is {type(turns).__name__ if turns or not isinstance(turns, list) else 'empty'}, not a list of turns")
    found = []
    for number, turn in enumerate(turns, 1):
        where = f"{field}: turn {number}"
        if not isinstance(turn, Mapping):
            raise BadRow("wrong type", f"{where} is {type(turn).__name__}, not fields with values")
        role = turn.get("role") or turn.get("from")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRow("unknown role", f"{where}: {role!r}; known are {', '.join(ROLES)}")
        content = turn.get("content") if turn.get("content") is not None else turn.get("value")
        found.append((ROLES[role], _parts(content, where)))
    return found


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    """A turn's content, a text or a list of parts, as parts in our form. A picture is still as the row names it, or absent if it is listed
    beside the messages."""
    if not isinstance(content, (list, tuple)):
        return _split(_string(content, where))
    parts: list[dict[str, Any]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str) or kind == "text":
            parts += _split(_string(part if isinstance(part, str) else part.get("text"), where))
        elif kind in ("image", "image_url"):
            value = next((part[k] for k in ("image", "image_url", "path", "url", "base64") if part.get(k) is not None), None)
            if isinstance(value, Mapping) and "url" in value:
                value = value["url"]
            parts.append({"type": "image"} if value is None else {"type": "image", "image": value})
        else:
            raise BadRow("unknown part", f"{where}: {kind or type(part).__name__}; known are text and image")
    return parts


def _placed(turns: list[tuple[str, list[dict[str, Any]]]], images: list[Any], find: Callable[[Any], Any]) -> Messages:
    """The messages with their pictures. Listed pictures fill the places in order; if there are no places, they go before the first question."""
    pictures = [part for _, parts in turns for part in parts if part["type"] == "image"]
    places = sum("image" not in part for part in pictures)
    if images and not pictures:
        first = next((parts for role, parts in turns if role == "user"), turns[0][1])
        first[:0] = [{"type": "image"} for _ in images]
    elif places != len(images):
        inline = f", {len(pictures) - places} inside the messages" if len(pictures) > places else ""
        raise BadRow("images do not match", f"{places} places for {len(images)} listed images{inline}")
    rest = iter(images)

    def filled(part: dict[str, Any]) -> dict[str, Any]:
        return part if part["type"] == "text" else {"type": "image", "image": find(part["image"] if "image" in part else next(rest))}

    return [{"role": role, "content": [filled(part) for part in parts]} for role, parts in turns]


def _checked(messages: Messages) -> Messages:
    """The messages themselves; raises `BadRow` if a turn is empty, or if there are only pictures or only system messages."""
    for number, message in enumerate(messages, 1):
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        if not message["content"] or "" in texts or (message["role"] == "assistant" and not texts):
            raise BadRow("no text", f"the {message['role']}'s turn {number} is empty")
    if not any(part["type"] == "text" for message in messages for part in message["content"]):
        raise BadRow("no text", "only images")
    if all(message["role"] == "system" for message in messages):
        raise BadRow("no text", "only a system message")
    return messages


def pictures_of(messages: Messages) -> list[Any]:
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
