"""The small LVLM before its training: the evaluation's arithmetic does not need a good model."""

import functools

from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from recipes.small_lvlm.model import new_model, new_tokenizer


@functools.cache
def small() -> tuple[PreTrainedTokenizerFast, LlavaOnevisionForConditionalGeneration]:
    tokenizer = new_tokenizer()
    return tokenizer, new_model(tokenizer).eval()
