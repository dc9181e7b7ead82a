"""The evaluation against a plain loop, and its intervals."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from recipes.evaluate import Answers, answer, batches, difference, interval, scores, table
from recipes.methods import calibration_batches, quantized
from recipes.small_lvlm.data import FAMILIES, chosen
from recipes.small_lvlm.model import inputs
from tests.untrained import small


def test_fifty_questions_one_by_one() -> None:
    """Accuracy by really generating, NLL and KL by feeding each answer alone."""
    tokenizer, full = small()
    model = quantized(full, tokenizer, "rtn", bits=3, group_size=128)[0]
    samples = list(chosen("test", 10))
    reference: list[Tensor] = []
    answer(full, batches(samples, tokenizer, 4), keep=reference, progress=False)
    found = answer(model, batches(samples, tokenizer, 4), reference, progress=False)
    assert len(found.family) == 50
    asked = [(one, question) for one in samples for question in one.questions]
    for i, (one, question) in enumerate(asked):
        prompt = inputs(tokenizer, [one.pixels], [question.text])
        batch = inputs(tokenizer, [one.pixels], [question.text], [question.answer])
        labels = batch.pop("labels")[:, 1:]
        with torch.no_grad():
            new = model.generate(**prompt, max_new_tokens=batch["input_ids"].shape[1] - prompt["input_ids"].shape[1], do_sample=False)
            new = new[0, prompt["input_ids"].shape[1] :]
            p, q = (m(**batch).logits[:, :-1].log_softmax(-1)[labels != -100] for m in (full, model))
        wanted = labels[labels != -100]
        assert bool(found.correct[i]) == (new.tolist() == wanted.tolist())
        assert found.tokens[i] == len(wanted)
        torch.testing.assert_close(found.nll[i], -q.gather(1, wanted[:, None]).sum().double(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.kl[i], (p.exp() * (p - q)).sum().double(), rtol=1e-3, atol=1e-4)
        assert found.family[i] == question.family


def test_wrong_pictures_and_other_batches() -> None:
    tokenizer, full = small()
    samples = list(chosen("validation", 24))
    right = answer(full, batches(samples, tokenizer, 16), progress=False)
    other = answer(full, batches(samples, tokenizer, 5), progress=False)
    wrong = answer(full, batches(samples, tokenizer, 8), shuffle=True, progress=False)
    torch.testing.assert_close(right.nll, other.nll, rtol=1e-3, atol=1e-4)
    assert torch.equal(right.picture, other.picture)
    assert (wrong.nll - right.nll).abs().median() > 1e-3  # the pictures matter


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 3), st.integers(1, 4)), min_size=1, max_size=40))
def test_interval(rows: list[tuple[int, float, int]]) -> None:
    picture, values, weights = (torch.tensor(column) for column in zip(*rows, strict=True))
    mean, low, high = interval(values, weights, picture)
    assert abs(mean - float(values.double().sum() / weights.sum())) < 1e-6
    assert low - 1e-6 <= mean <= high + 1e-6 or len(set(picture.tolist())) > 1  # one picture: no spread
    assert low <= high
    if len(set(picture.tolist())) == 1:
        assert high - low < 1e-9


def test_interval_covers() -> None:
    """Of 200 experiments about 190 intervals hold the truth; pictures with alike questions widen them."""
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        level = torch.rand(60, 1, generator=generator)
        answers = (torch.rand(60, 5, generator=generator) < level).double()
        _, low, high = interval(answers.flatten(), torch.ones(300), torch.arange(60).repeat_interleave(5))
        hits += low <= 0.5 <= high
    assert 180 <= hits <= 199


def test_difference_is_paired() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 400
    base = torch.rand(n, generator=generator, dtype=torch.float64) * 5
    family, picture, tokens = [FAMILIES[i % 6] for i in range(n)], torch.arange(n) // 4, torch.ones(n)
    a, b = (Answers(family, picture, tokens, tokens, base + shift, base) for shift in (0.1, 0.0))
    mean, low, high = difference(a, b, "nll")
    assert abs(mean - 0.1) < 1e-9
    assert high - low < 1e-9  # though each alone varies by 5
    assert difference(a, a, "nll") == (0, 0, 0)


def test_table_names_everything() -> None:
    n = 12
    ones = torch.ones(n)
    result = scores(Answers([*FAMILIES, *FAMILIES], torch.arange(n), ones, ones, 0.5 * ones, torch.full((n,), torch.nan)))
    text = table({"full": result})
    assert all(family in text for family in FAMILIES)
    assert "100.0 [100.0, 100.0]" in text
    assert "0.5000" in text
    assert "kl" not in result["all"]


def test_calibration_samples_differ_by_seed() -> None:
    tokenizer, _ = small()
    one, again, other = (calibration_batches(tokenizer, 8, seed, size=4) for seed in (0, 0, 1))
    assert [len(batch["input_ids"]) for batch in one] == [4, 4]
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(one, other, strict=True))
    assert all(bool((batch["labels"] != -100).any(1).all()) for batch in one)
