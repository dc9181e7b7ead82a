"""`Context`: what steps know beside the block that they decide about."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from torchao_qig.methods.fold import Folds
from torchao_qig.methods.shared_weights import SharedWeights
from torchao_qig.methods.token_weights.modality import Ratios
from torchao_qig.watch.quantized_stream import QuantizedStream


@dataclass
class Context:
    """What steps know beside the block that they decide about. One object serves a whole calibration.

    Attributes:
        root: the model.
        shared: which linears share a weight.
        second: the samples in the model as quantized so far; None where no step needs them.
        samples: (batch, row) -> number of the sample.
        folds: finds where scales go; None where no step folds scales.
        ratios: MBQ's ratios, where a step weighs tokens by modality.
        weights: the stored weights of all blocks before this one, by the linears' names.
        weighed: how many groups have got their token weights so far.
        points: group -> number of points of its integral; blocks of the same structure share it.
    """

    root: nn.Module
    shared: SharedWeights
    second: QuantizedStream | None
    samples: dict[tuple[int, int], int]
    folds: Folds | None
    ratios: Ratios
    weights: dict[str, Tensor] = field(default_factory=dict)
    weighed: int = 0
    points: dict[str, int] = field(default_factory=dict)
