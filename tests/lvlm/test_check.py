"""Divergence and evaluation against plain loops over samples and tokens."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchao.quantization import quantize_

from tests.tiny_dirs import directory
from torchao_qig import PackedIntWeightOnlyConfig, save_pretrained
from torchao_qig.integrations.transformers import has_packed
from torchao_qig.lvlm.check import BATCHES, BrokenModel, answer_positions, check, divergence, references, smallest
from torchao_qig.lvlm.data import Batches, calibration_batches
from torchao_qig.lvlm.evaluate import answers, batches_of, compare, unpacked
from torchao_qig.lvlm.load import load_model, load_processor
from torchao_qig.lvlm.samples import read_samples


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module, Batches]:
    """A model, itself at 2 bits, and batches of several samples of different lengths."""
    folder = tmp_path_factory.mktemp("check")
    directory("qwen2_vl", folder / "model")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(7):
        Image.fromarray(rng.integers(0, 255, (56, 28 + 28 * (i % 3), 3), dtype=np.uint8)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "question": "what?", "answer": "noise " * (1 + i % 2)})
    (folder / "rows.json").write_text(json.dumps(rows))
    model = load_model(str(folder / "model"))
    rounded = copy.deepcopy(model)
    blocks = rounded.model.language_model.layers
    quantize_(blocks, PackedIntWeightOnlyConfig(bits=2, group_size=64))
    return model, rounded, calibration_batches(read_samples(folder / "rows.json"), load_processor(str(folder / "model")), tokens=120)


def one_by_one(model: nn.Module, batch: dict[str, Tensor]) -> list[tuple[int, int, Tensor]]:
    """(sample, right next token, log-probabilities) of every answer token, each sample run in its batch, positions picked by hand."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "vision_mask")}
    with torch.no_grad():
        logits = model(**inputs).logits
    return [
        (row, int(batch["labels"][row, t]), logits[row, t - 1].float().log_softmax(-1))
        for row in range(len(logits))
        for t in range(1, logits.shape[1])
        if int(batch["labels"][row, t]) != -100
    ]


def test_divergence(setting: tuple[nn.Module, nn.Module, Batches]) -> None:
    model, rounded, batches = setting
    assert len(batches) > 1
    assert any(len(rows) > 1 for rows in batches.rows)
    looked_at = smallest(batches)
    assert len(looked_at) == BATCHES < len(batches)
    assert max(b["input_ids"].numel() for b in looked_at) <= min(b["input_ids"].numel() for b in batches[: len(batches) - BATCHES])
    found = divergence(references(model, looked_at), rounded, looked_at)
    every = [(p, q) for batch in looked_at for (_, _, p), (_, _, q) in zip(one_by_one(model, batch), one_by_one(rounded, batch), strict=True)]
    assert found["tokens"] == len(every)
    assert found["kl"] == pytest.approx(sum(float((p.exp() * (p - q)).sum()) for p, q in every) / len(every), rel=1e-4)
    assert found["agreement"] == pytest.approx(sum(int(p.argmax() == q.argmax()) for p, q in every) / len(every))
    assert divergence(references(model, looked_at), model, looked_at) == {"kl": 0.0, "agreement": 1.0, "tokens": len(every)}


def test_compare(setting: tuple[nn.Module, nn.Module, Batches]) -> None:
    model, rounded, batches = setting
    both = compare({"exact": model, "rounded": rounded}, batches)
    exact, found = both["exact"], both["rounded"]
    assert answers(rounded, batches) == found | {"kl": None}
    nll, kl, right, tokens, samples = 0.0, 0.0, 0, 0, 0
    for batch in batches:
        mine, theirs = one_by_one(rounded, batch), one_by_one(model, batch)
        nll -= sum(float(q[target]) for _, target, q in mine)
        kl += sum(float((p.exp() * (p - q)).sum()) for (_, _, p), (_, _, q) in zip(theirs, mine, strict=True))
        right += sum(all(int(q.argmax()) == target for r, target, q in mine if r == row) for row in range(len(batch["input_ids"])))
        tokens, samples = tokens + len(mine), samples + len(batch["input_ids"])
    assert (found["tokens"], found["samples"]) == (tokens, samples)
    assert found["nll"][0] == pytest.approx(nll / tokens, rel=1e-4)
    assert found["kl"][0] == pytest.approx(kl / tokens, rel=1e-4)
    assert found["accuracy"][0] == right / samples
    assert all(low <= mean + 1e-9 and mean <= high + 1e-9 for mean, low, high in (found["nll"], found["kl"], exact["nll"]))
    assert exact["kl"] is None


