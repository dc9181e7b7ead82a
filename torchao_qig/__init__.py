"""torchao_qig: QIG calibration and packed 1 to 8 bit weights for torchao, with linears that torch.compile fuses into one kernel.

Importing the package registers its configs and its tensor with torchao, torch.load and transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torchao_qig._compat import register as _register
from torchao_qig.config import QIGInt8DynamicActivationConfig, QIGWeightOnlyConfig
from torchao_qig.integrations.transformers import save_pretrained
from torchao_qig.running import Running
from torchao_qig.stored_config import PackedIntWeightOnlyConfig
from torchao_qig.tensor import PackedIntTensor

if TYPE_CHECKING:
    from torchao_qig.calibration.result import Calibration
    from torchao_qig.calls import calibrate, plan
    from torchao_qig.methods import QIG, Clip, Compensate, Equalize, Modality, Smooth, Uniform

__version__ = "0.1.0"
__all__ = [
    "QIG", "Calibration", "Clip", "Compensate", "Equalize", "Modality", "PackedIntTensor", "PackedIntWeightOnlyConfig", "QIGInt8DynamicActivationConfig",
    "QIGWeightOnlyConfig", "Running", "Smooth", "Uniform", "calibrate", "plan", "save_pretrained",
]  # fmt: skip

LATER = {  # imported when they are first used: serving a checkpoint does not need them
    **dict.fromkeys(("calibrate", "plan"), "torchao_qig.calls"),
    "Calibration": "torchao_qig.calibration.result",
    **dict.fromkeys(("QIG", "Clip", "Compensate", "Equalize", "Modality", "Smooth", "Uniform"), "torchao_qig.methods"),
    **dict.fromkeys(("Affine", "Foreign"), "torchao_qig.formats"),  # JSON files name them so
}

_register(PackedIntTensor)
import_module("torchao_qig.workflow")  # registers the handlers with torchao


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(import_module(LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
