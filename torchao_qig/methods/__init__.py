"""What calibration decides about a block, step by step.

A calibration is a list of steps, each a small frozen dataclass of one method's settings:

- `Equalize` and `Smooth` choose a scale for the input channels of every group of linears;
- `Compensate` and `Clip` choose the codes that a weight is stored as.

How much an error at each token counts is a setting of these: `Uniform`, `Modality` or `QIG` (`token_weights/`). Which bits every linear gets
(`allocate.py`) is decided once, before the blocks. Steps take what `watch` saw of a block and write into its draft (`draft.py`); they know nothing of
files, devices or ranks.
"""

from torchao_qig.methods.compensate import Clip, Compensate
from torchao_qig.methods.context import Context
from torchao_qig.methods.equalize import Equalize
from torchao_qig.methods.group_result import GroupResult
from torchao_qig.methods.smooth import Smooth
from torchao_qig.methods.step import Step
from torchao_qig.methods.token_weights.weighting import QIG, Modality, TokenWeighting, Uniform

__all__ = ["QIG", "Clip", "Compensate", "Context", "Equalize", "GroupResult", "Modality", "Smooth", "Step", "TokenWeighting", "Uniform"]
