"""Checkpoint directories of seven families and a text model, loaded by what they say of themselves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchao.quantization import FqnToConfig, quantize_

import torchao_qig
from tests import tiny_models
from tests.tiny_dirs import PROCESSORS, directory
from torchao_qig import PackedIntTensor, PackedIntWeightOnlyConfig, QIGInt8DynamicActivationConfig
from torchao_qig.errors import UserError, UserFileError
from torchao_qig.lvlm.load import images_only, load_model, load_processor, shape_of

W3 = PackedIntWeightOnlyConfig(bits=3, group_size=64)


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


def packed(path: Path, family: str = "qwen2", config: Any = W3, **options: Any) -> Path:
    """A quantized checkpoint: the decoder's blocks."""
    model = getattr(tiny_models, family)()[0]
    if isinstance(config, FqnToConfig):
        quantize_(model, config, filter_fn=None)
    else:
        quantize_(model, config, filter_fn=lambda m, name: isinstance(m, torch.nn.Linear) and "layers" in name and "vi" not in name)
    torchao_qig.save_pretrained(model, path, **options)
    return path


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def say(**changes: Any) -> Callable[[dict[str, Any]], object]:
    """Other settings in config.json's description."""
    return lambda config: config["quantization_config"]["quant_type"]["default"]["_data"].update(changes)


def say_of(name: str, **changes: Any) -> Callable[[dict[str, Any]], object]:
    """The same for one key of an FqnToConfig, which torchao writes twice."""
    return lambda config: [
        config["quantization_config"]["quant_type"]["default"]["_data"][twice][name]["_data"].update(changes)
        for twice in ("fqn_to_config", "module_fqn_to_config")
    ]


def float_activations(config: dict[str, Any]) -> None:
    described = config["quantization_config"]["quant_type"]["default"]
    described["_data"]["int8_activations"] = False


def unnamed(path: Path) -> None:
    """Another tool has written the file again, without its metadata."""
    file = path / "model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})


@pytest.mark.parametrize("family", ["qwen2", "llava_onevision", "qwen2_vl"])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "100KB"}])
@pytest.mark.parametrize("damage", [lambda path: None, unnamed])
def test_without_its_description(family: str, options: dict[str, Any], damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.json lost its quantization_config: refused before anything is loaded, where transformers gives random weights under a warning."""
    packed(tmp_path, family, **options)
    if not options:
        damage(tmp_path)
    edited(tmp_path, lambda config: config.pop("quantization_config"))
    for auto in (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(auto, "from_pretrained", None)
    with pytest.raises(UserError, match=r"config\.json has no quantization_config of torchao, but model.*\.safetensors holds packed weights .*put the config"):
        load_model(str(tmp_path))


def test_with_the_description_of_another_tool(tmp_path: Path) -> None:
    packed(tmp_path)
    edited(tmp_path, lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    with pytest.raises(UserError, match="no quantization_config of torchao"):
        load_model(str(tmp_path))


CONTRADICTIONS = {
    "bits": (W3, say(bits=4), r"config\.json says bits=4 for .*layers.0.*, model\.safetensors holds bits=3"),
    "group size": (W3, say(group_size=128), r"says group_size=128 for .*holds group_size=64"),
    "int8": (
        QIGInt8DynamicActivationConfig(bits=4), float_activations,
        r"says int8_activations=False for .*holds int8_activations=True",
    ),
    "one of many": (
        FqnToConfig({"model.layers.0.mlp.up_proj": PackedIntWeightOnlyConfig(5, 64), "re:.*layers.*_proj": W3}),
        say_of("model.layers.0.mlp.up_proj", bits=6),
        r"says bits=6 for model\.layers\.0\.mlp\.up_proj, model\.safetensors holds bits=5",
    ),
    "a pattern": (
        FqnToConfig({"model.layers.0.mlp.up_proj": PackedIntWeightOnlyConfig(5, 64), "re:.*layers.*_proj": W3}),
        say_of("re:.*layers.*_proj", group_size=32),
        r"says group_size=32 for model\.layers\.\d\..*, model\.safetensors holds group_size=64",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:calib=None")
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_description_that_contradicts_the_weights(case: str, tmp_path: Path) -> None:
    config, change, words = CONTRADICTIONS[case]
    packed(tmp_path, config=config)
    model = load_model(str(tmp_path))
    assert any(isinstance(p, PackedIntTensor) for p in model.parameters())
    edited(tmp_path, change)
    with pytest.raises(UserError, match=words):
        load_model(str(tmp_path))


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen3_vl", "internvl", "gemma3", "smolvlm"])
def test_names_of_the_hub_are_known_too(family: str, tmp_path: Path) -> None:
    """Each linear by its own config, whichever of its names the file has."""
    model = getattr(tiny_models, family)()[0]
    found = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(("up_proj", "down_proj")) and "vi" not in n]
    config = FqnToConfig({name: PackedIntWeightOnlyConfig(bits=2 + i, group_size=64) for i, name in enumerate(found[:4])})
    packed(tmp_path, family, config)
    loaded = load_model(str(tmp_path))
    assert [loaded.get_submodule(name).weight.bits for name in found[:4]] == [2, 3, 4, 5]
    edited(tmp_path, say_of(found[1], bits=7))
    with pytest.raises(UserError, match=f"says bits=7 for {found[1]}, .*holds bits=3"):
        load_model(str(tmp_path))


def test_headers_alone_are_read(tmp_path: Path) -> None:
    """The check costs no memory; a damaged header is an error that names the model."""
    packed(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert any("PackedIntTensor" in text for text in file.metadata().values())
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(UserFileError, match="cannot load its weights"):
        load_model(str(tmp_path))


def other(**changes: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | changes)


DAMAGED: dict[str, tuple[str, Callable[[str], str], Callable[[str], Any]]] = {
    "no object": ("config.json", lambda text: "[]", load_model), "cut": ("config.json", lambda text: text[:20], load_model),
    "wrong type": ("config.json", other(text_config=5), load_model), "no such dtype": ("config.json", other(dtype="float99"), load_model),
    "wrong size": ("config.json", other(text_config={"hidden_size": "a"}), shape_of), "no such model": ("config.json", other(model_type="nope"), load_model),
    "description": ("config.json", other(quantization_config=3), load_model),
    "processor": ("processor_config.json", lambda text: "[]", load_processor), "class": ("processor_config.json", other(processor_class=3), load_processor),
    "tokenizer": ("tokenizer.json", lambda text: text[:99], load_processor), "its settings": ("tokenizer_config.json", lambda text: "[]", load_processor),
    "generation": ("generation_config.json", lambda text: "[]", load_model),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_the_users(case: str, tmp_path: Path) -> None:
    """transformers fails in many ways on them."""
    file, change, load = DAMAGED[case]
    directory("llava_onevision", tmp_path)
    (tmp_path / file).write_text(change((tmp_path / file).read_text()))
    with pytest.raises(UserFileError, match=r"^model='.*': cannot load its "):
        load(str(tmp_path))


def test_memory_is_not_a_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory("qwen2", tmp_path)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="allocate memory"):
        load_model(str(tmp_path))
