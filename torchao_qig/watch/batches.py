"""Turn what the user's loader yields into calls of the model, and note what each token is: padding, image or answer."""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from torchao_qig.errors import UserError, UserTypeError
from torchao_qig.watch.observer import Call

VISION, ANSWER = "vision_mask", "answer_mask"
OURS = {VISION: VISION, "image_mask": VISION, ANSWER: ANSWER, "caption_mask": ANSWER}  # column of a batch -> mask that it gives
IGNORED = -100  # the label of a token that is not part of an answer


@dataclass(frozen=True)
class Tokens:
    """What the tokens of a batch are: boolean masks, (B, T) each. A mask is None where the batch does not tell."""

    counted: Tensor | None = None  # False on padding
    vision: Tensor | None = None  # True on image tokens
    answer: Tensor | None = None  # True on tokens of an answer

    def cut(self, rows: list[int]) -> "Tokens":
        """The masks of these samples only."""
        return Tokens(*(None if m is None else m[rows] for m in (self.counted, self.vision, self.answer)))


@dataclass(frozen=True)
class Batch:
    """One batch of the loader, as the arguments of one call of the model. `number` is its place in the loader."""

    number: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    masks: Tokens
    labels: Tensor | None = None

    @property
    def samples(self) -> int:
        """The number of samples, from the masks, or else from the first dimension of the first tensor."""
        if self.masks.counted is not None:
            return self.masks.counted.shape[0]
        return next((v.shape[0] for v in [*self.args, *self.kwargs.values()] if isinstance(v, Tensor) and v.dim()), 1)

    def tokens(self, shape: torch.Size | None) -> Tokens:
        """The masks if they fit hidden states of this shape, otherwise no masks."""
        if shape is None or self.masks.counted is None or tuple(self.masks.counted.shape) == tuple(shape[:-1]):
            return self.masks
        return Tokens()


def _parameters(model: nn.Module) -> tuple[set[str], bool]:
    """The names of the arguments of the model's forward, and whether it accepts any others (**kwargs)."""
    found = inspect.signature(model.forward).parameters.values()
    return {p.name for p in found if p.kind is not p.VAR_KEYWORD}, any(p.kind is p.VAR_KEYWORD for p in found)


def _tensor(value: Any) -> Any:
    """A column of a dataset as a tensor if it holds numbers, otherwise unchanged."""
    if isinstance(value, Tensor):
        return value
    if type(value).__module__.split(".")[0] == "numpy" or (isinstance(value, list) and value and not isinstance(value[0], str)):
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError):
            return value
    return value


def _is_dataset(loader: object) -> bool:
    """Whether the loader is a `datasets.Dataset`, which yields single samples as dicts instead of batches."""
    return type(loader).__module__.split(".")[0] == "datasets"


def _vision(model: nn.Module, columns: Mapping[str, Any]) -> Tensor | None:
    """Which tokens are image tokens: by the batch's token types, or else by the special ids in the model's config; None if neither tells."""
    ids = columns.get("input_ids")
    for name in ("mm_token_type_ids", "token_type_ids"):
        types = columns.get(name)
        if isinstance(types, Tensor) and isinstance(ids, Tensor) and types.shape == ids.shape and name.startswith("mm"):
            return types != 0
    config = getattr(model, "config", None)
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    special = [t for name in names if isinstance(t := getattr(config, name, None), int)]
    return torch.isin(ids, torch.tensor(special, device=ids.device)) if special and isinstance(ids, Tensor) else None


def _masks(model: nn.Module, columns: Mapping[str, Any], given: Mapping[str, Tensor]) -> Tokens:
    """The masks of a batch. `given` are masks that the batch itself contains; they take precedence over what other columns say."""
    attention = columns.get("attention_mask")
    counted = attention != 0 if isinstance(attention, Tensor) and attention.dim() == 2 else None
    labels = columns.get("labels")
    answer = given[ANSWER] != 0 if ANSWER in given else labels != IGNORED if isinstance(labels, Tensor) and labels.dim() == 2 else None
    vision = given[VISION] != 0 if VISION in given else _vision(model, columns)
    like = next((m for m in (counted, vision, answer, columns.get("input_ids")) if isinstance(m, Tensor)), None)
    if counted is None and like is not None:
        counted = torch.ones_like(like, dtype=torch.bool)
    return Tokens(*(None if m is None else m.bool().cpu() for m in (counted, vision, answer)))


