"""Bits under a budget: never above it, the best by brute force, complete contributions, and what the model then gets."""

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchao.quantization import FqnToConfig, quantize_

import torchao_qig
from tests.calibration.test_run import assert_untouched, build, state_of
from tests.plain_models import tokens
from tests.test_qig import FAMILIES, packed, run
from torchao_qig import Calibration, Compensate, Equalize, QIGWeightOnlyConfig
from torchao_qig.methods.allocate import BITS, contributions, costs, difference, smoothed, solve, units_of
from torchao_qig.watch.batches import read

QUICK = partial(QIGWeightOnlyConfig, bits="auto", budget=3.0, group_size=16, steps=[Equalize(grid=4)], verbose=False)
tables = st.integers(1, 4).flatmap(
    lambda rows: st.tuples(
        st.lists(st.lists(st.floats(0, 10), min_size=3, max_size=3), min_size=rows, max_size=rows),
        st.lists(st.integers(1, 60), min_size=rows, max_size=rows),
        st.integers(0, 800),
        st.integers(0, 300),
    )
)


def total(cost: torch.Tensor, chosen: list[int]) -> float:
    return float(sum(cost[r, c] for r, c in enumerate(chosen)))


@settings(max_examples=300)
@given(tables)
def test_knapsack(table: tuple[list[list[float]], list[int], int, int]) -> None:
    """Against all choices there are; a larger budget is never used worse; too small a one is an error."""
    values, sizes, budget, more = table
    cost, price = torch.tensor(values, dtype=torch.float64), torch.tensor([[size * b for b in (2, 3, 5)] for size in sizes])
    if budget < int(price.amin(1).sum()):
        with pytest.raises(ValueError, match="budget"):
            solve(cost, price, budget)
        return
    chosen = solve(cost, price, budget)
    assert sum(int(price[r, c]) for r, c in enumerate(chosen)) <= budget
    every = itertools.product(range(3), repeat=len(sizes))
    best = min(total(cost, c) for c in every if sum(int(price[r, i]) for r, i in enumerate(c)) <= budget)
    assert total(cost, chosen) == pytest.approx(best, abs=1e-9)
    assert total(cost, solve(cost, price, budget + more)) <= total(cost, chosen) + 1e-9
    assert solve(cost, price, budget) == chosen


@settings(max_examples=30)
@given(st.integers(0, 2**20), st.floats(2.0, 8.0), st.floats(0, 3))
def test_knapsack_with_prices_rounded_up(seed: int, average: float, more: float) -> None:
    """Prices of no common divisor: the budget holds, and more of it is never worse."""
    g = torch.Generator().manual_seed(seed)
    size = torch.randint(10**6, 10**9, (40, 1), generator=g)
    cost, price = torch.rand(40, 8, generator=g, dtype=torch.float64).sort(1, descending=True).values, size * torch.tensor(BITS)
    budgets = [int(b * int(size.sum())) for b in (average, average + more)]
    found = [solve(cost, price, b) for b in budgets]
    for chosen, budget in zip(found, budgets, strict=True):
        assert sum(int(price[r, c]) for r, c in enumerate(chosen)) <= budget
    assert total(cost, found[1]) <= total(cost, found[0]) + 1e-9


def parts(model: nn.Module, batches: list[Any], bits: int) -> tuple[list[tuple[str, ...]], torch.Tensor, float]:
    """Units, their contributions, and the divergence of the model with all of them rounded."""
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks")}
    every = list(read(model, batches))
    units = units_of(model, [f"blocks.{i}" for i in range(len(model.blocks))], linears, every[0])
    found = contributions(model, every, units, lambda name, w: difference(w, QUICK().with_bits(bits).form))
    rounded = copy.deepcopy(model)
    for name in linears:
        weight = rounded.get_submodule(name).weight.data
        weight += difference(weight, QUICK().with_bits(bits).form)
    with torch.no_grad():
        outs = [(model(*b.args, **b.kwargs), rounded(*b.args, **b.kwargs)) for b in every]
    scale = [float(a.square().mean()) for a, _ in outs]
    rows = sum(len(a) for a, _ in outs)
    return units, found, sum(float((a - b).square().sum()) / s for (a, b), s in zip(outs, scale, strict=True)) / rows


def test_contributions_add_up() -> None:
    """To the divergence at the end of the path; linears that share an input are one unit."""
    model = build(3)
    units, found, divergence = parts(model, [tokens(4, 10), tokens(3, 7)], 4)
    assert ("blocks.0.attention.q", "blocks.0.attention.k", "blocks.0.attention.v") in units
    assert len(units) == 12
    assert float(found.sum()) == pytest.approx(divergence, rel=0.02)


@settings(max_examples=100)
@given(st.integers(1, 12), st.integers(0, 2**20))
def test_smoothing_of_costs(units: int, seed: int) -> None:
    """What all units cost together stays; contributions that follow the squared errors exactly stay whole."""
    g = torch.Generator().manual_seed(seed)
    errors = torch.rand(units, 7, generator=g, dtype=torch.float64).add(0.1) * 4.0 ** -torch.arange(7)
    matters, level = torch.rand(units, 1, generator=g, dtype=torch.float64) + 0.1, torch.rand(3, generator=g, dtype=torch.float64) + 0.5
    exact = matters * errors[:, :3] * level
    found = smoothed(exact, errors)
    torch.testing.assert_close(found[:, :3], exact)
    torch.testing.assert_close(found[:, 3:], matters * errors[:, 3:] * level[-1])
    noisy = exact * torch.rand(units, 3, generator=g, dtype=torch.float64)
    torch.testing.assert_close(smoothed(noisy, errors)[:, :3].sum(0), noisy.sum(0))
    assert (smoothed(torch.zeros(units, 3, dtype=torch.float64), errors) == 0).all()


