"""MBQ's weight of a vision token relative to an answer token (arXiv 2412.19509): how strongly the loss depends on each of them.

One forward and backward pass of the whole model per batch; hooks note |d loss / d output| of every module that an error may be
measured at, averaged over channels and over the tokens of each modality. A group's ratio is vision / answer, at least the
median over the blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchao_qig.errors import UserError
from torchao_qig.watch import ranks
from torchao_qig.watch.batches import IGNORED, Batch, Tokens
from torchao_qig.watch.chains import Chain
from torchao_qig.watch.groups import join, linears_in
from torchao_qig.watch.observer import first_tensor
from torchao_qig.watch.stream import MicroBatch


def _labels(batch: Batch, answer: Tensor) -> Tensor:
    """The labels of a batch: its own, or else the ids of its answer tokens."""
    if batch.labels is not None:
        return batch.labels
    ids = next((v for v in [batch.kwargs.get("input_ids"), *batch.args] if isinstance(v, Tensor) and not v.is_floating_point()), None)
    if ids is None:
        raise UserError("sensitivity='modality': the batches have neither labels nor input_ids; add labels, or pass Modality(ratio=...)")
    return ids.masked_fill(~answer.to(ids.device), IGNORED)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over samples of the mean next-token loss of each."""
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
    counts = (labels[:, 1:] != IGNORED).sum(1).clamp(min=1)
    return (losses.sum(1) / counts).sum()


def split(tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Answer and vision masks. Where the batch does not mark answers, every text token that counts is an answer."""
    if tokens.counted is None or tokens.vision is None:
        raise UserError("sensitivity='modality': cannot tell vision tokens in the batches; add a vision_mask (samples x tokens), or use sensitivity='qig'")
    answer = tokens.answer if tokens.answer is not None else tokens.counted & ~tokens.vision
    return answer & tokens.counted, tokens.vision & tokens.counted


@dataclass
class Ratios:
    """A vision token's weight relative to an answer token's, by module.

    Attributes:
        given: the user's ratio, one or by parts of modules' names; None: use `found`.
        found: full name of a module -> the ratio measured for it.
        counts: how many answer and vision tokens there are.
    """

    given: float | dict[str, float] | None = None
    found: dict[str, float] = field(default_factory=dict)
    counts: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def measured(
        cls, model: nn.Module, chain: Chain, linears: set[str], batches: list[Batch], pieces: list[MicroBatch], given: float | dict[str, float] | None
    ) -> "Ratios":
        """Count the tokens, and measure the ratios of a chain's modules where none are given."""
        masks = [split(p.tokens) for p in pieces]
        answers, vision = ranks.summed(torch.tensor([sum(float(m[i].sum()) for m in masks) for i in (0, 1)], dtype=torch.float64)).tolist()
        ratios = cls(given, counts=(answers, vision))
        if given is None:
            inside = {b: [n for n in linears_in(model.get_submodule(b)) if join(b, n) in linears] for b in chain.names}
            gradients = ModalityGradients(model, chain.names, inside)
            for batch in batches:
                gradients.add(batch)
            ratios.found = gradients.ratios()
        return ratios

    def of(self, name: str) -> float:
        """The ratio of a module, by its full name."""
        if isinstance(self.given, dict):
            return next((float(v) for part, v in self.given.items() if part in name), 1.0)
        return float(self.given) if self.given is not None else self.found.get(name, 1.0)


class ModalityGradients:
    """Adds up the magnitudes of the loss's gradients at vision and at answer tokens, for every watched module."""

    def __init__(self, root: nn.Module, blocks: list[str], linears: dict[str, list[str]]) -> None:
        self.root, self.blocks = root, blocks
        self._names = {b: sorted({".".join(n.split(".")[:i]) for n in linears[b] for i in range(n.count(".") + 2)}) for b in blocks}
        self._sums: dict[str, Tensor] = {}  # full name -> vision, answer

    def add(self, batch: Batch) -> None:
        """Run a batch forward and backward, and add its gradients."""
        answer, vision = split(batch.masks)
        handles: list[Any] = []
        leaves: list[Tensor] = []

        def grow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            def leaf(t: Any) -> Any:
                floating = isinstance(t, Tensor) and t.is_floating_point() and t.dim() == 3
                if not (floating and t.shape[:2] == answer.shape):
                    return t
                leaves.append(t.detach().requires_grad_())
                return leaves[-1]

            return tuple(leaf(a) for a in args), {k: leaf(v) for k, v in kwargs.items()}

        def watching(name: str) -> Callable[..., None]:
            def note(gradient: Tensor) -> None:
                if gradient.shape[:2] == answer.shape:
                    per_token = gradient.float().abs().mean(-1).cpu()
                    means = [(per_token * m).sum(1) / m.sum(1).clamp(min=1) for m in (vision, answer)]
                    self._sums[name] = self._sums.get(name, torch.zeros(2, dtype=torch.float64)) + torch.stack([m.sum() for m in means])

            def hook(module: nn.Module, args: Any, out: Any) -> None:
                out = first_tensor(out)
                if out.requires_grad and out.dim() == 3:
                    out.register_hook(note)

            return hook

        try:
            handles.append(self.root.get_submodule(self.blocks[0]).register_forward_pre_hook(grow, with_kwargs=True))
            for block in self.blocks:
                for name in self._names[block]:
                    handles.append(self.root.get_submodule(join(block, name)).register_forward_hook(watching(join(block, name))))
            with torch.enable_grad():
                out = self.root(*batch.args, **batch.kwargs)
                logits = getattr(out, "logits", None)
                logits = first_tensor(out) if logits is None else logits
                if logits.shape[:2] != answer.shape:
                    raise UserError("sensitivity='modality': the model returns no logits per token; pass Modality(ratio=...)")
                torch.autograd.grad(_loss(logits, _labels(batch, answer).to(logits.device)), leaves)  # not backward: parameters keep their .grad
        finally:
            for handle in handles:
                handle.remove()

    def ratios(self) -> dict[str, float]:
        """The ratio of every watched module, by its full name."""
        ratios: dict[str, dict[str, float]] = {}
        for block in self.blocks:
            for name in self._names[block]:
                vision, answer = ranks.summed(self._sums.get(join(block, name), torch.zeros(2, dtype=torch.float64))).tolist()
                if answer > 0:
                    ratios.setdefault(name, {})[block] = vision / answer
        found: dict[str, float] = {}
        for name, per_block in ratios.items():
            middle = median(per_block.values())
            found |= {join(block, name): max(value, middle) for block, value in per_block.items()}
        return found
