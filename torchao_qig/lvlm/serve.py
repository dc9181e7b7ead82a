"""Serve a model: compile its decoder block by block, keep keys and values in one static cache, and yield text as it is generated.

    model = compiled(load_model("model-int3"), max_length=2048)  # `model.generate` now runs compiled, one prompt at a time
    warm_up(model, processor)  # seconds; nothing is compiled afterwards
    for piece in answer(model, processor, "dog.png", "What is it?"):
        print(piece, end="", flush=True)

One decoder block is compiled. All blocks of the same kind (shapes, bits, attention) share its code, so the time to compile does not grow
with depth. The block is compiled twice: for one token, and for a prompt of any length. A block reads only its own layer of the cache, and of
it only the tokens so far, rounded up to a multiple of 64. A large `max_length` therefore costs memory, not time. The vision tower, the
embedding and the head are not compiled, since a tower's shapes depend on the picture. Calls without the static cache run as before.
"""

from __future__ import annotations

import inspect
import os
import shutil
import time
from collections.abc import Callable, Iterator
from threading import Event, Lock, Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import StoppingCriteriaList, TextIteratorStreamer
from transformers.cache_utils import Cache, StaticCache, StaticLayer, StaticSlidingWindowLayer
from transformers.generation.streamers import BaseStreamer

from torchao_qig.errors import UserError
from torchao_qig.lvlm.chat import Chat
from torchao_qig.lvlm.pictures import opened
from torchao_qig.tensor.linear import DECODE_ROWS

MAX_LENGTH = 2048  # tokens; the default of `max_length` for models with so many positions
STEP = 64  # the number of keys that attention reads is a multiple of this
PROMPT_ROWS = DECODE_ROWS + 1  # shorter prompts are padded to this: the linears' form for 2 to 64 rows would take a minute to compile


