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
from torchao_qig.calibrate.compensate import compensated, target
from torchao_qig.calibrate.distort import Distortion
from torchao_qig.calibrate.draft import Draft
from torchao_qig.calibrate.groups import join
from torchao_qig.calibrate.result import GroupResult
from torchao_qig.calibrate.work import Part, Work
from torchao_qig.config import QIGWeightOnlyConfig
from torchao_qig.formats.base import CodedFormat, Format, LinearForm, Params, row_errors


class Grams(NamedTuple):
    """Weighted sums over tokens: x x^T, and d x^T where x + d is the full-precision input."""

    x: Tensor
    d: Tensor


class Rounding:
    """One block on its way to integers."""

    def __init__(
        self, root: nn.Module, block: Block, name: str, results: Iterable[GroupResult], forms: dict[str, LinearForm], distortion: Distortion | None
    ) -> None:
        self.root, self.block, self.name, self.forms, self.distortion = root, block, name, forms, distortion
        self.draft = Draft(root, name, forms, results)
        self.bent = self.draft.module(block.exact, block.device, rest="exact")  # the block as it will be

    def round(self, work: Work, decided: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[float, float]]:
        """The packed weights of a group, and its squared error: of rounding to nearest, and of these.

        `decided`: linears whose weight is shared with one that has been rounded before; they take its integers.
        """
        sums = self._grams(work)
        first: dict[int, str] = {}  # by weight: linears of this group may share one, too
        for inner in work.group.linears:
            first.setdefault(id(self.root.get_submodule(join(self.name, inner)).weight), inner)
        by_form: dict[LinearForm, list[str]] = {}
        for inner in first.values():
            if inner not in decided:
                by_form.setdefault(self.forms[inner], []).append(inner)
        new: dict[str, Tensor] = {}
        errors = [(0.0, 0.0)]
        for form, names in by_form.items():
            fmt, weights = form.format, [self._scaled(inner) for inner in names]
            assert isinstance(fmt, CodedFormat)
            codes, params, error = rounded(torch.cat(weights), sums, fmt, self.block.config, form.scale_dtype(self.block.model_dtype))
            errors.append(error)
            dense = fmt.dense(codes, params, torch.float32)
            sizes = [len(w) for w in weights]
            for inner, c, d, *p in zip(names, *(t.split(sizes) for t in (codes, dense, *params)), strict=True):
                self.draft.put(self.bent, inner, d)
                new[inner] = form.activations.marked(fmt.pack(c, tuple(p))).cpu()
        for inner in work.group.linears:
            if inner not in new:
                source = decided.get(inner)
                source = source if source is not None else new[first[id(self.root.get_submodule(join(self.name, inner)).weight)]]
                form, weight, dense = self.forms[inner], self._scaled(inner), source.to(self.block.device).dequantize(torch.float32)
                wanted = aim(weight, sums, self.block.config)
                errors.append(squared_errors(weight, wanted, dense.to(weight), sums, form.format, form.scale_dtype(self.block.model_dtype)))
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
            now = self.forms[first].activations.fake(now)
            total += torch.stack([(weights * now).T @ now, (weights * (exact - now)).T @ now])
        return Grams(*ranks.summed(total))


def rounded(w: Tensor, sums: Grams, fmt: CodedFormat, config: QIGWeightOnlyConfig, dtype: torch.dtype) -> tuple[Tensor, Params, tuple[float, float]]:
    """Codes and parameters of a weight that carries its scales already; its error rounded to nearest, and so."""
    wanted = aim(w, sums, config)
    params = fmt.fit(wanted, dtype, sums.x) if config.clip else fmt.fit(w, dtype)
    if config.compensates:
        codes, params = compensated(wanted, sums.x, fmt, params, config.damping, config.sweeps)
    else:
        codes = fmt.nearest(wanted, fmt.spread(params, w.shape[1], w.dtype))[0]
    return codes, params, squared_errors(w, wanted, fmt.dense(codes, params, w.dtype), sums, fmt, dtype)


def aim(w: Tensor, sums: Grams, config: QIGWeightOnlyConfig) -> Tensor:
    """The weight whose outputs on the inputs at hand come nearest to those of full precision."""
    return target(w, sums.x, sums.d, config.damping, config.repair) if config.compensates and config.repair else w


def squared_errors(w: Tensor, wanted: Tensor, final: Tensor, sums: Grams, fmt: Format, dtype: torch.dtype) -> tuple[float, float]:
    """Of rounding a weight to nearest, and of what it becomes."""
    before, after = (float(row_errors(q - wanted, sums.x).sum(dtype=torch.float64)) for q in (fmt.rounded(w, dtype), final))
    return before, after
