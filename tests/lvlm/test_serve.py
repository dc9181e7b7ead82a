"""Serving: compiled answers are those of plain `generate`, nothing is compiled twice, and what does not fit is said."""

import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torchao.quantization import quantize_

from tests import tiny_dirs, tiny_models
from torchao_qig import PackedIntWeightOnlyConfig
from torchao_qig.lvlm import serve
from torchao_qig.lvlm.load import load_model, load_processor

NO_SPACE = [token for token in range(200) if token != 1]  # without spaces a streamer waits for the end of the word
NEW = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(height).integers(0, 255, (height, width, 3), dtype=np.uint8))


def quantized(model: nn.Module, part: str = "") -> nn.Module:
    """The decoder's linears, or those with `part` in their name."""
    config = PackedIntWeightOnlyConfig(bits=3, group_size=64)
    quantize_(model.get_decoder(), config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and part in name)
    return model


def text_model() -> nn.Module:
    return quantized(tiny_models.qwen2()[0])


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of torch.compile but the kernels: guards and recompilations are those of serving."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def asked(processor: Any) -> list[tuple[Any, str]]:
    """Text and pictures of two sizes, short prompts and long ones."""
    texts = [(None, "Hello"), (None, "How many cats are in it? " * 4)]
    return texts + [(picture(40, 50), "What is it?"), (picture(90, 60), "How many?"), (picture(90, 60), "How many cats are there? " * 3)] * hasattr(
        processor, "image_processor"
    )


def check_same_answers(family: str, folder: Path, part: str) -> None:
    """Compiled tokens are those of eager mode for every prompt, and after the warm-up nothing is compiled."""
    directory = str(tiny_dirs.directory(family, folder))
    processor = load_processor(directory)
    plain, fast = (quantized(load_model(directory), part) for _ in range(2))
    assert serve.compiled(fast) is fast
    counters.clear()
    assert serve.warm_up(fast, processor) > 0
    assert 2 <= graphs() <= 3  # a token, a prompt; one more where pictures' prompts are masked otherwise
    assert not counters["graph_break"]
    counters.clear()
    for image, question in asked(processor):
        inputs = serve.inputs_of(plain, processor, image, question)
        assert torch.equal(fast.generate(**inputs, **NEW), plain.generate(**inputs, **NEW)), question
    assert graphs() == 0


@pytest.mark.parametrize("family, part", [("llava_onevision", "mlp"), ("qwen2_vl", "down_proj")])
def test_compiled_answers_are_eager_answers(family: str, part: str, tmp_path: Path) -> None:
    check_same_answers(family, tmp_path, part)


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "gemma3", "qwen2"])
def test_other_families_compile_once(family: str, tmp_path: Path) -> None:
    check_same_answers(family, tmp_path, "layers")


@pytest.mark.usefixtures("traced_only")
def test_every_kind_of_block_is_compiled_once() -> None:
    """Mixed bits: more kinds than torch's limit of recompilations, which would fall back to eager mode."""
    torch.manual_seed(0)
    config = hf.Qwen2Config(**{**tiny_models.TEXT, "num_hidden_layers": 6})
    plain, fast = (hf.Qwen2ForCausalLM._from_config(config, dtype=torch.float32).eval() for _ in range(2))
    fast.load_state_dict(plain.state_dict())
    for model in (plain, fast):
        for block, (bits, group) in zip(model.model.layers, [(2, 64), (3, 64), (4, 64), (3, 32), (2, 64)], strict=False):  # the last stays as it is
            quantize_(block, PackedIntWeightOnlyConfig(bits=bits, group_size=group))
    serve.compiled(fast)
    counters.clear()
    for length in (7, 90, 33):
        ids = torch.randint(1, 200, (1, length))
        assert torch.equal(fast.generate(ids, **NEW), plain.generate(ids, **NEW))
    assert graphs() == 2 * 5 > torch._dynamo.config.recompile_limit


LENGTHS = st.one_of(st.integers(1, 140), st.integers(59, 66), st.integers(123, 130))


@hypothesis.settings(max_examples=40)
@given(st.lists(LENGTHS, min_size=1, max_size=3), st.integers(1, 8))
def test_any_prompts_one_after_another(lengths: list[int], new: int) -> None:
    """Lengths around the padding (65) and the steps of the cache (64), each after other prompts."""
    plain, fast = PLAIN, FAST
    with torch.compiler.set_stance("force_eager"):
        for length in lengths:
            ids = torch.randint(1, 190, (1, length), generator=torch.Generator().manual_seed(length))
            options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
            assert torch.equal(fast.generate(ids, **options), plain.generate(ids, **options))


PLAIN, FAST = tiny_models.qwen2()[0], serve.compiled(tiny_models.qwen2()[0])


@given(st.integers(2, 9), st.integers(0, 5), st.sampled_from(["rows last", "rows before", "neither"]))
def test_stretching_repeats_the_last_row(rows: int, more: int, where: str) -> None:
    shape = {"rows last": (1, rows), "rows before": (3, rows, 11), "neither": (1, 11)}[where]
    x = torch.randn(shape)
    out = serve._stretched(x, rows, rows + more)
    if where == "neither":
        assert out is x
        return
    dim = -1 if where == "rows last" else -2
    assert out.shape[dim] == rows + more
    assert torch.equal(out.narrow(dim, 0, rows), x)
    assert torch.equal(out.narrow(dim, rows, more), x.narrow(dim, rows - 1, 1).expand_as(out.narrow(dim, rows, more)))


