"""From a model and its batches to a `Calibration`: `torchao_qig.calibrate(model, loader, config)`.

capture (stream.py) -> group (groups.py) -> token weights (sensitivity.py) -> search (search.py) -> where the scale goes
(fold.py), driven by run.py with block.py for one block; apply.py puts the result (result.py) into a model.
"""

import sys
from types import ModuleType
from typing import Any

from torchao_qig.calibrate.result import Calibration, GroupResult, TokenWeights
from torchao_qig.calibrate.run import calibrate

__all__ = ["Calibration", "GroupResult", "TokenWeights", "calibrate"]


class _Callable(ModuleType):
    """`torchao_qig.calibrate` is this package and the function in it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Calibration:
        return calibrate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
