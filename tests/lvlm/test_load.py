"""Checkpoint directories of seven families and a text model, loaded by what they say of themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from tests import tiny_models
from tests.tiny_dirs import PROCESSORS, directory
from torchao_qig.lvlm.load import images_only, load_model, load_processor, shape_of


@pytest.mark.parametrize("family", list(PROCESSORS))
def test_directories(family: str, tmp_path: Path) -> None:
    """Model, processor and shape; the processor's tokens are those that the model expects of the picture."""
    directory(family, tmp_path)
    model, processor, shape = load_model(str(tmp_path)), load_processor(str(tmp_path)), shape_of(str(tmp_path))
    built = getattr(tiny_models, family)()[0]
    assert type(model) is type(built)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), built.parameters(), strict=True))
    assert {n: (p.shape, p.dtype) for n, p in shape.named_parameters()} == {n: (p.shape, p.dtype) for n, p in model.named_parameters()}
    assert all(p.is_meta for p in shape.parameters())
    options: dict[str, Any] = dict(tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True)
    for size in ((30, 60), (64, 28)):
        picture = [] if family == "qwen2" else [{"type": "image", "image": Image.new("RGB", size, "red")}]
        content: Any = [*picture, {"type": "text", "text": "what is it?"}] if picture else "what is it?"
        batch = processor.apply_chat_template([{"role": "user", "content": content}], **options)
        with torch.no_grad():
            assert model(**batch).logits.isfinite().all()  # an error where pictures and tokens do not match


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "internvl", "smolvlm"])
def test_processors_without_videos(family: str, tmp_path: Path) -> None:
    """They keep their class's name in the files, and take videos no more."""
    made = PROCESSORS[family]()
    made.save_pretrained(tmp_path / "first")
    loaded = images_only(getattr(transformers, type(made).__name__)).from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    first, second = ((tmp_path / name / "processor_config.json").read_text() for name in ("first", "second"))
    assert first == second
    assert f'"processor_class": "{type(made).__name__}"' in first
    assert "video_processor" not in loaded.get_attributes()


def test_dtypes(tmp_path: Path) -> None:
    directory("qwen2", tmp_path, torch.bfloat16)
    assert load_model(str(tmp_path)).dtype == shape_of(str(tmp_path)).dtype == torch.bfloat16
    assert load_model(str(tmp_path), "float32").dtype == shape_of(str(tmp_path), "float32").dtype == torch.float32


def test_no_such_model_class(tmp_path: Path) -> None:
    transformers.ViTConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no model that generates text for model_type='vit'"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["absent", "./absent", "a/b/c", "~/absent-model"])
def test_names_that_are_no_models(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"model='{name}': no such directory"):
        load_model(name)
