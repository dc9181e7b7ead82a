"""What the linears of a model can be quantized to: the stored form of a weight (`Format`) and the rounding of its input (`Activations`).

One file per format. A format knows its own numerics and nothing of calibration: it fits its parameters to a weight, rounds to the nearest values that it can
store, packs them, and counts their bytes. Calibration is written against `base.py`, so a new format is one new file.
"""

from torchao_qig.formats.activations import Activations, Float, Int8PerToken
from torchao_qig.formats.affine import Affine
from torchao_qig.formats.base import CodedFormat, Format, LinearForm, Params
from torchao_qig.formats.foreign import Foreign

__all__ = ["Activations", "Affine", "CodedFormat", "Float", "Foreign", "Format", "Int8PerToken", "LinearForm", "Params"]
