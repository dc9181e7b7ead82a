"""The small LVLM: an unmodified LlavaOnevision with a SigLIP tower and a Qwen2 decoder, its tokenizer and its inputs.

Everything that transformers needs is in one folder, `weights/`. A sample is laid out as

    <|user|> <image> x 105  question <|assistant|> answer <|end|>

105 = 49 patches of the whole picture, 49 of its only tile, and one newline for each of the tile's seven rows. Several questions
about one picture can share the picture (`pack`). Each question sees only the picture and itself, at the positions that it would have
in a sample of its own, so the logits are those of separate samples at a third of the cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from recipes.small_lvlm.data import Sample, corpus
from recipes.small_lvlm.worlds.canvas import PATCH, SIDE

WEIGHTS = Path(__file__).parent / "weights"
ROW = SIDE // PATCH
IMAGE_TOKENS = 2 * ROW * ROW + ROW
SPECIAL = ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<image>", "<video>"]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<|user|>{% else %}<|assistant|>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] != 'user' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def new_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer for the training split. Letters and digits that are to be read stay single tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    letters = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter.isascii()] + ["Ġ"]
    trainer = trainers.BpeTrainer(vocab_size=2048, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False)
    bpe.train_from_iterator(corpus(2000), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>", bos_token="<|user|>", chat_template=TEMPLATE,
        additional_special_tokens=[AddedToken(token, special=True) for token in ("<|assistant|>", "<image>", "<video>")],
    )  # fmt: skip


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlavaOnevisionForConditionalGeneration:
    torch.manual_seed(seed)
    config = LlavaOnevisionConfig(
        vision_config=dict(
            model_type="siglip_vision_model", image_size=SIDE, patch_size=PATCH, hidden_size=256, intermediate_size=768, num_hidden_layers=4,
            num_attention_heads=4, vision_use_head=False,
        ),
        text_config=dict(
            model_type="qwen2", vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.05, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[SIDE, SIDE]], vision_feature_select_strategy="full", vision_feature_layer=-1, initializer_range=0.05,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlavaOnevisionForConditionalGeneration(config)


def pixel_values(pictures: Tensor) -> Tensor:
    """(n, side, side, 3) bytes as the image processor would hand them over: (n, 2, 3, side, side), the picture and its tile alike."""
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    x = (pictures.permute(0, 3, 1, 2).float() / 255 - mean) / std
    return x[:, None].expand(-1, 2, -1, -1, -1)


def pictures(samples: list[Sample]) -> Tensor:
    return torch.from_numpy(np.stack([one.pixels for one in samples]))


@dataclass
class Packed:
    """A batch of pictures with several questions each."""

    ids: Tensor  # (pictures, length)
    segment: Tensor  # 0: the picture; k: question k; -1: padding
    positions: Tensor
    answer: Tensor  # bool: this position's *next* token is part of an answer
    target: Tensor  # that next token
    pictures: Tensor  # (pictures, side, side, 3), bytes

    def mask(self) -> Tensor:
        """The attention mask (pictures, 1, length, length): which position may attend to which."""
        s = self.segment
        length = s.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return (causal & ((s[:, None, :] == 0) | (s[:, None, :] == s[:, :, None])))[:, None]

    def rows(self, first: int, last: int) -> Packed:
        """Some of the pictures."""
        return Packed(*(getattr(self, field.name)[first:last] for field in fields(self)))

    def without_base(self) -> Packed:
        """The batch without the tokens of the whole picture, which show the same as those of its tile. Training starts cheaper with it."""
        keep = torch.tensor([*range(1), *range(1 + ROW * ROW, self.ids.shape[1])])
        return Packed(*(getattr(self, name)[:, keep] for name in ("ids", "segment", "positions", "answer", "target")), self.pictures)

    def keywords(self) -> dict[str, Tensor]:
        """The keyword arguments of the model's forward."""
        return {
            "input_ids": self.ids, "attention_mask": self.mask(), "position_ids": self.positions, "pixel_values": pixel_values(self.pictures),
            "image_sizes": torch.full((len(self.ids), 2), SIDE),
        }  # fmt: skip


def pack(samples: list[Sample], tokenizer: PreTrainedTokenizerFast, length: int | None = None) -> Packed:
    """Pack samples, with their questions side by side. Questions that do not fit into `length` are left out."""
    user, assistant, end, image = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>", "<|end|>", "<image>"])
    rows = []
    for one in samples:
        ids, segment, positions = [user] + [image] * IMAGE_TOKENS, [0] * (1 + IMAGE_TOKENS), list(range(1 + IMAGE_TOKENS))
        answer = [False] * len(ids)
        encoded = tokenizer([q.text for q in one.questions] + [q.answer for q in one.questions], add_special_tokens=False)["input_ids"]
        for k, (q, a) in enumerate(zip(encoded[: len(one.questions)], encoded[len(one.questions) :], strict=True), 1):
            part = [*q, assistant, *a, end]
            if length is not None and len(ids) + len(part) > length:
                continue
            ids += part
            segment += [k] * len(part)
            positions += range(1 + IMAGE_TOKENS, 1 + IMAGE_TOKENS + len(part))
            answer += [False] * len(q) + [True] * (len(a) + 1) + [False]
        rows.append((ids, segment, positions, answer))
    length = length or max(len(row[0]) for row in rows)
    fill = (tokenizer.pad_token_id, -1, 0, False)
    ids, segment, positions, answer = (torch.tensor([row[i] + [fill[i]] * (length - len(row[i])) for row in rows]) for i in range(4))
    return Packed(ids, segment, positions, answer, ids.roll(-1, 1), pictures(samples))


def inputs(tokenizer: PreTrainedTokenizerFast, pixels: list[np.ndarray], questions: list[str], answers: list[str] | None = None) -> dict[str, Tensor]:
    """The model's inputs for one question about each picture, padded. With `answers`, they include labels for the answers."""
    prompts = tokenizer([f"<|user|>{'<image>' * IMAGE_TOKENS} {question}<|assistant|>" for question in questions], add_special_tokens=False)["input_ids"]
    ends: list[list[int]] = [[]] * len(prompts)
    if answers is not None:
        ends = tokenizer([f" {answer}<|end|>" for answer in answers], add_special_tokens=False)["input_ids"]

    def padded(rows: Iterable[list[int]], fill: int) -> Tensor:
        side = "left" if answers is None else "right"  # generation continues at the right end
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=fill, padding_side=side)

    whole = [prompt + end for prompt, end in zip(prompts, ends, strict=True)]
    batch = {"input_ids": padded(whole, tokenizer.pad_token_id), "attention_mask": padded(([1] * len(row) for row in whole), 0)}
    if answers is not None:
        batch["labels"] = padded(([-100] * len(prompt) + end for prompt, end in zip(prompts, ends, strict=True)), -100)
    return {**batch, "pixel_values": pixel_values(torch.from_numpy(np.stack(pixels))), "image_sizes": torch.full((len(pixels), 2), SIDE)}


def load(folder: Path | str = WEIGHTS, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedTokenizerFast, LlavaOnevisionForConditionalGeneration]:
    """The tokenizer and the model of a checkpoint's folder."""
    if not (Path(folder) / "config.json").exists():
        raise FileNotFoundError(f"folder={str(folder)!r}: no checkpoint is there; python -m recipes.small_lvlm.build trains the small LVLM")
    return PreTrainedTokenizerFast.from_pretrained(folder), LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
