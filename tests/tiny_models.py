"""Tiny random models of the classes that users bring, built in memory from transformers' configs, each with an input."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

Built = tuple[PreTrainedModel, dict[str, Tensor]]
IMAGE, VIDEO, START, END = 190, 191, 192, 193  # token ids
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 200,
    "max_position_embeddings": 256,
}
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}


def _build(cls: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    return cls._from_config(config, dtype=dtype).eval()


def _ids(image_tokens: int, batch: int = 1) -> Tensor:
    """Some text, an image, some text."""
    text = torch.arange(1, 13)
    return torch.cat([text[:4], torch.full((image_tokens,), IMAGE), text[4:]]).expand(batch, -1).contiguous()


def qwen2(dtype: torch.dtype = torch.float32, tied: bool = False) -> Built:
    """A text model; `tied`: the head is the embedding's weight."""
    return _build(hf.Qwen2ForCausalLM, hf.Qwen2Config(**TEXT, tie_word_embeddings=tied), dtype), {"input_ids": _ids(0)}


def llama(dtype: torch.dtype = torch.float32) -> Built:
    """A text model whose value and output projections have the same shape."""
    return _build(hf.LlamaForCausalLM, hf.LlamaConfig(**{**TEXT, "num_key_value_heads": 4}), dtype), {"input_ids": _ids(0)}


def qwen3_moe(dtype: torch.dtype = torch.float32) -> Built:
    """A mixture of experts whose weights are 3-D parameters."""
    config = hf.Qwen3MoeConfig(**TEXT, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    return _build(hf.Qwen3MoeForCausalLM, config, dtype), {"input_ids": _ids(0)}


def gemma3(dtype: torch.dtype = torch.float32) -> Built:
    """Four norms per block that multiply by 1 + weight, norms of queries and keys, sliding and full attention."""
    text = hf.Gemma3TextConfig(**TEXT, head_dim=32, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    vision = hf.SiglipVisionConfig(**TOWER, image_size=28, patch_size=7)
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END)
    model = _build(hf.Gemma3ForConditionalGeneration, config, dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name and "vision" not in name:
                p.normal_(0, 0.2)  # they start at zero
    ids = _ids(4)
    return model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28).to(dtype), "token_type_ids": (ids == IMAGE).long()}


def llava_onevision(dtype: torch.dtype = torch.float32) -> Built:
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**TOWER, image_size=28, patch_size=14),
        text_config=hf.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[28, 28]],
        vision_aspect_ratio="anyres_max_9",
    )
    model = _build(hf.LlavaOnevisionForConditionalGeneration, config, dtype)
    pixels = torch.randn(1, 2, 3, 28, 28).to(dtype)
    tokens = 4 + 4 + 2  # base image, the one crop, a newline per row
    return model, {"input_ids": _ids(tokens), "pixel_values": pixels, "image_sizes": torch.tensor([[28, 28]])}


def _qwen_image(patch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A 4 x 4 grid of patches: 4 tokens after merging 2 x 2, between the vision markers."""
    ids = torch.cat([torch.arange(1, 4), torch.tensor([START, *[IMAGE] * 4, END]), torch.arange(4, 12)])[None]
    kinds = (ids == IMAGE).int()
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(16, 3 * 2 * patch * patch).to(dtype),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": kinds,
    }


def qwen2_vl(dtype: torch.dtype = torch.float32) -> Built:
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": QWEN_ROPE},
        vision_config={
            "depth": 2,
            "embed_dim": 64,
            "hidden_size": 128,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return _build(hf.Qwen2VLForConditionalGeneration, config, dtype), _qwen_image(14, dtype)


def qwen2_5_vl(dtype: torch.dtype = torch.float32) -> Built:
    config = hf.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": QWEN_ROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 14,
            "fullatt_block_indexes": [1],
            "window_size": 56,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return _build(hf.Qwen2_5_VLForConditionalGeneration, config, dtype), _qwen_image(14, dtype)


def qwen3_vl(dtype: torch.dtype = torch.float32) -> Built:
    config = hf.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 32, "rope_parameters": QWEN_ROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "out_hidden_size": 128,
            "patch_size": 16,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 16,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return _build(hf.Qwen3VLForConditionalGeneration, config, dtype), _qwen_image(16, dtype)


def internvl(dtype: torch.dtype = torch.float32) -> Built:
    vision = hf.InternVLVisionConfig(**TOWER, image_size=[28, 28], patch_size=[7, 7])
    config = hf.InternVLConfig(vision_config=vision, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE, downsample_ratio=0.5)
    model = _build(hf.InternVLForConditionalGeneration, config, dtype)
    return model, {"input_ids": _ids(4), "pixel_values": torch.randn(1, 3, 28, 28).to(dtype)}


def smolvlm(dtype: torch.dtype = torch.float32) -> Built:
    vision = {**TOWER, "image_size": 28, "patch_size": 7}
    config = hf.SmolVLMConfig(vision_config=vision, text_config=hf.LlamaConfig(**TEXT), image_token_id=IMAGE, scale_factor=2)
    model = _build(hf.SmolVLMForConditionalGeneration, config, dtype)
    return model, {"input_ids": _ids(4), "pixel_values": torch.randn(1, 1, 3, 28, 28).to(dtype)}


VLMS: dict[str, Callable[..., Built]] = {
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "smolvlm": smolvlm,
}


def language_model(vlm: PreTrainedModel) -> torch.nn.Module:
    """The decoder of any of `VLMS`, without its head."""
    return vlm.model.text_model if isinstance(vlm, hf.SmolVLMForConditionalGeneration) else vlm.model.language_model
