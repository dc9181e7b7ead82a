"""`PackedIntWeightOnlyConfig`: how weights are stored, and nothing about how their values were found. Checkpoints name it in their config.json."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from torchao_qig._compat import OurConfig
from torchao_qig.errors import UserError, check_flag
from torchao_qig.formats import Affine, Float, Foreign, Format, Int8PerToken, LinearForm
from torchao_qig.running import check_dtype
from torchao_qig.tensor.affine import check_grid


@dataclass
class PackedIntWeightOnlyConfig(OurConfig):
    """Round the weights of linears to nearest, `bits` bits each, and pack them. No calibration.

    `quantize_(model, PackedIntWeightOnlyConfig(bits=3))` on its own, or as `base_config` of torchao's AWQ and SmoothQuant.

    Args:
        bits: 1 to 8.
        group_size: weights per scale along the input features: a multiple of 16, or -1 for one scale per row.
        symmetric: a grid centred on zero instead of one that spans each group's range; needs at least 2 bits.
        dtype: floating-point dtype of the scales, and so of the weight; None keeps the weight's.
        int8_activations: linears round their input to int8, token by token, and multiply integers; 8 bits then have to be symmetric.
        pre_scaled: for loaders: weights get an `act_pre_scale` of ones, which that of a file then replaces.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    dtype: torch.dtype | None = None
    int8_activations: bool = False
    pre_scaled: bool = False

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size, self.symmetric)
        check_dtype("dtype", self.dtype)
        check_flag("int8_activations", self.int8_activations)
        check_flag("pre_scaled", self.pre_scaled)
        if self.int8_activations:
            check_int8_grid([self.bits], self.symmetric)

    @property
    def form(self) -> LinearForm:
        """What every linear becomes."""
        return LinearForm(Affine(self.bits, self.group_size, self.symmetric), Int8PerToken() if self.int8_activations else Float(), self.dtype)

    def for_loading(self, pre_scaled: bool) -> "PackedIntWeightOnlyConfig":
        """The config that a loader needs. It has no dtype: scales have the one in the file, and transformers garbles any setting called dtype."""
        return replace(self, pre_scaled=pre_scaled, dtype=None)


def check_int8_grid(bits: list[Any], symmetric: bool) -> None:
    """Raise where a code minus its zero point does not fit into 8 bits."""
    if not symmetric and 8 in bits:
        raise UserError("bits=8, symmetric=False: integers of 8 bits have to be symmetric beside int8 activations; pass symmetric=True")


def from_version_1(settings: dict[str, Any], int8_activations: bool) -> Any:
    """The config that a loader needs, from the settings in a config.json of version 1, which held those of the calibration, too."""
    if settings.get("base_config") is not None:
        base = settings["base_config"]
        return PackedIntWeightOnlyConfig(**vars(base) | {"pre_scaled": settings["pre_scaled"]}) if isinstance(base, PackedIntWeightOnlyConfig) else base
    kept = {name: settings[name] for name in ("bits", "group_size", "symmetric", "dtype", "pre_scaled") if name in settings}
    return PackedIntWeightOnlyConfig(**kept, int8_activations=int8_activations)


def loading_config(fmt: Format, form: dict[str, Any]) -> Any:
    """The config that names a stored form: torchao's own where torchao stores the weights, otherwise ours with these settings."""
    if isinstance(fmt, Foreign) and not isinstance(fmt.config, PackedIntWeightOnlyConfig):
        return fmt.config
    return PackedIntWeightOnlyConfig(**form | {"dtype": None})