def test_what_matters_gets_a_larger_part() -> None:
    """A block whose output is multiplied down contributes less; more bits cost less in every unit."""
    model = build(2)
    with torch.no_grad():
        for linear in (model.blocks[0].mlp.down, model.blocks[0].attention.o):
            linear.weight *= 1e-3
    units, found, _ = parts(model, [tokens(4, 10)], 3)
    part = dict(zip(units, found.tolist(), strict=True))
    assert part["blocks.0.mlp.down",] < 0.01 * part["blocks.1.mlp.down",]
    cost = costs(model, list(read(model, [tokens(4, 10)])), units, lambda name, bits: QUICK().with_bits(bits).form)
    assert (cost[:, :-1] >= cost[:, 1:]).all()
    assert (cost[:, -1] == 0).all()


def test_auto(tmp_path: Path) -> None:
    """Within the budget, better than the same bits everywhere, saved with the calibration, and editable."""
    model, batches = build(3), [tokens(8, 16, seed) for seed in range(3)]
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block.mlp.down.weight *= 0.03**i
            block.attention.o.weight *= 0.03**i
    before = state_of(model)
    found = torchao_qig.calibrate(model, batches, QUICK())
    assert_untouched(model, before)
    linears = {n: m.weight.numel() for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks")}
    bits = {n: found.grids[n][0] if n in found.grids else 16 for n in linears}
    assert sum(bits[n] * size for n, size in linears.items()) <= 3 * sum(linears.values())
    assert len(set(bits.values())) > 1
    assert bits["blocks.0.mlp.down"] > bits["blocks.2.mlp.down"]
    found.save(tmp_path)
    one, two, uniform = (copy.deepcopy(model) for _ in range(3))
    quantize_(one, QUICK(calib=batches))
    quantize_(two, QUICK(calib=Calibration.load(tmp_path)))
    quantize_(uniform, QUICK(bits=3, budget=None, calib=batches))
    assert {n: w.bits for n, w in packed(one).items()} == {n: grid[0] for n, grid in found.grids.items()}
    outs = [run(m, {"input_ids": batches[0]}) for m in (one, two, uniform, model)]
    assert torch.equal(outs[0], outs[1])
    assert (outs[0] - outs[3]).square().sum() < 0.7 * (outs[2] - outs[3]).square().sum()

    edited = {**bits, "blocks.1.mlp.down": 16, "blocks.2.mlp.down": 8}
    quantize_(model, QUICK(bits=edited, budget=None, calib=batches))
    assert {n: w.bits for n, w in packed(model).items()} == {n: b for n, b in edited.items() if b < 16}


def test_max_bytes() -> None:
    """Scales and zero points count."""
    model, batches = build(2), [tokens(4, 10)]
    whole = sum(m.weight.numel() * 4 for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks"))
    quantize_(model, QUICK(budget=None, max_bytes=whole // 5, calib=batches))
    kept = sum(m.weight.numel() * 4 for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith("blocks") and n not in packed(model))
    assert whole // 6 < kept + sum(w.nbytes_packed() for w in packed(model).values()) <= whole // 5 + 40 * 32 * len(packed(model))  # tiles of 16 rows


WHOLE: dict[str, Any] = {"modules": ["vision_tower", "multi_modal_projector", "language_model"], "steps": [Compensate()]}


@pytest.mark.parametrize(("family", "settings"), [("llava_onevision", {}), ("qwen2", {}), ("llava_onevision", WHOLE)])
def test_families(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Logits of a transformers model; every linear's bits come back from the checkpoint. The vision tower and the projector on request."""
    model, inputs = FAMILIES[family]()
    quantize_(model, QUICK(budget=4.0, group_size=16, calib=[inputs], **settings))
    parts = {n.split(".")[1] for n in packed(model) if family != "qwen2"}
    assert parts <= set(settings.get("modules", ["language_model"]))
    assert not settings or "vision_tower" in parts
    logits = run(model, inputs)
    torchao_qig.save_pretrained(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(run(loaded, inputs), logits)
    assert {n: w.bits for n, w in packed(loaded).items()} == {n: w.bits for n, w in packed(model).items()}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"bits": "auto", "budget": None}, "'auto' takes one of"),
        ({"bits": "auto", "budget": 3.0, "max_bytes": 10}, "'auto' takes one of"),
        ({"bits": 3, "budget": 3.0}, "'auto' takes one of"),
        ({"bits": "auto", "budget": 1.0}, r"budget=1\.0"),
        ({"bits": "all"}, "bits='all'"),
        ({"bits": {"a": 9}, "budget": None}, "bits=9"),
        ({"bits": {"blocks.0.attention.q": 4, "nobody": 4}, "budget": None}, "nobody"),
        ({"budget": None, "max_bytes": 10}, "budget: the smallest choice takes"),
        ({"calib": None}, "needs calib="),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    model = build(1)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        quantize_(model, QUICK(**{"calib": [tokens(2, 6)], **arguments}))
    assert_untouched(model, before)


def test_inside_other_configs() -> None:
    model = build(1)
    with pytest.raises(ValueError, match="pass such a config to quantize_ itself"):
        quantize_(model, FqnToConfig({"re:.*mlp.*": QUICK(calib=[tokens(2, 6)])}), filter_fn=None)