def check_compiler(device: torch.device) -> None:
    """Raise if the device is a CPU and there is no C++ compiler, which torch.compile needs on a CPU."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise UserError("compiled=True: torch.compile needs a C++ compiler on a CPU, and neither g++ nor clang++ is there; install one, or use --no-compile")


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The decoder's repeated blocks: the list that is as long as the configuration says the text model is deep."""
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = [m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not lists:
        raise UserError(f"model: {type(model).__name__} has no list of {depth} decoder blocks to compile; serve it with --no-compile")
    return list(lists[0])


def _static_cache(model: nn.Module, length: int) -> Cache:
    """A static cache with room for `length` tokens in every layer.

    Every layer is a plain static layer, also where attention has a sliding window: the masks hold the window. A layer of transformers' own for
    sliding windows counts tokens, so code that uses it would be compiled anew.
    """
    known = StaticCache(config=model.config, max_cache_len=length).layers
    other = {type(layer).__name__ for layer in known if type(layer) not in (StaticLayer, StaticSlidingWindowLayer)}
    if other:
        raise UserError(f"model: its blocks keep more than keys and values ({', '.join(sorted(other))}); serve it with --no-compile")
    return Cache(layers=[StaticLayer(max_cache_len=length) for _ in known])


class _Part:
    """The part of the cache that compiled code sees: the first `tokens` tokens of one layer. It does not hold the layer's number, so that all
    blocks can share the code."""

    def __init__(self, layer: StaticLayer, tokens: int) -> None:
        self.layer, self.tokens = layer, tokens

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.layer.update(keys, values)
        return keys[:, :, : self.tokens], values[:, :, : self.tokens]


def _run(block: nn.Module, layer: StaticLayer, hidden: Tensor, mask: Tensor | None, others: dict[str, Any]) -> Any:
    """Run one block; this function is compiled. A prompt attends to itself, a single token to the tokens that its mask covers."""
    rows = hidden.shape[1]
    part = _Part(layer, rows if rows > 1 or mask is None else mask.shape[-1])
    return type(block).forward(block, hidden, attention_mask=mask, past_key_values=part, **others)


def _stretched(x: Tensor, rows: int, to: int) -> Tensor:
    """Pad a tensor of a prompt from `rows` rows to `to` by repeating its last row, and mark that dimension as dynamic.

    A tensor that has no dimension of `rows` rows is returned as it is.
    """
    dim = next((d for d in (-2, -1) if x.dim() > 1 and x.shape[d] == rows), None)
    if dim is None:
        return x
    if to > rows:
        x = x.index_select(dim, torch.arange(to, device=x.device).clamp(max=rows - 1))
    torch._dynamo.maybe_mark_dynamic(x, x.dim() + dim)
    return x


class _Block:
    """Replaces a block's forward: runs compiled code if the static cache is passed, else the block's own forward."""

    def __init__(self, block: nn.Module, cache: Cache, layer: StaticLayer, run: Callable[..., Any], max_length: int) -> None:
        self.block, self.cache, self.layer, self.run, self.max_length = block, cache, layer, run, max_length
        self.plain: Callable[..., Any] = block.forward
        self.used = 0  # tokens in the cache; the layer's own count is a tensor, and reading it would mean waiting for the accelerator

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not self.cache:
            return self.plain(hidden, *args, **kwargs)
        rows, before = hidden.shape[1], self.used
        self.used += rows
        if self.used > self.max_length:
            raise UserError(f"max_length={self.max_length}: prompt and answer do not fit; ask for fewer new tokens, or compile with more")
        mask = kwargs.get("attention_mask")
        unusual = bool(args) or (mask is None if rows == 1 else before > 0)
        if unusual or not self.layer.is_initialized:  # the first prompt runs uncompiled, and shows the shapes of keys and values
            return self.plain(hidden, *args, **kwargs)
        others = {k: v for k, v in kwargs.items() if k not in ("past_key_values", "attention_mask")}
        return self._token(hidden, mask, others) if rows == 1 else self._prompt(hidden, mask, others)

    def _token(self, hidden: Tensor, mask: Tensor, others: dict[str, Any]) -> Any:
        mask = mask[..., : -(-self.used // STEP) * STEP]
        torch._dynamo.maybe_mark_dynamic(mask, mask.dim() - 1)
        return self.run(self.block, self.layer, hidden, mask, others)

    def _prompt(self, hidden: Tensor, mask: Tensor | None, others: dict[str, Any]) -> Any:
        rows = hidden.shape[1]
        to = max(rows, PROMPT_ROWS)
        if mask is not None:
            mask = _stretched(mask[..., :to].contiguous(), rows, to)  # no real row sees the padding, which comes after it
            torch._dynamo.maybe_mark_dynamic(mask, mask.dim() - 1)
        hidden, others = pytree.tree_map_only(Tensor, lambda x: _stretched(x, rows, to), (hidden, others))
        out = self.run(self.block, self.layer, hidden, mask, others)
        self.layer.cumulative_length.sub_(to - rows)  # so that the next tokens overwrite the padding
        return out[:, :rows] if isinstance(out, Tensor) else (out[0][:, :rows], *out[1:])


class StaticGeneration:
    """Replaces a model's `generate`: does the same with one static cache."""

    def __init__(self, model: nn.Module, max_length: int) -> None:
        self.max_length, self.plain, self.lock = max_length, model.generate, Lock()
        blocks = blocks_of(model)
        self.cache = _static_cache(model, max(-(-max_length // STEP) * STEP, PROMPT_ROWS) + STEP)
        # Every kind of block gets code of its own, and with mixed bits there may be many kinds. Only newer versions of torch have these options.
        wanted = {"isolate_recompiles": True, "recompile_limit": 4 * len(blocks)}
        run = torch.compile(_run, **{k: v for k, v in wanted.items() if k in inspect.signature(torch.compile).parameters})
        self.blocks = [_Block(block, self.cache, layer, run, max_length) for block, layer in zip(blocks, self.cache.layers, strict=True)]
        for block in self.blocks:
            block.block.forward = block

    def __call__(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        ids = kwargs.pop("input_ids", inputs)
        if ids is None or kwargs.get("past_key_values") is not None:
            return self.plain(ids, **kwargs)
        beams = max(kwargs.get(name) or 1 for name in ("num_beams", "num_return_sequences"))
        if len(ids) * beams > 1:
            raise UserError(f"input_ids: {len(ids) * beams} sequences; a compiled model answers one at a time, load it uncompiled for batches and beams")
        prompt, new = ids.shape[1], kwargs.get("max_new_tokens") or 1
        if prompt + new > self.max_length:
            raise UserError(
                f"max_length={self.max_length}: the prompt has {prompt} tokens and max_new_tokens={new}; use a smaller picture, a shorter question, "
                f"fewer new tokens, or compile with max_length={prompt + new}"
            )
        with self.lock:
            self.cache.reset()
            for block in self.blocks:
                block.used = 0
            return self.plain(ids, past_key_values=self.cache, **{"disable_compile": True, **kwargs})


def compiled(model: nn.Module, max_length: int | None = None) -> nn.Module:
    """Replace the model's `generate` by a compiled one, for one prompt at a time. Returns the same model.

    `max_length`: largest number of tokens of prompt and answer together.
    """
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    limit = max_length or min(MAX_LENGTH, positions or MAX_LENGTH)
    if limit < 2 or (positions and limit > positions):
        raise UserError(f"max_length={limit}: the model has {positions} positions; pass 2 to as many")
    if isinstance(model.generate, StaticGeneration):
        raise UserError(f"model: already compiled, with max_length={model.generate.max_length}; load it again for another")
    check_compiler(next(model.parameters()).device)
    model.generate = StaticGeneration(model, limit)
    return model


class Clock(BaseStreamer):
    """A streamer that notes when generation began and when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def tokens_per_second(self) -> float:
        """The speed of the tokens after the first."""
        first, *later = self.times[1:] or [0.0]
        return len(later) / (later[-1] - first) if later else 0.0


def inputs_of(model: nn.Module, processor: Any, image: Any, question: str) -> dict[str, Tensor]:
    """The arguments of `generate` for one question. `image`: a path, bytes, a PIL image or None."""
    chat = Chat(processor)
    seen = [] if image is None else [{"type": "image", "image": opened(image)}]
    messages = [{"role": "user", "content": [*seen, {"type": "text", "text": question}]}]
    chat.find_place(messages)
    columns = chat.columns([messages], add_generation_prompt=True)
    return {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in columns.items()}


def answer(model: nn.Module, processor: Any, image: Any, question: str, max_new_tokens: int = 256, clock: Clock | None = None, **options: Any) -> Iterator[str]:
    """Yield the answer piece by piece as it is generated. Closing the iterator stops generation.

    Decoding is greedy unless `options`, passed on to `generate`, say otherwise.
    """
    inputs = inputs_of(model, processor, image, question)
    streamer = TextIteratorStreamer(getattr(processor, "tokenizer", processor), skip_prompt=True, skip_special_tokens=True)
    put, failed, stop = streamer.put, [], Event()

    def timed(value: Tensor) -> None:
        if clock is not None:
            clock.put(value)
        put(value)

    def work() -> None:
        halt = StoppingCriteriaList([lambda ids, scores, **_: torch.full((len(ids),), stop.is_set(), device=ids.device)])
        asked = {"do_sample": False, "max_new_tokens": max_new_tokens, **options}
        try:
            model.generate(**inputs, **asked, streamer=streamer, stopping_criteria=halt)
        except BaseException as error:
            failed.append(error)
            streamer.text_queue.put(streamer.stop_signal)

    streamer.put = timed
    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stop.set()
        thread.join()
    if failed:
        raise failed[0]


def warm_up(model: nn.Module, processor: Any, image: Any = None) -> float:
    """Compile everything that questions will need. Returns the seconds that this took.

    Asks a question without a picture and, if the processor takes pictures, one with a picture (`image`, or a grey one).
    """
    start = time.perf_counter()
    pictures: list[Any] = [None]
    if Chat(processor).sees:
        from PIL import Image

        pictures.append(image if image is not None else Image.new("RGB", (224, 224), "grey"))
    for picture in pictures * 2:  # twice, since the first prompt runs uncompiled
        for _ in answer(model, processor, picture, "What is this?", max_new_tokens=3, min_new_tokens=3):
            pass
    return time.perf_counter() - start
