"""Choose the integers of one block's linears, group after group (`clip=True`, `compensate=True`).

All scales of the block are known by then. With `compensate` a group is rounded on the inputs that the model quantized so far
gives it, and aims at the outputs of full precision: what was rounded before is partly repaired.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchao_qig.calibrate import ranks
from torchao_qig.calibrate.block import Block
from torchao_qig.calibrate.compensate import clipped_qparams, compensated, row_errors, target
from torchao_qig.calibrate.distort import Distortion
from torchao_qig.calibrate.draft import Draft
from torchao_qig.calibrate.groups import join
from torchao_qig.calibrate.result import GroupResult
from torchao_qig.calibrate.work import Part, Work
from torchao_qig.config import QIGWeightOnlyConfig
from torchao_qig.tensor import PackedIntTensor, affine


class Grams(NamedTuple):
    """Weighted sums over tokens: x x^T, and d x^T where x + d is the full-precision input."""

    x: Tensor
    d: Tensor


class Rounding:
    """One block on its way to integers."""

    def __init__(
        self, root: nn.Module, block: Block, name: str, results: Iterable[GroupResult], configs: dict[str, QIGWeightOnlyConfig], distortion: Distortion | None
    ) -> None:
        self.root, self.block, self.name, self.configs, self.distortion = root, block, name, configs, distortion
        self.draft = Draft(root, name, configs, results)
        self.bent = self.draft.module(block.exact, block.device, rest="exact")  # the block as it will be

    def round(self, work: Work, decided: dict[str, PackedIntTensor]) -> tuple[dict[str, PackedIntTensor], tuple[float, float]]:
        """The packed weights of a group, and its squared error: of rounding to nearest, and of these.

        `decided`: linears whose weight is shared with one that has been rounded before; they take its integers.
        """
        sums = self._grams(work)
        first: dict[int, str] = {}  # by weight: linears of this group may share one, too
        for inner in work.group.linears:
            first.setdefault(id(self.root.get_submodule(join(self.name, inner)).weight), inner)
        by_config: dict[int, list[str]] = {}
        for inner in first.values():
            if inner not in decided:
                by_config.setdefault(id(self.configs[inner]), []).append(inner)
        new: dict[str, PackedIntTensor] = {}
        errors = [(0.0, 0.0)]
        for names in by_config.values():
            config = self.configs[names[0]]
            weights = [self._scaled(inner) for inner in names]
            codes, scale, zero, error = rounded(torch.cat(weights), sums, config, config.dtype or self.block.model_dtype)
            errors.append(error)
            dense = affine.dequantize(codes, scale, zero, config.group_size, torch.float32)
            sizes = [len(w) for w in weights]
            for inner, c, s, z, d in zip(names, *(t.split(sizes) for t in (codes, scale, zero, dense)), strict=True):
                self.draft.put(self.bent, inner, d)
                new[inner] = PackedIntTensor.from_codes(c, s, z, config.bits, config.group_size, config.int8_activations).cpu()
        for inner in work.group.linears:
            if inner not in new:
                source = decided.get(inner)
                source = source if source is not None else new[first[id(self.root.get_submodule(join(self.name, inner)).weight)]]
                config, weight, dense = self.configs[inner], self._scaled(inner), source.to(self.block.device).dequantize(torch.float32)
                errors.append(squared_errors(weight, aim(weight, sums, config), dense.to(weight), sums, config, config.dtype or self.block.model_dtype))
                self.draft.put(self.bent, inner, dense)
                new[inner] = source
        nearest, final = (sum(both) for both in zip(*errors, strict=True))
        return {join(self.name, inner): weight for inner, weight in new.items()}, (nearest, final)

    def _scaled(self, inner: str) -> Tensor:
        return self.draft.scaled(inner)[0].to(self.block.device)

    def _grams(self, work: Work) -> Grams:
        first, scales = work.group.linears[0], self.draft.scales
        columns, before = (None if t is None else t.to(self.block.device) for t in (scales.columns.get(join(self.name, first)), self.draft.before(first)))
        channels = self.block.weight(work.group.linears[0]).shape[1]
        total = torch.zeros(2, channels, channels, device=self.block.device)

        def rows(part: Part, x: Tensor) -> Tensor:
            return part.layout.view(x.to(self.block.device)).flatten(0, 1).float()

        for part, seen in self.distortion.watch(self.block, self.bent, work) if self.distortion else ((part, None) for part in work.parts):
            assert part.weights is not None
            weights = part.layout.from_grid(part.weights).reshape(-1, 1).to(self.block.device)
            exact = rows(part, part.exact) if columns is None else rows(part, part.exact) / columns
            now = exact if seen is None else rows(part, seen.x) if before is None else rows(part, seen.x) * before
            if self.block.config.int8_activations:
                now = affine.fake_quantize_rows(now, official=self.block.config.official)
            total += torch.stack([(weights * now).T @ now, (weights * (exact - now)).T @ now])
        return Grams(*ranks.summed(total))


def rounded(w: Tensor, sums: Grams, config: QIGWeightOnlyConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, tuple[float, float]]:
    """Codes, scale and zero of a weight that carries its scales already; its error rounded to nearest, and so."""
    grid, wanted = (config.bits, config.group_size), aim(w, sums, config)
    scale, zero = affine.choose_qparams(w, *grid, config.symmetric, config.official, dtype)
    if config.clip:
        scale, zero = clipped_qparams(wanted, sums.x, *grid, config.symmetric, config.official, dtype)
    if config.compensates:
        codes, scale = compensated(wanted, sums.x, scale, zero, *grid, config.damping, config.sweeps)
    else:
        codes = affine.quantize(wanted, scale, zero, *grid)
    final = affine.dequantize(codes, scale, zero, config.group_size, w.dtype)
    return codes, scale, zero, squared_errors(w, wanted, final, sums, config, dtype)


def aim(w: Tensor, sums: Grams, config: QIGWeightOnlyConfig) -> Tensor:
    """The weight whose outputs on the inputs at hand come nearest to those of full precision."""
    return target(w, sums.x, sums.d, config.damping, config.repair) if config.compensates and config.repair else w


def squared_errors(w: Tensor, wanted: Tensor, final: Tensor, sums: Grams, config: QIGWeightOnlyConfig, dtype: torch.dtype) -> tuple[float, float]:
    """Of rounding a weight to nearest, and of what it becomes."""
    grid = config.bits, config.group_size
    nearest = affine.nearest(w, *affine.choose_qparams(w, *grid, config.symmetric, config.official, dtype), *grid)
    before, after = (float(row_errors(q - wanted, sums.x).sum(dtype=torch.float64)) for q in (nearest, final))
    return before, after
