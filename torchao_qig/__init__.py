"""torchao_qig: QIG calibration and packed 1 to 8 bit weights for torchao, with linears that torch.compile fuses into one kernel.

Importing the package registers its configs and its tensor with torchao, torch.load and transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchao_qig._compat import register as _register
from torchao_qig.config import PackedIntWeightOnlyConfig, QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig
from torchao_qig.integrations.transformers import save_pretrained
from torchao_qig.tensor import PackedIntTensor

__version__ = "0.1.0"
__all__ = [
    "Calibration", "PackedIntTensor", "PackedIntWeightOnlyConfig", "QIGInt8DynamicActivationConfig", "QIGWeightOnlyConfig", "calibrate", "plan",
    "save_pretrained",
]  # fmt: skip

if TYPE_CHECKING:
    from torchao_qig.calibrate import Calibration, calibrate
    from torchao_qig.calibrate.plan import plan

_register(PackedIntTensor)
import_module("torchao_qig.workflow")  # registers the handlers with torchao


def __getattr__(name: str) -> Any:
    """Calibration is imported when it is first used: serving a checkpoint does without."""
    if name in ("calibrate", "Calibration", "plan"):
        package = import_module("torchao_qig.calibrate")
        return package if name == "calibrate" else getattr(import_module("torchao_qig.calibrate.plan") if name == "plan" else package, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
