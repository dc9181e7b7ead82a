"""torchao_qig: packed 1 to 8 bit weights for torchao, with linears that torch.compile fuses into one kernel.

Importing the package registers its configs and its tensor with torchao, torch.load and transformers.
"""

from importlib import import_module

from torchao_qig._compat import register as _register
from torchao_qig.config import PackedIntWeightOnlyConfig
from torchao_qig.integrations.transformers import save_pretrained
from torchao_qig.tensor import PackedIntTensor

__version__ = "0.1.0"
__all__ = ["PackedIntTensor", "PackedIntWeightOnlyConfig", "save_pretrained"]

_register(PackedIntTensor)
import_module("torchao_qig.workflow")  # registers the handlers with torchao