def test_a_model_that_always_answers_right_has_full_accuracy(setting: tuple[nn.Module, nn.Module, Batches]) -> None:
    """One that has the labels for logits; and one that gets a single token of a sample wrong loses that sample alone."""
    _, _, batches = setting

    class Knowing(nn.Module):
        def __init__(self, wrong: bool) -> None:
            super().__init__()
            self.weight, self.wrong = nn.Parameter(torch.zeros(1)), wrong

        def forward(self, input_ids: Tensor, **_: object) -> object:
            logits = 50 * nn.functional.one_hot(input_ids.roll(-1, 1), 200).float()
            if self.wrong:
                at = answer_positions(next(b for b in batches if torch.equal(b["input_ids"], input_ids)))
                logits[0, at[0].nonzero()[-1, 0]] = 0
            return type("Output", (), {"logits": logits})()

    assert answers(Knowing(False), batches)["accuracy"][0] == 1
    assert answers(Knowing(True), batches)["accuracy"][0] == 1 - len(batches) / sum(map(len, batches.rows))


def test_answers_or_else_all_tokens() -> None:
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    labels = torch.full_like(ids, -100)
    labels[0, 4:] = ids[0, 4:]
    assert answer_positions({"input_ids": ids, "labels": labels}).nonzero().tolist() == [[0, 3], [0, 4], *([1, t] for t in range(5))]
    assert answer_positions({"input_ids": ids, "attention_mask": mask}).sum(1).tolist() == [5, 3]
    assert answer_positions({"input_ids": ids}).sum(1).tolist() == [5, 5]
    nothing = torch.full_like(ids, -100)
    assert torch.equal(
        answer_positions({"input_ids": ids, "labels": nothing, "attention_mask": mask}), answer_positions({"input_ids": ids, "attention_mask": mask})
    )


def test_broken() -> None:
    check({"kl": 0.1, "agreement": 1.0, "tokens": 5}, 0.2)
    with pytest.raises(BrokenModel, match=r"0\.300 nats per token .* agrees on\s+50% of 5 tokens"):
        check({"kl": 0.3, "agreement": 0.5, "tokens": 5}, 0.2)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(BrokenModel, match="NaN or infinity"):
            check({"kl": bad, "agreement": 0.5, "tokens": 5}, float("inf"))


def test_texts_without_answers_have_no_accuracy(setting: tuple[nn.Module, nn.Module, Batches]) -> None:
    model, _, batches = setting
    bare = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    found = answers(model, bare)
    assert found["accuracy"] is None
    assert found["tokens"] == sum(int(batch["attention_mask"].sum()) - len(batch["input_ids"]) for batch in batches)


def test_texts_beside_questions_count_nowhere(setting: tuple[nn.Module, nn.Module, Batches]) -> None:
    """In batches of their own or together with questions."""
    _, rounded, batches = setting
    bare = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]
    mixed = []
    for batch in batches:
        labels = batch["labels"].clone()
        labels[0] = -100
        mixed.append(batch | {"labels": labels})
    alone = answers(rounded, batches)
    assert answers(rounded, [*bare, *batches]) == alone
    fewer = answers(rounded, [*mixed, *bare])
    assert fewer["samples"] == alone["samples"] - len(batches)
    assert fewer["tokens"] < alone["tokens"]


@pytest.mark.parametrize("stored, loaded", [("bfloat16", "float32"), ("float32", "bfloat16"), ("bfloat16", "auto")])
def test_unpacked_weights_say_the_same(tmp_path: Path, stored: str, loaded: str) -> None:
    """Whatever dtype the model is loaded in, to the bit."""
    directory("qwen2", tmp_path / "full", getattr(torch, stored))
    model = load_model(str(tmp_path / "full"))
    quantize_(model, PackedIntWeightOnlyConfig(bits=3, group_size=64))
    save_pretrained(model, tmp_path / "packed")
    packed, dense = (load_model(str(tmp_path / "packed"), loaded) for _ in range(2))
    assert has_packed(packed)
    assert not has_packed(unpacked(dense))
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        assert torch.equal(packed(input_ids=ids).logits, dense(input_ids=ids).logits)


def test_a_few_samples_at_a_time(setting: tuple[nn.Module, nn.Module, Batches], tmp_path: Path) -> None:
    """The same samples, however many are read at once; some that cannot be used at all are no error."""
    directory("qwen2", tmp_path / "model")
    rows = [{"image": "absent.png", "text": "x"}, *({"question": "what?", "answer": "noise " * n} for n in range(1, 6))]
    (tmp_path / "rows.json").write_text(json.dumps(rows[1:]))
    samples, processor = read_samples(tmp_path / "rows.json"), load_processor(str(tmp_path / "model"))
    one, many = ([batch for batch in batches_of(samples, processor, n)] for n in (1, 64))
    assert len(one) == 5
    assert len(many) < 5
    assert sorted(int((b["labels"] != -100).sum()) for b in one) == sorted(n for b in many for n in (b["labels"] != -100).sum(1).tolist())