def test_calls_without_the_static_cache_are_as_before() -> None:
    plain, fast = text_model(), serve.compiled(text_model())
    counters.clear()
    batch = torch.randint(1, 190, (2, 9))
    assert torch.equal(fast(batch).logits, plain(batch).logits)
    cache = hf.DynamicCache(config=fast.config)
    assert torch.equal(fast.generate(batch[:1], past_key_values=cache, **NEW), plain.generate(batch[:1], **NEW))
    assert graphs() == 0


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda m: m.generate(torch.ones(1, 95, dtype=torch.long), max_new_tokens=6), "max_length=100: the prompt has 95 tokens .* max_length=101"),
        (lambda m: m.generate(torch.ones(1, 101, dtype=torch.long)), "max_length=100: the prompt has 101 tokens"),
        (lambda m: m.generate(torch.ones(2, 5, dtype=torch.long)), "input_ids: 2 sequences"),
        (lambda m: m.generate(input_ids=torch.ones(1, 5, dtype=torch.long), num_beams=3), "input_ids: 3 sequences"),
        (lambda m: m.generate(torch.ones(1, 95, dtype=torch.long), max_length=110, min_new_tokens=9), "max_length=100: prompt and answer do not fit"),
        (lambda m: serve.compiled(m), "already compiled, with max_length=100"),
    ],
)
def test_what_does_not_fit_is_said(ask: Callable[[Any], Any], message: str) -> None:
    model = serve.compiled(text_model(), 100)
    with torch.compiler.set_stance("force_eager"), pytest.raises(ValueError, match=message):
        ask(model)
    with torch.compiler.set_stance("force_eager"):  # and the next answer is right
        ids = torch.ones(1, 94, dtype=torch.long)
        assert torch.equal(model.generate(ids, **NEW), text_model().generate(ids, **NEW))


@pytest.mark.parametrize("length", [-1, 1, 257])
def test_max_length_is_what_the_model_can(length: int) -> None:
    with pytest.raises(ValueError, match=f"max_length={length}: the model has 256 positions"):
        serve.compiled(text_model(), length)


def test_unknown_architectures_are_refused() -> None:
    layers = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2}
    linear = hf.Qwen3NextForCausalLM(hf.Qwen3NextConfig(**tiny_models.TEXT, head_dim=32, num_experts=2, **layers))
    with pytest.raises(ValueError, match="keep more than keys and values"):
        serve.compiled(linear)
    model = text_model()
    model.model.layers = nn.ModuleList(list(model.model.layers) * 2)
    with pytest.raises(ValueError, match="no list of 2 decoder blocks"):
        serve.compiled(model)


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"C\+\+ compiler.*--no-compile"):
        serve.compiled(text_model())
    serve.check_compiler(torch.device("meta"))  # accelerators need none


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Any]:
    directory = str(tiny_dirs.directory("llava_onevision", tmp_path_factory.mktemp("model")))
    return load_model(directory), load_processor(directory)


def test_pieces_are_the_answer(seeing: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, processor = seeing
    shown = picture(30, 40)
    shown.save(tmp_path / "shown.png")
    clock = serve.Clock()
    pieces = list(serve.answer(model, processor, tmp_path / "shown.png", "What is it?", 12, clock, min_new_tokens=12))
    inputs = serve.inputs_of(model, processor, shown, "What is it?")
    whole = model.generate(**inputs, do_sample=False, max_new_tokens=12, min_new_tokens=12)
    assert (inputs["input_ids"] == tiny_models.IMAGE).any()
    assert "".join(pieces) == processor.decode(whole[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(clock.times) == 1 + 12
    assert list(serve.answer(model, processor, None, "Hello", 5, suppress_tokens=NO_SPACE)) == [" "] * 5


def test_a_picture_changes_the_answer(seeing: tuple[nn.Module, Any]) -> None:
    """What is shown reaches the model."""
    inputs = [serve.inputs_of(*seeing, picture(*size), "What is it?") for size in ((30, 40), (31, 40))]
    first, second = (seeing[0](**one).logits[0, -1] for one in inputs)
    assert (first - second).abs().max() > 1e-6


def test_closing_an_answer_stops_it(seeing: tuple[nn.Module, Any]) -> None:
    clock = serve.Clock()
    pieces = serve.answer(*seeing, None, "Hello", 400, clock, suppress_tokens=NO_SPACE)
    next(pieces)
    pieces.close()
    assert len(clock.times) < 300
    assert not any("work" in thread.name for thread in threading.enumerate())


def test_errors_reach_who_asks(seeing: tuple[nn.Module, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_beams"):
        list(serve.answer(*seeing, None, "Hello", num_beams=0))
    model, words = text_model(), tiny_dirs.text()
    with pytest.raises(ValueError, match="no image processor"):
        next(serve.answer(model, words, picture(9, 9), "What is it?"))
    with pytest.raises(FileNotFoundError):
        next(serve.answer(*seeing, tmp_path / "none.png", "What is it?"))
    with pytest.raises(ValueError, match="max_length=20: the prompt has"):
        list(serve.answer(serve.compiled(model, 20), words, None, "Hello, who are you?"))


def test_speed_is_counted_after_the_first_token() -> None:
    clock = serve.Clock()
    assert clock.tokens_per_second() == 0
    clock.times = [10.0, 15.0, 15.5, 16.0]
    assert clock.tokens_per_second() == 2.0
    clock.put(Tensor([3]))
    assert len(clock.times) == 5
