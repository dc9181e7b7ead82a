"""`GroupResult`: the scale of one group of linears, and how it was found."""

from dataclasses import dataclass

from torch import Tensor


@dataclass
class GroupResult:
    """One group of linears. Names are full names in the calibrated model.

    Attributes:
        label: the group's name: that of the inspected module, or of the first linear where two groups share the module.
        block: the block that the group lies in.
        linears: the linears that share the scale.
        inspected: the module at whose output the error was measured.
        weighting: "qig", "modality", "uniform" or "none".
        fold_kind, fold_into: where the scale goes (`fold.py`); "act_pre_scale" and "" where no producer takes it.
        ratio: the exponent of the scale: that of the best candidate (`search.py`), or the alpha of `Smooth`.
        winner: number of the candidate that was chosen.
        losses: candidate number -> loss, for those evaluated on all samples. Candidate 0 is plain rounding.
        x_mean: mean magnitude of the input's channels.
        scale: the equalization scale, float32.
    """

    label: str
    block: str
    linears: list[str]
    inspected: str
    weighting: str
    fold_kind: str
    fold_into: str
    ratio: float
    winner: int
    losses: dict[int, float]
    x_mean: Tensor
    scale: Tensor

    @property
    def loss(self) -> float:
        """The loss of the scale that was chosen."""
        return self.losses.get(self.winner, float("nan"))

    @property
    def rounding_loss(self) -> float:
        """The loss of plain rounding."""
        return self.losses.get(0, float("nan"))
