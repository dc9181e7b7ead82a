"""Calibration with int8 activations: samples, ranks and interruptions, odd blocks, what the formulas say."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchao.quantization import quantize_

import torchao_qig
from tests.plain_models import Block, CrossBlock, Decoder, Experts, tokens
from tests.ranks import in_ranks
from tests.test_qig import packed, run
from tests.test_w4a8 import called, plain
from tests.tiny_models import llama, qwen2
from torchao_qig import QIG, Calibration, Compensate, Equalize, QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig, Running, Smooth
from torchao_qig.calibration.chain import ChainRun
from torchao_qig.methods import Step
from torchao_qig.methods.draft import Draft

SCALES = partial(Equalize, grid=6)
QUICK = partial(QIGInt8DynamicActivationConfig, steps=[SCALES()], verbose=False)
WAYS: dict[str, list[Step]] = {"qig": [SCALES(search="exhaustive")], "smoothquant": [Smooth(alpha=0.5)]}


@settings(max_examples=10)
@given(st.permutations(range(4)), st.sampled_from([1, 2, None]))
def test_order_and_pieces_do_not_matter(order: list[int], micro_batch: int | None) -> None:
    """The same scales whatever batches the samples come in, but for an activation that rounds to the other side."""
    model, inputs = plain()
    whole = torchao_qig.calibrate(model, [inputs], QUICK())
    parts = [{k: v[i : i + 1] for k, v in inputs.items()} for i in order]
    again = torchao_qig.calibrate(model, parts, QUICK(running=Running(micro_batch=micro_batch)))
    for label, group in whole.groups.items():
        torch.testing.assert_close(again.groups[label].x_mean, group.x_mean, rtol=1e-3, atol=1e-5)
        same = {k: v for k, v in again.groups[label].losses.items() if k in group.losses}
        assert 0 in same
        assert all(v == pytest.approx(group.losses[k], rel=2e-2) for k, v in same.items())


def test_smoothquant_is_its_formula() -> None:
    """max |x| ** alpha / max |W| ** (1 - alpha), per channel, over the linears of a group; the function stays."""
    model, inputs = qwen2()
    alpha = 0.7
    found = torchao_qig.calibrate(model, [inputs], QUICK(steps=[Smooth(alpha=alpha)]))
    seen: dict[str, Tensor] = {}
    for name, m in model.named_modules():
        if name in found.grids:
            m.register_forward_pre_hook(lambda m, args, name=name: seen.__setitem__(name, args[0].abs().flatten(0, -2).amax(0)))
    exact = run(model, inputs)
    assert found.groups
    for group in found.groups.values():
        widest = torch.stack([model.get_submodule(n).weight.detach().abs().amax(0) for n in group.linears]).amax(0)
        torch.testing.assert_close(group.scale, seen[group.linears[0]] ** alpha / widest ** (1 - alpha))
        assert group.ratio == alpha
        assert set(group.losses) == {0, 1}
    quantize_(model, QUICK(bits=8, steps=[Smooth(alpha=alpha)], calib=[inputs]))
    assert (run(model, inputs) - exact).abs().max() < 0.05 * exact.abs().max()


def test_the_first_group_has_no_path() -> None:
    """Before the first rounding both inputs are one: the published weights are zero and choose nothing, ours are uniform."""
    model, inputs = llama()
    label = "model.layers.0.self_attn"
    paper = torchao_qig.calibrate(model, [inputs], QIGInt8DynamicActivationConfig.paper(verbose=False))
    assert not torch.stack(paper.tokens[label]).any()
    assert paper.groups[label].winner == 0
    ours = torchao_qig.calibrate(model, [inputs], QUICK(steps=[SCALES(grid=20)]))
    weights = torch.stack(ours.tokens[label])
    assert torch.equal(weights, torch.full_like(weights, 1 / weights.shape[1]))
    later = torch.stack(ours.tokens["model.layers.1.mlp"])
    assert later.std() > 0.03 * later.mean()


def test_compensation_sees_rounded_activations() -> None:
    """The integers are those that serve rounded inputs: better there than integers chosen for exact ones."""
    model, inputs = plain()
    with torch.no_grad():
        for block in model.blocks:  # activations that eight bits hold badly
            block.mlp.down.weight[:, ::7] *= 0.02
            block.mlp.up.weight[::7] *= 50
    exact = called(model, inputs)
    models = [copy.deepcopy(model) for _ in range(2)]
    quantize_(models[0], QUICK(steps=[Compensate()], calib=[inputs]))
    quantize_(models[1], QIGWeightOnlyConfig(bits=4, group_size=-1, symmetric=True, verbose=False, calib=[inputs]))
    for w in packed(models[1]).values():
        w.int8_activations = True
    errors = [float((called(m, inputs) - exact).square().mean()) for m in models]
    assert errors[0] < errors[1]


def _rank(rank: int, directory: str, batches: list[Tensor]) -> None:
    torch.set_num_threads(1)
    for name, steps in WAYS.items():
        torchao_qig.calibrate(plain()[0], batches, QUICK(steps=steps)).save(f"{directory}/{name} {rank}")


def test_ranks(tmp_path: Path) -> None:
    """Samples split over two ranks: what one would have found, largest inputs included."""
    batches = [tokens(2, 8, 1), tokens(3, 8, 2), tokens(1, 8, 3), tokens(2, 8, 4)]
    in_ranks(_rank, 2, tmp_path, str(tmp_path), batches)
    for name, steps in WAYS.items():
        alone = torchao_qig.calibrate(plain()[0], batches, QUICK(steps=steps))
        for rank in range(2):
            found = Calibration.load(tmp_path / f"{name} {rank}")
            for label, group in alone.groups.items():
                assert list(found.groups[label].losses.values()) == pytest.approx(list(group.losses.values()), rel=2e-2)
                if found.groups[label].winner == group.winner:
                    torch.testing.assert_close(found.groups[label].scale, group.scale, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("compensate", [False, True])
def test_killed_calibration_continues(compensate: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bits: both streams are kept; and so with activations in files."""
    model, inputs = plain()
    way = partial(QUICK, steps=[SCALES("qig"), Compensate("qig")] if compensate else [SCALES("qig")])
    whole = torchao_qig.calibrate(model, [inputs], way())
    original, blocks = ChainRun.run_block, []

    def dying(self: ChainRun, name: str) -> Any:
        blocks.append(name)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return original(self, name)

    monkeypatch.setattr(ChainRun, "run_block", dying)
    with pytest.raises(KeyboardInterrupt):
        torchao_qig.calibrate(model, [inputs], way(checkpoint_dir=tmp_path))
    again = torchao_qig.calibrate(model, [inputs], way(checkpoint_dir=tmp_path))
    assert len(blocks) == 2 + len(model.blocks) - 1
    in_files = torchao_qig.calibrate(model, [inputs], way(running=Running(max_host_memory=0)))
    for found in (again, in_files):
        for label, group in whole.groups.items():
            assert torch.equal(found.groups[label].scale, group.scale)
            assert found.groups[label].losses == group.losses
        assert found.weights.keys() == whole.weights.keys()
        assert all(torch.equal(found.weights[n], w) and w.int8_activations for n, w in whole.weights.items())


