"""`Step`: the settings of one method, what has to be recorded for it, what it decides about a block, and what it costs."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torchao_qig.formats import Activations
from torchao_qig.methods.context import Context
from torchao_qig.methods.draft import Draft
from torchao_qig.methods.token_weights.weighting import TokenWeighting
from torchao_qig.watch.block import Block, Needs


@dataclass(frozen=True)
class GroupShape:
    """The size of a group of linears with a common input: rows of all their weights together, and columns. `alone`: the group is one linear."""

    rows: int
    columns: int
    alone: bool


@dataclass(frozen=True)
class BlockSize:
    """The size of one block's calibration: its numbers of parameters, its groups, and the tokens that go through it."""

    parameters: int
    groups: tuple[GroupShape, ...]
    tokens: int


@dataclass(frozen=True)
class Cost:
    """What a step takes for one block.

    Attributes:
        forwards: runs of all tokens through the block.
        products: multiplications and additions besides.
        columns, column_rows: number of columns that are rounded one after another, and the sum over these of their rows.
        numbers, floats: how many numbers are held at once on the device, in the dtype of the computation and in float32.
    """

    forwards: float = 0.0
    products: float = 0.0
    columns: int = 0
    column_rows: int = 0
    numbers: int = 0
    floats: int = 0


class Step(ABC):
    """One method. A subclass is a frozen dataclass of its settings, and checks them itself.

    `paper_rules`: whether the step, and the grids of the weights, follow the published code where it differs from ours.
    """

    paper_rules: bool = False
    decides: ClassVar[str] = ""  # "scales" or "codes", which only one step may choose

    @abstractmethod
    def needs(self, activations: Activations) -> Needs:
        """What has to be recorded for this step."""

    @abstractmethod
    def run(self, block: Block, draft: Draft, context: Context) -> None:
        """Decide something about the block, and write it into the draft."""

    def cost(self, size: BlockSize) -> Cost:
        """What the step takes for a block of this size. `plan` adds this up over steps and blocks."""
        return Cost()

    @property
    def weighting(self) -> TokenWeighting | None:
        """How the step weighs tokens; None: as in the step before, or all alike."""
        return None

    @property
    def replays(self) -> bool:
        """Whether the step calls inspected modules again, so that their recorded calls have to be kept for it."""
        return True
