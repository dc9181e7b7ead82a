"""The search as pure functions: candidates, losses, the two ways to search."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchao_qig.methods import search

SEEDS = st.integers(0, 2**31)


@given(SEEDS, st.integers(2, 40), st.integers(1, 30))
def test_candidate_scales(seed: int, channels: int, grid: int) -> None:
    """Positive, centred (largest times smallest is 1), all ones for ratio 0, in the order of the inputs' magnitudes."""
    magnitudes = torch.randn(channels, generator=torch.Generator().manual_seed(seed)).exp()
    ratios = search.ratios(grid)
    assert ratios[0] == 0
    assert max(ratios) < 1
    for ratio in ratios:
        scale = search.scale_for(magnitudes, ratio)
        assert (scale > 0).all()
        assert (scale.max() * scale.min()).item() == pytest.approx(1, rel=1e-4)
        assert (scale[magnitudes.argsort()].diff() >= 0).all()
    assert torch.equal(search.scale_for(magnitudes, 0.0), torch.ones(channels))


@pytest.mark.parametrize("magnitudes", [torch.zeros(5), torch.tensor([0.0, 1e-30, 1.0, 1e30])])
def test_dead_and_huge_channels(magnitudes: torch.Tensor) -> None:
    for ratio in search.ratios(20):
        assert torch.isfinite(search.scale_for(magnitudes, ratio)).all()


@given(SEEDS, st.integers(1, 12), st.integers(1, 9), st.integers(1, 7))
def test_gram_matrix_gives_the_weighted_squared_error(seed: int, tokens: int, inputs: int, outputs: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, difference, weights = torch.randn(2, tokens, inputs, generator=g), torch.randn(outputs, inputs, generator=g), torch.rand(2, tokens, generator=g)
    direct = ((x @ difference.T).square().mean(-1) * weights).sum()
    torch.testing.assert_close(search.gram_loss(search.gram(x, weights), difference), direct, rtol=1e-3, atol=1e-4)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.sampled_from([2, 3]))
def test_searches(losses: list[float], stride: int) -> None:
    """Exhaustive: the smallest loss, the first of equals. Coarse: never above candidate 0, and every loss that it gives is true."""

    def evaluate(candidates: list[int], on_part: bool) -> list[float]:
        return [losses[k] for k in candidates]

    winner, found = search.exhaustive(evaluate, len(losses))
    assert found == dict(enumerate(losses))
    assert winner == losses.index(min(losses))
    winner, found = search.coarse(evaluate, len(losses), stride)
    assert found[winner] == losses[winner] <= losses[0] == found[0]


@given(st.integers(0, 19), st.floats(0.1, 3), st.sampled_from([2, 3]))
def test_coarse_search_finds_the_bottom_of_a_valley(bottom: int, steepness: float, stride: int) -> None:
    """And a part of the samples that misjudges plain rounding does no harm."""

    def evaluate(candidates: list[int], on_part: bool) -> list[float]:
        return [abs(k - bottom) ** steepness + (100 if on_part and k == 0 else 0) for k in candidates]

    winner, _ = search.coarse(evaluate, 20, stride)
    assert winner == bottom


def test_looks_at_fewer_candidates() -> None:
    seen: list[tuple[int, bool]] = []

    def evaluate(candidates: list[int], on_part: bool) -> list[float]:
        seen.extend((k, on_part) for k in candidates)
        return [abs(k - 7.0) for k in candidates]

    search.coarse(evaluate, 20)
    assert sum(on_part for _, on_part in seen) <= 14
    assert sum(not on_part for _, on_part in seen) == 2


def test_gram_is_chosen_by_cost() -> None:
    assert search.gram_is_cheaper(tokens=10_000, outputs=900, inputs=900, candidates=20)
    assert not search.gram_is_cheaper(tokens=100, outputs=100, inputs=4_000, candidates=2)
