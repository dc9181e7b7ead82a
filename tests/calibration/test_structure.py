"""Architecture by observation: chains of blocks, groups of linears, and folds, on models whose code gives no hint by its names."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchao.quantization import quantize_

import torchao_qig
from tests.plain_models import MLP, WIDTH, Block, CrossBlock, Decoder, Experts, GatedBlock, InPlaceBlock, OuterResidual, ParallelBlock, RMSNorm, tokens
from tests.tiny_models import VLMS, gemma3, llama, qwen3_moe
from torchao_qig import Equalize, PackedIntTensor, PackedIntWeightOnlyConfig, QIGWeightOnlyConfig
from torchao_qig.methods.draft import Draft
from torchao_qig.watch.batches import as_batch
from torchao_qig.watch.chains import find_chains, quiet

QUICK = partial(QIGWeightOnlyConfig, bits=3, group_size=16, steps=[Equalize(grid=4)], verbose=False)


def calibrate(model: nn.Module, *batches: Any, **kwargs: Any) -> torchao_qig.Calibration:
    return torchao_qig.calibrate(model, list(batches), QUICK(**kwargs))


def chains(model: nn.Module, batch: Any) -> list[list[str]]:
    with quiet(model):
        return [c.names for c in find_chains(model, as_batch(model, batch, False, 0))]


def folds(found: torchao_qig.Calibration, block: str | None = None) -> dict[str, tuple[str, str]]:
    """Where scales go in a block (by default the last one); names relative to it."""
    groups = [g for g in found.groups.values() if g.block == (block or list(found.groups.values())[-1].block)]
    return {g.label.removeprefix(g.block).removeprefix("."): (g.fold_kind, g.fold_into.removeprefix(g.block).removeprefix(".")) for g in groups}


# Chains


@pytest.mark.parametrize(("build", "blocks"), [(build, 2) for build in [*VLMS.values(), gemma3]])
def test_chains_of_vision_language_models(build: Callable[[], Any], blocks: int) -> None:
    """The vision tower's blocks, then the decoder's."""
    model, inputs = build()
    vision, decoder = chains(model, inputs)
    assert len(vision) == len(decoder) == blocks
    assert all("vision" in n or "visual" in n for n in vision)
    assert all("language_model" in n or "text_model" in n for n in decoder)


def test_additive_glue_is_replayed() -> None:
    """What is added between blocks stays added: hidden states after the chain equal those of the model."""
    noise = torch.randn(3, 1, WIDTH)
    model = Decoder(glue=lambda number, x: x + noise[number])
    assert chains(model, {"input_ids": tokens()}) == [["blocks.0", "blocks.1"]]
    inputs: list[Tensor] = []
    handle = model.blocks[1].mlp.down.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    model(tokens())
    handle.remove()
    found = calibrate(model, {"input_ids": tokens()})
    torch.testing.assert_close(found.groups["blocks.1.mlp.down"].x_mean, inputs[0].abs().mean((0, 1)))


@pytest.mark.parametrize("glue", [lambda number, x: x * 1.5, lambda number, x: x.flip(1), lambda number, x: x.mul_(1.1)])
def test_other_glue_makes_one_block_of_the_model(glue: Callable[[int, Tensor], Tensor]) -> None:
    model = Decoder(glue=glue)
    assert chains(model, {"input_ids": tokens()}) == []
    found = calibrate(model, {"input_ids": tokens()})
    assert {g.block for g in found.groups.values()} == {""}
    assert len(found.grids) == 2 * 7 + 1


def test_outer_residual_and_bare_linears() -> None:
    for model, batch in (
        (OuterResidual(), {"input_ids": tokens()}),
        (nn.Sequential(nn.Linear(WIDTH, 48), nn.ReLU(), nn.Linear(48, 16)), (torch.randn(6, WIDTH),)),
    ):
        assert chains(model, batch) == []
        found = calibrate(model, batch)
        assert set(found.grids) == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert all(g.loss <= g.rounding_loss for g in found.groups.values())


def test_blocks_that_return_tuples_and_sequential_blocks() -> None:
    assert chains(Decoder(partial(Block, returns_tuple=True)), {"input_ids": tokens()}) == [["blocks.0", "blocks.1"]]
    assert chains(nn.Sequential(Block(), nn.Dropout(), Block()), torch.randn(2, 5, WIDTH)) == [["0", "1", "2"]]


def test_a_whole_batch_counts_not_its_first_sample() -> None:
    """Blocks return a plain tensor: element 0 of it would be one sample."""
    model = Decoder()
    found = calibrate(model, {"input_ids": tokens(batch=5)})
    assert len(found.token_weights("blocks.0.mlp").weights) == 5


# Groups and folds


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (Block, {"attention": ("norm", "norm1"), "attention.o": ("linear", "attention.v"), "mlp": ("norm", "norm2"), "mlp.down": ("linear", "mlp.up")}),
        (
            partial(Block, kv_heads=2),
            {"attention": ("norm", "norm1"), "attention.o": ("act_pre_scale", ""), "mlp": ("norm", "norm2"), "mlp.down": ("linear", "mlp.up")},
        ),
        (
            partial(Block, kv_heads=1, fused=True),
            {"attention.qkv": ("norm", "norm1"), "attention.o": ("act_pre_scale", ""), "mlp": ("norm", "norm2"), "mlp.down": ("linear", "mlp.up")},
        ),
        (
            partial(Block, fused=True, mlp=partial(MLP, fused=True), norm=partial(nn.LayerNorm, WIDTH)),
            {
                "attention.qkv": ("norm", "norm1"), "attention.o": ("linear", "attention.qkv"),
                "mlp.gate_up": ("norm", "norm2"), "mlp.down": ("linear", "mlp.gate_up"),
            },
        ),
        (
            partial(Block, norm=partial(RMSNorm, offset=1.0)),
            {
                "attention": ("offset norm", "norm1"), "attention.o": ("linear", "attention.v"),
                "mlp": ("offset norm", "norm2"), "mlp.down": ("linear", "mlp.up"),
            },
        ),
        (ParallelBlock, {"": ("norm", "norm"), "attention.o": ("linear", "attention.v"), "mlp.down": ("linear", "mlp.up")}),
        (GatedBlock, {"mlp": ("act_pre_scale", ""), "mlp.down": ("linear", "mlp.up")}),
    ],
    ids=["plain", "grouped-query", "multi-query fused", "all fused", "offset norms", "parallel", "norm feeds more"],
)  # fmt: skip
def test_groups_and_folds(block: Callable[[], nn.Module], expected: dict[str, tuple[str, str]]) -> None:
    model = Decoder(block)
    found = calibrate(model, {"input_ids": tokens()})
    assert folds(found, "blocks.0") == expected


def test_published_groups_of_real_architectures() -> None:
    """Llama's heads are not grouped: its o_proj folds; Gemma's four norms; experts in 3-D parameters are left alone."""
    (model, inputs), attention, mlp = llama(), "self_attn", "mlp"
    found = calibrate(model, inputs)
    assert [folds(found)[f"{attention}.o_proj"], folds(found)[attention]] == [("linear", "self_attn.v_proj"), ("norm", "input_layernorm")]
    model, inputs = gemma3()
    found = calibrate(model, inputs)
    assert [folds(found)[attention], folds(found)[mlp]] == [("offset norm", "input_layernorm"), ("offset norm", "pre_feedforward_layernorm")]
    model, inputs = qwen3_moe()
    assert all("self_attn" in n for n in calibrate(model, inputs).grids)


def test_partly_chosen_group_leaves_the_norm_alone() -> None:
    """k is not quantized, so the norm that feeds it must stay."""
    model, batch = Decoder(), {"input_ids": tokens()}
    found = torchao_qig.calibrate(model, [batch], QUICK(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and not name.endswith("attention.k"))
    assert found.groups["blocks.0.attention"].linears == ["blocks.0.attention.q", "blocks.0.attention.v"]
    assert found.groups["blocks.0.attention"].fold_kind == "act_pre_scale"
    assert found.groups["blocks.0.mlp"].fold_kind == "norm"


def test_producer_that_is_not_quantized_is_left_alone() -> None:
    model, batch = Decoder(), {"input_ids": tokens()}
    found = torchao_qig.calibrate(model, [batch], QUICK(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and not name.endswith("mlp.up"))
    assert found.groups["blocks.0.mlp.down"].fold_kind == "act_pre_scale"


def test_shared_norm_is_left_alone() -> None:
    """Two blocks with one norm: what suits one would hurt the other."""
    model = Decoder()
    model.blocks[1].norm1 = model.blocks[0].norm1
    found = calibrate(model, {"input_ids": tokens()})
    assert found.groups["blocks.0.attention"].fold_kind == found.groups["blocks.1.attention"].fold_kind == "act_pre_scale"
    assert found.groups["blocks.1.mlp"].fold_kind == "norm"


def test_no_folding_on_request() -> None:
    found = calibrate(Decoder(), {"input_ids": tokens()}, steps=[Equalize(grid=4, fold=False)])
    assert {g.fold_kind for g in found.groups.values()} == {"act_pre_scale"}


@given(
    st.integers(0, 2**31),
    st.sampled_from([Block, ParallelBlock, partial(Block, norm=partial(RMSNorm, offset=1.0)), partial(Block, fused=True, mlp=partial(MLP, fused=True))]),
)
def test_folding_is_exact(seed: int, block: Callable[[], nn.Module]) -> None:
    """Any positive scales, folded and unfolded: the float function stays the same, to float64 rounding."""
    torch.manual_seed(seed)
    model, ids = _calibrated(block)
    copied, found = copy.deepcopy(model[0]), copy.deepcopy(model[1])
    for group in found.groups.values():
        group.scale = torch.exp(torch.randn(len(group.scale)))
    targets = {n: QUICK().form for n in found.grids}
    with torch.no_grad():
        expected = copied(ids)
        scaled = Draft(copied, "", targets, found.groups.values()).module(copied, torch.device("cpu"), rest="exact")
        torch.testing.assert_close(scaled(ids), expected, rtol=1e-9, atol=1e-9)


_cache: dict[Any, Any] = {}


def _calibrated(block: Callable[[], nn.Module]) -> tuple[tuple[nn.Module, torchao_qig.Calibration], Tensor]:
    key = repr(block)
    if key not in _cache:
        model = Decoder(block, layers=1).double()
        _cache[key] = model, calibrate(model, {"input_ids": tokens()})
    return _cache[key], tokens()


def test_blocks_that_write_in_place() -> None:
    """What was recorded is what ran: the same as for the same function without in-place operations."""
    model, batch = Decoder(InPlaceBlock), {"input_ids": tokens()}
    copied = copy.deepcopy(model)
    for block in copied.blocks:
        block.__class__ = WrittenOut
        block.act = nn.ReLU()
    found, expected = calibrate(model, batch), calibrate(copied, batch)
    assert list(found.groups) == list(expected.groups)
    for label, group in found.groups.items():
        torch.testing.assert_close(group.scale, expected.groups[label].scale)
        assert group.losses == pytest.approx(expected.groups[label].losses, rel=1e-4)


class WrittenOut(InPlaceBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + (self.fc2(self.act(self.fc1(y))) + self.attention(y)[0])


def test_cross_attention_and_odd_linears(caplog: pytest.LogCaptureFixture) -> None:
    """Keys and values of a memory stand alone; a linear that does more is left as it is, and named."""
    model, batch = Decoder(CrossBlock), {"input_ids": tokens()}
    found = calibrate(model, batch)
    assert {"blocks.0.attention.k", "blocks.0.attention.v", "blocks.0.q"} <= set(found.groups)
    assert "blocks.0.odd" not in found.grids
    assert "do more than a linear: blocks.0.odd" in caplog.text
    assert len(found.token_weights("blocks.0.attention.k").weights[0]) == 5
    quantize_(model, QUICK(calib=found))
    assert torch.isfinite(model(tokens())).all()


# Mixtures of experts


def test_experts_as_modules() -> None:
    """Groups per expert; token weights of routed tokens, found again among the samples; nobody counts padding."""
    model = Decoder(partial(Block, mlp=Experts))
    ids, mask = tokens(), torch.ones(4, 10, dtype=torch.long)
    mask[1, 6:] = 0
    found = calibrate(model, {"input_ids": ids, "attention_mask": mask})
    experts = [label for label in found.groups if label.startswith("blocks.0.mlp.experts.") and not label.endswith("down")]
    assert len(experts) == 3
    routed = torch.stack([torch.stack(found.token_weights(label).weights) for label in experts])
    assert routed.shape == (3, 4, 10)
    assert not routed[:, 1, 6:].any()
    assert ((routed > 0).sum(0)[mask.bool()] == 2).all()  # every token went to two experts
    sums = routed.sum(-1)
    torch.testing.assert_close(sums[sums > 0], torch.ones(int((sums > 0).sum())))
    assert {found.groups[label].fold_kind for label in experts} == {"act_pre_scale"}
    assert found.groups["blocks.0.mlp.experts.0.down"].fold_into == "blocks.0.mlp.experts.0.up"


def test_expert_that_no_token_reaches(caplog: pytest.LogCaptureFixture) -> None:
    """It is rounded to nearest, and said to be."""
    model = Decoder(partial(Block, mlp=Experts), layers=1)
    with torch.no_grad():
        model.blocks[0].mlp.router[2] = 0
        model.blocks[0].mlp.router[:2] *= 0.01
        model.blocks[0].mlp.router[2, 0] = -1e4
        model.blocks[0].norm2.weight[0] = 1.0
        model.embed.weight[:, 0] = 5.0
        for p in model.blocks[0].attention.o.parameters():
            p[0] = 0
    quantize_(model, QUICK(calib=[{"input_ids": tokens()}]))
    assert "blocks.0.mlp.experts.2.down" in caplog.text
    assert isinstance(model.blocks[0].mlp.experts[2].down.weight, PackedIntTensor)


def test_expert_parameters_can_be_quantized_besides() -> None:
    """3-D parameters by FqnToConfig, linears calibrated, in one call."""
    from torchao.quantization import FqnToConfig

    model, inputs = qwen3_moe()
    plain = PackedIntWeightOnlyConfig(bits=4, group_size=32)
    config = FqnToConfig({r"re:.*self_attn\..*_proj": QUICK(calib=[inputs]), r"re:.*experts\.(gate_up|down)_proj": plain})
    quantize_(model, config, filter_fn=None)
    layer = model.model.layers[0]
    assert (layer.self_attn.q_proj.weight.bits, layer.mlp.experts.gate_up_proj.bits) == (3, 4)
    assert torch.isfinite(model(**inputs).logits).all()
