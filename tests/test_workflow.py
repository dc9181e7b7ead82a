"""`quantize_` with our config: what is converted, what is left alone, and that a failed call changes nothing."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

from torchao_qig import PackedIntTensor, PackedIntWeightOnlyConfig


class Tied(nn.Module):
    """A text model's skeleton: the head shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embed(x)))


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def packed_names(model: nn.Module) -> set[str]:
    return {name.removesuffix(".weight") for name, p in model.named_parameters() if isinstance(p, PackedIntTensor)}


def cfg(**kwargs) -> PackedIntWeightOnlyConfig:
    return PackedIntWeightOnlyConfig(**{"bits": 3, "group_size": 32, **kwargs})


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_linear_becomes_packed(symmetric: bool, dtype: torch.dtype | None) -> None:
    """The weight is the rounded one, bias and module stay, the module's repr says what it holds."""
    model = mlp(64, 96, 32)
    before, modules = [m.weight.detach().clone() for m in model], list(model)
    quantize_(model, cfg(symmetric=symmetric, dtype=dtype))
    assert list(model) == modules
    for module, weight in zip(model, before, strict=True):
        assert torch.equal(module.weight.dequantize(), PackedIntTensor.from_hp(weight, 3, 32, symmetric, dtype).dequantize())
        assert not module.weight.requires_grad
        assert "PackedIntTensor(3 bits, group 32" in repr(module)


