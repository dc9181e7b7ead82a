"""Saving and loading: bit-identical logits through every route, and no damaged file goes unnoticed."""

import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
from torchao.quantization import FqnToConfig, quantize_
from transformers import PreTrainedModel, Qwen2ForCausalLM, TorchAoConfig
from transformers.utils import logging as transformers_logging

import torchao_qig
from tests.tiny_models import VLMS, qwen2
from torchao_qig import Equalize, PackedIntTensor, PackedIntWeightOnlyConfig, QIGWeightOnlyConfig
from torchao_qig.formats import Affine

transformers_logging.disable_progress_bar()
CONFIG = PackedIntWeightOnlyConfig(bits=3, group_size=64)


def plain_save(model: PreTrainedModel, directory: Path, **kwargs: Any) -> None:
    model.save_pretrained(directory, **kwargs)


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def quantized(model: PreTrainedModel, config: Any = CONFIG) -> PreTrainedModel:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "left unquantized")  # some vision towers have odd sizes
        quantize_(model, config, filter_fn=None)
    return model


def packed_names(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if isinstance(p, PackedIntTensor)}


def assert_same_model(loaded: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    assert packed_names(loaded) == packed_names(model) != set()
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


@pytest.mark.parametrize("family", VLMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", [plain_save, torchao_qig.save_pretrained])
def test_vlm_round_trip(family: str, dtype: torch.dtype, save: Callable[..., None], tmp_path: Path) -> None:
    """save_pretrained -> from_pretrained of every family, and saving what was loaded."""
    model, inputs = VLMS[family](dtype)
    full = logits(model, inputs)
    quantized(model)
    save(model, tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a", dtype=dtype)
    assert_same_model(loaded, model, inputs)
    assert not torch.equal(logits(loaded, inputs), full)
    described = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert described["quant_method"] == "torchao"
    assert described["quant_type"]["default"] == {
        "_type": "PackedIntWeightOnlyConfig",
        "_version": 1,
        "_data": {"bits": 3, "group_size": 64, "symmetric": False, "dtype": None, "int8_activations": False, "pre_scaled": False},
    }
    torchao_qig.save_pretrained(loaded, tmp_path / "b")
    assert_same_model(type(model).from_pretrained(tmp_path / "b", dtype=dtype), model, inputs)


@pytest.mark.parametrize("save", [plain_save, torchao_qig.save_pretrained])
@pytest.mark.parametrize(
    "config",
    [
        PackedIntWeightOnlyConfig(4, 32, True, torch.bfloat16),
        QIGWeightOnlyConfig(4, 32, True, torch.bfloat16),
        QIGWeightOnlyConfig(format=Affine(4, 32, True)),
    ],
    ids=["rounded", "calibrated", "a format"],
)
def test_dtype_and_format_of_ones_own(config: Any, save: Callable[..., None], tmp_path: Path) -> None:
    """Scales come back in their own dtype, which transformers cannot write into config.json; the file has it."""
    model, inputs = qwen2(torch.float32)
    save(quantized(model, config), tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_model(loaded, model, inputs)
    kept = {p.scale.dtype for p in loaded.parameters() if isinstance(p, PackedIntTensor)}
    assert kept == {config.dtype or torch.float32}
    described = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_type"]["default"]
    assert described["_data"] == {"bits": 4, "group_size": 32, "symmetric": True, "dtype": None, "int8_activations": False, "pre_scaled": False}


@pytest.mark.parametrize("family", VLMS)
def test_files_have_the_names_of_the_hub(family: str, tmp_path: Path) -> None:
    """Those that transformers gives unquantized files; the metadata knows every tensor by them, which vLLM needs."""
    model, _ = VLMS[family]()
    model.save_pretrained(tmp_path / "full")
    torchao_qig.save_pretrained(quantized(model), tmp_path)
    with safe_open(tmp_path / "full" / "model.safetensors", "pt") as full, safe_open(tmp_path / "model.safetensors", "pt") as file:
        found, rest = unflatten_tensor_state_dict({name: file.get_tensor(name) for name in file.keys()}, file.metadata())  # noqa: SIM118
        assert rest == {}
        assert {name for name in full.keys() if "." in name} <= set(found)  # noqa: SIM118
        assert len(found) == len(full.keys())
        assert any(isinstance(t, PackedIntTensor) for t in found.values())


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_language_model_alone(family: str, tmp_path: Path) -> None:
    """A part quantized on its own; the rest is listed as left alone, in both spellings."""
    model, inputs = VLMS[family]()
    quantized(model.model.language_model)
    torchao_qig.save_pretrained(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert_same_model(loaded, model, inputs)
    assert all("language_model" in name for name in packed_names(loaded))
    left = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["modules_to_not_convert"]
    tower = "vision_tower" if family == "llava_onevision" else "visual"
    assert {"lm_head", tower, f"model.{tower}"} <= set(left)


def test_sharded(tmp_path: Path) -> None:
    """The parts of one weight may lie in different files."""
    model, inputs = VLMS["llava_onevision"]()
    torchao_qig.save_pretrained(quantized(model), tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert_same_model(type(model).from_pretrained(tmp_path), model, inputs)


@pytest.mark.parametrize("save", [plain_save, torchao_qig.save_pretrained])
def test_tied_head_stays_tied(save: Callable[..., None], tmp_path: Path) -> None:
    """Left alone by quantize_, shared again after loading."""
    model, inputs = qwen2(tied=True)
    save(quantized(model), tmp_path)
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert_same_model(loaded, model, inputs)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_mixed_bits(tmp_path: Path) -> None:
    """FqnToConfig goes through config.json too."""
    model, inputs = qwen2()
    quantized(model, FqnToConfig({"re:.*mlp.*_proj": CONFIG, "re:.*self_attn.*_proj": PackedIntWeightOnlyConfig(bits=6, group_size=-1)}))
    torchao_qig.save_pretrained(model, tmp_path)
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert_same_model(loaded, model, inputs)
    assert {loaded.model.layers[0].mlp.up_proj.weight.bits, loaded.model.layers[0].self_attn.q_proj.weight.bits} == {3, 6}
    assert type(loaded.lm_head.weight) is torch.nn.Parameter


def test_quantized_while_loading(tmp_path: Path) -> None:
    """transformers' own way: a float checkpoint and our config; the same as quantize_ after loading."""
    model, inputs = qwen2()
    model.save_pretrained(tmp_path)
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(CONFIG))
    expected = Qwen2ForCausalLM.from_pretrained(tmp_path)
    quantize_(expected, CONFIG, filter_fn=lambda m, name: isinstance(m, torch.nn.Linear) and name != "lm_head")
    assert_same_model(loaded, expected, inputs)


def test_state_dict_and_torch_save(tmp_path: Path) -> None:
    """Into a packed model by copying, into a float one by assigning; through a file with weights_only."""
    model, inputs = qwen2()
    other, float_model = quantized(qwen2()[0]), qwen2()[0]
    quantized(model)
    torch.nn.init.normal_(model.model.norm.weight)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    other.load_state_dict(state)
    float_model.load_state_dict(state, assign=True)
    assert_same_model(other, model, inputs)
    assert_same_model(float_model, model, inputs)


def test_torchao_safetensors(tmp_path: Path) -> None:
    """torchao's own flatten and unflatten, for models that are not transformers'."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 16))
    quantize_(model, PackedIntWeightOnlyConfig(bits=5, group_size=32))
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    save_file(tensors, tmp_path / "model.safetensors", metadata)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        loaded, rest = unflatten_tensor_state_dict({k: file.get_tensor(k) for k in file.keys()}, file.metadata())  # noqa: SIM118
    assert rest == {}
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value)


SCALED = partial(QIGWeightOnlyConfig, bits=3, group_size=32, steps=[Equalize("qig", grid=6)], verbose=False)


@pytest.mark.parametrize(
    "entries",
    [
        lambda c: {r"re:model\.layers\..*": c},
        lambda c: {"_default": c, "lm_head": None},
        lambda c: {"model.layers.0.self_attn.o_proj": c, r"re:model\.layers\.1\..*": c},
        lambda c: {r"re:.*mlp\..*": PackedIntWeightOnlyConfig(bits=4, group_size=32), r"re:.*self_attn\..*": c, "lm_head": None},
        lambda c: {r"re:.*self_attn\..*": c, r"re:.*mlp\..*": SCALED(bits=4, calib=c.calib)},
    ],
)
@pytest.mark.parametrize("save", [plain_save, torchao_qig.save_pretrained])
def test_configs_by_name_say_which_weights_are_pre_scaled(entries: Callable[[Any], dict[str, Any]], save: Callable[..., None], tmp_path: Path) -> None:
    """Of the linears of one entry some have an act_pre_scale: the loaded model has it where it was, and the same logits; saved again, too."""
    model, inputs = qwen2()
    quantize_(model, FqnToConfig(entries(SCALED(calib=[inputs]))), filter_fn=None)
    scaled = {n: p.act_pre_scale is not None for n, p in model.named_parameters() if isinstance(p, PackedIntTensor)}
    assert set(scaled.values()) == {True, False}
    described = model.config.quantization_config.quant_type.fqn_to_config
    for name, with_scale in scaled.items():
        exact = described.get(name.removesuffix(".weight"))
        assert exact is None or getattr(exact, "pre_scaled", False) == with_scale
    save(model, tmp_path / "a")
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    assert {n: p.act_pre_scale is not None for n, p in loaded.named_parameters() if isinstance(p, PackedIntTensor)} == scaled
    assert_same_model(loaded, model, inputs)
    torchao_qig.save_pretrained(loaded, tmp_path / "b")
    assert_same_model(Qwen2ForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32), model, inputs)
