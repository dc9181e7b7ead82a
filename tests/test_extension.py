"""The proof that a new format is one file: a toy format, defined here, is calibrated, compensated, saved, loaded and compiled. Nothing else knows of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.quantization import quantize_

import torchao_qig
from tests.tiny_models import qwen2
from torchao_qig import Calibration, Compensate, Equalize, PackedIntTensor, QIGWeightOnlyConfig
from torchao_qig.formats import CodedFormat, Format, Params
from torchao_qig.methods import Step


@dataclass(frozen=True)
class Ternary(CodedFormat):
    """-s, 0 or s with one s per row, as integers of two bits: the best s for given signs is a mean of magnitudes."""

    cut: float = 0.7  # of the mean magnitude, below which a weight becomes 0

    def describe(self) -> list[Any]:
        return ["ternary", self.cut]

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        return rows * columns // 4 + rows * (dtype.itemsize + 1)

    def fit(self, weight: Tensor, dtype: torch.dtype, gram: Tensor | None = None) -> Params:
        size = weight.abs()
        kept = size > self.cut * size.mean(1, keepdim=True)
        mean = (size * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp(min=1)
        return (mean.clamp(min=torch.finfo(dtype).tiny).to(dtype),)

    def spread(self, params: Params, columns: int, dtype: torch.dtype) -> Params:
        return (params[0].to(dtype).expand(-1, columns),)

    def nearest(self, target: Tensor, spread: Params) -> tuple[Tensor, Tensor]:
        signs = torch.round(target / spread[0]).clamp(-1, 1)
        return signs + 2, signs * spread[0]

    def dense(self, codes: Tensor, params: Params, dtype: torch.dtype) -> Tensor:
        return (codes - 2).to(dtype) * params[0].to(dtype)

    def pack(self, codes: Tensor, params: Params) -> PackedIntTensor:
        return PackedIntTensor.from_codes(codes.to(torch.uint8), params[0], torch.full_like(params[0], 2), 2, -1)


STEPS: dict[str, list[Step] | None] = {
    "integers": None,
    "scales": [Equalize("qig", grid=4)],
    "both, and clipped": [Equalize("uniform", grid=4), Compensate("uniform", clip=True)],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_a_toy_format(steps: list[Step] | None, tmp_path: Path) -> None:
    """Calibrated better than rounded, planned, saved as a calibration and as a checkpoint, loaded, compiled."""
    model, inputs = qwen2()
    with torch.no_grad():
        exact = model(**inputs).logits
    config = QIGWeightOnlyConfig(format=Ternary(), verbose=False, steps=steps)
    planned = torchao_qig.plan(model, config)
    found = torchao_qig.calibrate(model, [inputs], config, lambda m, n: isinstance(m, torch.nn.Linear))
    before, after = (sum(losses) for losses in zip(*found.squared_errors.values(), strict=True)) if found.squared_errors else (2.0, 1.0)
    assert after < before
    assert all(grid == ["ternary", 0.7] for grid in found.grids.values())
    found.save(tmp_path / "found")
    quantize_(model, QIGWeightOnlyConfig(format=Ternary(), calib=Calibration.load(tmp_path / "found"), steps=steps))
    stored = {n: p for n, p in model.named_parameters() if isinstance(p, PackedIntTensor)}
    assert {n.removesuffix(".weight") for n in stored} == planned.linears == set(found.grids)
    assert planned.bytes_after == sum(Ternary().nbytes(*p.shape, p.dtype) for p in stored.values())
    for name, weight in stored.items():
        assert set((weight.dequantize() / weight.scale.max(0).values[: len(weight)].unsqueeze(1)).round().unique().tolist()) <= {-1.0, 0.0, 1.0}, name
    with torch.no_grad():
        made = model(**inputs).logits
        torchao_qig.save_pretrained(model, tmp_path)
        assert torch.equal(type(model).from_pretrained(tmp_path)(**inputs).logits, made)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(**inputs).logits, made, rtol=1e-4, atol=1e-4)
        plain, _ = qwen2()
        quantize_(plain, QIGWeightOnlyConfig(format=Ternary(), steps=steps), lambda m, n: n in found.grids)
        assert (made - exact).square().mean() < (plain(**inputs).logits - exact).square().mean()


class Nothing(Format):
    """A format that chooses its own integers."""

    def describe(self) -> list[Any]:
        return []

    def nbytes(self, rows: int, columns: int, dtype: torch.dtype) -> int:
        return 0

    def rounded(self, weight: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
        return weight

    def stored(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"format": 3}, "format=3: pass a format"), ({"format": Ternary(), "bits": "auto", "budget": 3.0}, "leave bits out"),
        ({"format": Nothing(), "steps": [Compensate()]}, "chooses codes, which format=.* chooses itself"),
    ],
)  # fmt: skip
def test_formats_that_do_not_fit(arguments: dict[str, Any], words: str) -> None:
    """Named before anything is touched."""
    with pytest.raises(ValueError, match=words):
        QIGWeightOnlyConfig(**arguments)
    assert QIGWeightOnlyConfig(format=Nothing()).chosen_steps == [Equalize("qig")]