def test_experts_that_a_router_feeds() -> None:
    """Rows that the router sends elsewhere once the model is quantized stay those of full precision; nothing breaks, and nothing is left out."""
    torch.manual_seed(1)
    model = Decoder(partial(Block, mlp=Experts), layers=2)
    batches = [tokens(3, 9), tokens(2, 6)]
    found = torchao_qig.calibrate(model, batches, QUICK())
    routed = {label for label in found.groups if ".experts." in label}
    assert {g.weighting for label, g in found.groups.items() if label in routed and not label.endswith("down")} == {"uniform"}  # no two inputs to compare
    assert {g.weighting for label, g in found.groups.items() if label not in routed} == {"qig"}
    assert sum(g.loss for label, g in found.groups.items() if label in routed) < sum(g.rounding_loss for label, g in found.groups.items() if label in routed)
    quantize_(model, QUICK(calib=found))
    assert {n for n in packed(model) if ".experts." in n}


def test_linears_that_do_more_stay_whole() -> None:
    """One that returns a pair runs as it is in both streams, and is not quantized."""
    torch.manual_seed(2)
    model = Decoder(CrossBlock)
    ways: list[list[Step]] = [[SCALES("qig")], [Compensate()]]
    for steps in ways:
        found = torchao_qig.calibrate(model, [tokens(3, 9)], QUICK(steps=steps))
        assert found.grids
        assert not any("odd" in name for name in found.grids)
        block, linears = model.blocks[0], dict.fromkeys((n for n in found.grids if n.startswith("blocks.0.")), QUICK(steps=steps).form)
        bent = Draft(model, "", linears, found.groups.values()).module(model, torch.device("cpu"))
        x = torch.randn(2, 4, block.q.in_features)
        assert torch.equal(bent.blocks[0].odd(x)[1], block.odd(x)[1])


def test_few_points_are_enough() -> None:
    """Token weights from 8 points and from 256: as near as the published 32 are, but for a factor."""
    model, inputs = plain()

    def weights(rule: QIG) -> dict[str, Tensor]:
        found = torchao_qig.calibrate(model, [inputs], QUICK(steps=[Equalize(rule, grid=1)]))
        return {label: torch.stack(w) for label, w in found.tokens.items()}

    fine = weights(QIG("riemann", points=256))
    for label, w in weights(QIG()).items():
        assert (w - fine[label]).abs().mean() < 0.03 * fine[label].mean()
    assert any((w - fine[label]).abs().mean() > 0.03 * fine[label].mean() for label, w in weights(QIG(points=1)).items())