def as_batch(model: nn.Module, item: Any, single: bool, number: int) -> Batch:
    """Turn one item of the loader into a call of the model. `single`: the item is one sample, without a batch dimension."""
    reference = next((p for p in model.parameters() if p.is_floating_point() and p.device.type != "meta"), torch.empty(0))

    def ready(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.unsqueeze(0) if single else value
        value = value.clone() if value.is_inference() else value.detach()
        return value.to(reference.device, reference.dtype if value.is_floating_point() else None)

    where = f"calib: batch {number}"
    if isinstance(item, Call):  # recorded by `Recorder`: the model has accepted these arguments before
        columns = dict(inspect.signature(model.forward).bind_partial(*item.args).arguments) | item.kwargs
        masks = _masks(model, columns, {})
        return Batch(number, tree_map(ready, item.args), {k: tree_map(ready, v) for k, v in item.kwargs.items() if k != "labels"}, masks, columns.get("labels"))
    if isinstance(item, Mapping):
        columns = {str(k): ready(_tensor(v) if single else v) for k, v in item.items()}
        given = {OURS[k]: v for k, v in columns.items() if k in OURS}
        names, others = _parameters(model)
        columns = {k: v for k, v in columns.items() if k in names or not (k in OURS or single)}
        unknown = [k for k, v in columns.items() if k not in names and (not others or (isinstance(v, Tensor) and v.is_floating_point()))]
        if unknown:
            raise UserError(
                f"{where}: {type(model).__name__}.forward takes no {', '.join(unknown)}; if this is a part of the model that the batches"
                " are for, pass the whole one as running=Running(model=...), otherwise drop these columns"
            )
        masks = _masks(model, columns, given)
        labels = columns.pop("labels", None)
        if not columns:
            raise UserError(f"{where}: has none of the inputs of {type(model).__name__}.forward ({', '.join(sorted(names))}); got {', '.join(item)}")
        return Batch(number, (), columns, masks, labels)
    args = tuple(ready(v) for v in (item if isinstance(item, (tuple, list)) else (item,)))
    if not any(isinstance(a, Tensor) for a in args):
        raise UserTypeError(f"{where}: got {type(item).__name__} without tensors; batches are dicts (passed as keywords), tuples or tensors")
    ids = args[0] if not args[0].is_floating_point() and args[0].dim() == 2 else None
    return Batch(number, args, {}, _masks(model, {} if ids is None else {"input_ids": ids}, {}))


def read(model: nn.Module, loader: Iterable[Any]) -> Iterator[Batch]:
    """Read the loader's batches, each once. Raise for a loader that is no iterable of batches, or that yields none."""
    if isinstance(loader, (str, bytes, Mapping, Tensor)) or not isinstance(loader, Iterable):
        raise UserTypeError(f"calib={type(loader).__name__}: pass an iterable of batches, such as a DataLoader or a list of dicts; one batch goes into a list")
    single = _is_dataset(loader)
    empty = True
    for number, item in enumerate(loader):
        empty = False
        yield as_batch(model, item, single, number)
    if empty:
        raise UserError("calib: the loader yielded no batch; pass at least one (a generator can be read only once)")


@contextmanager
def naming(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Turn an error of the model's forward into one that names the batch. Out-of-memory errors are passed on unchanged."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError, ValueError, IndexError, KeyError, AttributeError) as error:
        if "allocate memory" in str(error):  # the message of the CPU's allocator when memory runs out
            raise
        raise UserError(f"calib: {type(model).__name__} cannot run batch {batch.number}: {error}. The model is unchanged.") from error