def test_filter_fn_chooses() -> None:
    """By name and by module."""
    model = mlp(64, 64, 64, 64)
    quantize_(model, cfg(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "1")
    assert packed_names(model) == {"0", "2"}


def test_fqn_to_config_mixes() -> None:
    """Bits per layer, None, patterns, other torchao configs beside ours."""
    model = mlp(64, 64, 64, 64, 64)
    config = FqnToConfig({"0": cfg(bits=2), "1.weight": cfg(bits=5), "2": None, "3": Int8WeightOnlyConfig(), r"re:\d": cfg()})
    quantize_(model, config, filter_fn=None)
    assert (model[0].weight.bits, model[1].weight.bits) == (2, 5)
    assert packed_names(model) == {"0", "1"}
    assert type(model[2].weight) is nn.Parameter
    assert type(model[3].weight).__name__ == "Int8Tensor"


def test_fqn_to_config_pattern_over_blocks() -> None:
    """A pattern that matches blocks, weights and biases alike quantizes weight matrices only."""
    model = nn.Sequential(mlp(64, 64), mlp(64, 64))
    quantize_(model, FqnToConfig({r"re:1(\..*)?": cfg()}), filter_fn=None)
    assert packed_names(model) == {"1.0"}


def test_expert_parameters_by_name() -> None:
    """A 3-D parameter is quantized expert by expert, along its last dimension."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 48, 64))

    model = nn.Sequential(Experts())
    before = model[0].up.detach().clone()
    quantize_(model, FqnToConfig({"0.up": cfg(bits=8)}), filter_fn=None)
    assert isinstance(model[0].up, PackedIntTensor)
    torch.testing.assert_close(model[0].up.dequantize(), before, atol=0.02, rtol=0)
    assert torch.equal(model[0].up[2].dequantize(), PackedIntTensor.from_hp(before[2], 8, 32).dequantize())


def test_tied_head_is_left_alone() -> None:
    """It stays the embedding's very parameter."""
    model = Tied()
    quantize_(model, cfg())
    assert packed_names(model) == {"body"}
    assert model.head.weight is model.embed.weight
    assert torch.isfinite(model(torch.arange(4))).all()


def test_linears_that_share_a_weight_go_on_sharing_it() -> None:
    """One packed tensor for both; and a linear used in two places is converted once."""
    model = mlp(64, 64, 64)
    model[1].weight = model[0].weight
    model.append(model[0])
    quantize_(model, cfg())
    assert isinstance(model[0].weight, PackedIntTensor)
    assert model[1].weight is model[0].weight
    assert model[2] is model[0]


def test_weight_shared_with_an_unmatched_linear_is_left_alone() -> None:
    """Converting one of the two would untie them."""
    model = mlp(64, 64, 64, 64)
    model[1].weight = model[0].weight
    quantize_(model, cfg(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "1")
    assert packed_names(model) == {"2"}


def test_misfits_are_named_in_one_warning() -> None:
    """All of them, with their sizes; the others are converted."""
    model = nn.Sequential(nn.Linear(64, 100), nn.Linear(100, 40), nn.Linear(40, 64), nn.Linear(64, 64))
    with pytest.warns(UserWarning, match="left unquantized") as caught:
        quantize_(model, cfg())
    ours = [str(w.message) for w in caught if "left unquantized" in str(w.message)]
    assert len(ours) == 1
    assert "1 (100 inputs, group_size=32)" in ours[0]
    assert "2 (40 inputs, group_size=32)" in ours[0]
    assert packed_names(model) == {"0", "3"}
    assert caught[0].filename == __file__


def test_embeddings_and_convolutions_are_left_alone() -> None:
    """Their weights are matrices too, but nothing that F.linear multiplies: a pattern over everything names them in one warning."""
    model = nn.Sequential(nn.Embedding(10, 64), nn.Linear(64, 64), nn.Conv1d(64, 64, 32), nn.LayerNorm(64))
    with pytest.warns(UserWarning, match=r"not nn\.Linear: 0 \(Embedding\), 2 \(Conv1d\)"):
        quantize_(model, FqnToConfig({r"re:.*": cfg()}), filter_fn=None)
    assert packed_names(model) == {"1"}
    with pytest.raises(ValueError, match=r"not nn\.Linear: 0 \(Embedding\)"):
        quantize_(model, cfg(), filter_fn=lambda m, name: name == "0")


def test_second_call_leaves_packed_weights() -> None:
    """With one warning; weights that torchao quantized before count too."""
    model = mlp(64, 64, 64)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda m, name: name == "0")
    quantize_(model, cfg(bits=2), filter_fn=lambda m, name: name == "1")
    with pytest.warns(UserWarning, match="already quantized, left as they are: 0, 1"):
        quantize_(model, cfg(bits=4))
    assert model[1].weight.bits == 2


@pytest.mark.parametrize(
    ("model", "kwargs", "words"),
    [
        (lambda: mlp(50, 60, 50), {}, "group_size"),
        (lambda: nn.Sequential(Tied()), {"filter_fn": lambda m, name: name == "0.head"}, "share their weight"),
    ],
)
def test_nothing_to_quantize_is_an_error(model: Callable[[], nn.Module], kwargs: dict, words: str) -> None:
    """torchao itself would return silently."""
    with pytest.raises(ValueError, match=f"nothing to quantize.*{words}"):
        quantize_(model(), cfg(), **kwargs)


@pytest.mark.parametrize(("model", "kwargs"), [(lambda: nn.Sequential(nn.ReLU()), {}), (lambda: mlp(64, 64), {"filter_fn": lambda m, name: False})])
def test_no_match_is_what_it_is_for_torchaos_configs(model: Callable[[], nn.Module], kwargs: dict) -> None:
    """torchao calls nobody then: nothing happens."""
    ours, theirs = model(), model()
    quantize_(ours, cfg(), **kwargs)
    quantize_(theirs, Int8WeightOnlyConfig(), **kwargs)
    assert packed_names(ours) == set()
    assert all(type(p) is nn.Parameter for m in (ours, theirs) for p in m.parameters())


def test_filter_with_a_state_is_asked_once() -> None:
    """As by torchao itself, which asks it about each module once: the first two linears, every second linear."""

    def first(count: int) -> Callable[[nn.Module, str], bool]:
        left = [count]

        def choose(module: nn.Module, name: str) -> bool:
            left[0] -= isinstance(module, nn.Linear)
            return isinstance(module, nn.Linear) and left[0] >= 0

        return choose

    def every_second() -> Callable[[nn.Module, str], bool]:
        asked = [0]

        def choose(module: nn.Module, name: str) -> bool:
            asked[0] += 1
            return isinstance(module, nn.Linear) and asked[0] % 2 == 0

        return choose

    for made in (partial(first, 2), partial(first, 1), every_second):
        ours, theirs = (nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))) for _ in range(2))
        quantize_(ours, cfg(), filter_fn=made())
        quantize_(theirs, Int8WeightOnlyConfig(), filter_fn=made())
        assert packed_names(ours) == {n.removesuffix(".weight") for n, p in theirs.named_parameters() if type(p.data) is not torch.Tensor} != set()
