"""The configs that `torchao.quantize_` takes: data and validation, nothing else; workflow.py says what they do."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torchao.core.config import AOBaseConfig

from torchao_qig._compat import INT8_DYNAMIC_CONFIGS, OurConfig
from torchao_qig.errors import UserError
from torchao_qig.formats import Affine, CodedFormat, Float, Foreign, Format, Int8PerToken, LinearForm
from torchao_qig.tensor.affine import check_grid

FULL = 16  # bits of a weight that is not quantized
BITS_OF_AUTO = 2  # at least
DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def _check_dtype(name: str, dtype: object) -> None:
    if dtype not in DTYPES:
        raise UserError(f"{name}={dtype!r}: pass torch.float32, torch.bfloat16, torch.float16 or None")


@dataclass
class PackedIntWeightOnlyConfig(OurConfig):
    """Round the weights of linears to nearest, `bits` bits each, and pack them. No calibration.

    `quantize_(model, PackedIntWeightOnlyConfig(bits=3))` on its own, or as `base_config` of torchao's AWQ and SmoothQuant.

    Args:
        bits: 1 to 8.
        group_size: weights per scale along the input features: a multiple of 16, or -1 for one scale per row.
        symmetric: a grid centred on zero instead of one that spans each group's range; needs at least 2 bits.
        dtype: floating-point dtype of the scales, and so of the weight; None keeps the weight's.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    dtype: torch.dtype | None = None
    version: int = 1

    def __post_init__(self) -> None:
        check_grid(self.bits, self.group_size, self.symmetric)
        _check_dtype("dtype", self.dtype)

    @property
    def form(self) -> LinearForm:
        """What every linear becomes."""
        return LinearForm(Affine(self.bits, self.group_size, self.symmetric), dtype=self.dtype)


@dataclass
class QIGWeightOnlyConfig(OurConfig):
    """Calibrate, then quantize: integers chosen by compensation of errors (the default), equalization scales under a loss that weighs
    every token by integrated gradients (QIG: `sensitivity="qig", compensate=False`), or both.

    `quantize_(model, QIGWeightOnlyConfig(bits=3, calib=loader))`. Without `calib` weights are rounded to nearest, which is what
    loaders of saved checkpoints need.

    The quantized form:
        bits, group_size, symmetric, dtype: see `PackedIntWeightOnlyConfig`. `bits` may also be "auto", or a dict from names of linears
            to 1 to 8, or 16 for those that stay as they are.
        budget: for bits="auto": the mean number of bits per weight, scales not counted, 16 for a weight that stays.
        max_bytes: for bits="auto", instead: what the weights may take in all, scales counted.
        base_config: another torchao config to quantize with, instead of these; its weights must take an `act_pre_scale`.
        format: another stored form to quantize with (`torchao_qig.formats`), instead of bits, group_size and symmetric.
        modules: names of modules whose linears are quantized ("visual", "lm_head", "model.layers.3"; a name stands for all
            that ends in it); None: the decoder's repeated blocks.
        fold: put scales into norms and linears before, where that is exact.
        pre_scale: otherwise keep them as `act_pre_scale`; False leaves such groups without a scale.
        pre_scaled: for loaders: weights made without data get an `act_pre_scale` of ones.

    The search:
        sensitivity: what a token's error counts: "qig", "modality" (MBQ), "uniform" (AWQ), or None for no search. "auto": None with
            `compensate`, "qig" without.
        loss: "mae" or "mse", at the output of the module that a group feeds.
        grid: number of candidate scales.
        quadrature, steps: "gauss" (4 points, or 6 where those do not agree) or "riemann" (the paper's 32) for the integrated gradients.
        search: "coarse", or "exhaustive" for every candidate on every sample.
        warmup_groups: so many first groups get uniform token weights.
        modality_ratio: for "modality": one ratio, or ratios by part of a module's name; None measures them.
        clip: choose each group's range by the weighted error of its outputs, instead of spanning all of its weights.
        compensate: round to change outputs least, not weights: every column's error is passed on to those after it (GPTQ), on
            the inputs that the model quantized so far has, towards full-precision outputs. The file is as large, the model as fast.
            None: yes, unless `base_config` is given, which chooses its own integers.
        damping: of the inputs' Gram matrix, as part of its mean diagonal.
        sweeps: with `compensate`, so often scales are fitted and single integers changed for the better after that.
        repair: with `compensate`, how far to aim beyond a linear's own rounding at what was rounded before it, 0 to 1.
        propagate_error: try candidates on the inputs that the model quantized so far has, against full-precision outputs.
        official: reproduce the published code: its clamped zero point, padding that counts.

    How it runs (not saved with a model):
        calib: an iterable of batches (dicts passed as keywords, tuples, tensors, a datasets.Dataset), or a `Calibration`.
        model: the model that the batches are for, where `quantize_` is given a part of it.
        step: "prepare" records the batches that the model is then run on, "convert" calibrates with them.
        device: where blocks are computed; None: where they are.
        compute_dtype: of gradients and losses; None: bfloat16 where the device has fast bfloat16 matrix units, else float32.
        micro_batch: samples computed at once; None: as many as fit a cache (CPU) or 4096 tokens.
        max_host_memory: bytes of captured activations kept in memory; more goes to temporary files.
        checkpoint_dir: where a killed calibration picks up again.
        verbose: show a progress bar.
    """

    bits: Any = 3
    group_size: int = 128
    symmetric: bool = False
    dtype: torch.dtype | None = None
    budget: float | None = None
    max_bytes: int | None = None
    base_config: AOBaseConfig | None = None
    format: Format | None = None
    modules: list[str] | None = None
    fold: bool = True
    pre_scale: bool = True
    pre_scaled: bool = False
    sensitivity: str | None = "auto"
    loss: str = "mae"
    grid: int = 20
    quadrature: str = "gauss"
    steps: int | None = None
    search: str = "coarse"
    warmup_groups: int = 0
    modality_ratio: float | dict[str, float] | None = None
    clip: bool = False
    compensate: bool | None = None
    damping: float = 0.03
    repair: float = 1.0
    sweeps: int = 2
    propagate_error: bool = False
    official: bool = False
    calib: Any = field(default=None, repr=False, compare=False)  # a loader may be long, and tensors in it have no plain ==
    model: Any = field(default=None, repr=False, compare=False)
    step: str | None = None
    device: Any = None
    compute_dtype: torch.dtype | None = None
    micro_batch: int | None = None
    max_host_memory: int | None = None
    checkpoint_dir: Any = None
    verbose: bool = True
    version: int = 1
    int8_activations: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check_bits()
        _check_dtype("dtype", self.dtype)
        _check_dtype("compute_dtype", self.compute_dtype)
        _check_choice("sensitivity", self.sensitivity, ("auto", "qig", "modality", "uniform", None))
        _check_choice("loss", self.loss, ("mae", "mse"))
        _check_choice("quadrature", self.quadrature, ("gauss", "riemann"))
        _check_choice("search", self.search, ("coarse", "exhaustive"))
        _check_choice("step", self.step, (None, "prepare", "convert"))
        _check_choice("compensate", self.compensate, (None, True, False))
        for name, least, optional in (
            ("grid", 1, False), ("steps", 1, True), ("warmup_groups", 0, False), ("sweeps", 0, False), ("micro_batch", 1, True), ("max_host_memory", 0, True),
        ):  # fmt: skip
            _check_count(name, getattr(self, name), least, optional)
        if self.modules is not None and not (isinstance(self.modules, (list, tuple)) and all(isinstance(m, str) for m in self.modules)):
            raise UserError(f"modules={self.modules!r}: pass a list of module names, or None for the decoder's blocks")
        if self.equalizes and not (self.fold or self.pre_scale):
            raise UserError("fold=False, pre_scale=False: then there is nowhere to put a scale; set one of them, or sensitivity=None")
        if self.base_config is not None and not isinstance(self.base_config, AOBaseConfig):
            raise UserError(f"base_config={self.base_config!r}: pass a torchao config such as Int8WeightOnlyConfig()")
        self._check_format()
        for name, low, high in (("damping", 0.0, float("inf")), ("repair", 0.0, 1.0)):
            _check_number(name, getattr(self, name), low, high)
        if self.rounds and self.base_config is not None:
            raise UserError("base_config: chooses its own integers; leave it out, or clip=True and compensate=True")
        if self.step == "prepare" and self.calib is not None:
            raise UserError("calib: not used with step='prepare', which records what the model is run on; leave one of them out")

    @property
    def form(self) -> LinearForm:
        """What every linear becomes; a number of bits for each is `at(bits).form`."""
        activations = Int8PerToken(self.official) if self.int8_activations else Float()
        if self.base_config is not None:
            return LinearForm(Foreign(self.base_config), activations)
        if self.format is not None:
            return LinearForm(self.format, activations, self.dtype)
        return LinearForm(Affine(self.bits, self.group_size, self.symmetric, self.official), activations, self.dtype)

    @property
    def compensates(self) -> bool:
        """What `compensate` comes to: None means yes, unless a base config chooses its own integers."""
        return self.base_config is None if self.compensate is None else self.compensate

    @property
    def weighting(self) -> str | None:
        """What `sensitivity` comes to."""
        if self.sensitivity != "auto":
            return self.sensitivity
        return None if self.compensates else "qig"  # with compensation, scales measured worse than none: benchmarks/results/beyond.md

    def _bits_named(self) -> list[Any]:
        """Those of linears that are quantized; for "auto" the fewest."""
        if isinstance(self.bits, dict):
            return [b for b in self.bits.values() if b != FULL]
        return [BITS_OF_AUTO if self.bits == "auto" else self.bits]

    def _check_bits(self) -> None:
        for bits in self._bits_named():
            check_grid(bits, self.group_size, self.symmetric)
        _check_count("max_bytes", self.max_bytes, 1, True)
        if self.budget is not None:
            _check_number("budget", self.budget, 2, FULL)
        given = [name for name in ("budget", "max_bytes") if getattr(self, name) is not None]
        if (self.bits == "auto") != (len(given) == 1):
            raise UserError(
                f"bits={self.bits!r} with {' and '.join(given) or 'no budget'}: bits='auto' takes one of budget= and max_bytes=, other bits neither"
            )
        if not isinstance(self.bits, int) and self.base_config is not None:
            raise UserError(f"bits={self.bits!r}: base_config has its own bits; leave one of them out")

    def _check_format(self) -> None:
        if self.format is None:
            return
        if not isinstance(self.format, Format):
            raise UserError(f"format={self.format!r}: pass a Format such as torchao_qig.formats.Affine(bits=3); a torchao config goes into base_config")
        if self.base_config is not None or not isinstance(self.bits, int):
            raise UserError(f"format={self.format!r} says how weights are stored; leave {'bits' if self.base_config is None else 'base_config'} out")
        if self.rounds and not isinstance(self.format, CodedFormat):
            raise UserError(f"format={self.format!r}: chooses its own integers; pass compensate=False and clip=False")

    def at(self, bits: int) -> "QIGWeightOnlyConfig":
        """The same with so many bits for every weight."""
        return replace(self, bits=bits, budget=None, max_bytes=None)

    @property
    def equalizes(self) -> bool:
        """Whether calibration chooses scales."""
        return self.weighting is not None

    @property
    def smoothing(self) -> float | None:
        """SmoothQuant's alpha, for its scales instead of a search."""
        return None

    @property
    def on_quantized_inputs(self) -> bool:
        """Whether candidates are tried on the inputs that the model quantized so far has."""
        return self.propagate_error

    def computes_in(self, device: torch.device) -> torch.dtype:
        """The dtype of gradients and losses."""
        if self.compute_dtype is not None:
            return self.compute_dtype
        if self.quadrature == "riemann" or self.int8_activations:  # bfloat16's steps are as large as int8's
            return torch.float32
        fast = torch.cpu._is_amx_tile_supported() if device.type == "cpu" else True
        return torch.bfloat16 if fast else torch.float32

    @property
    def rounds(self) -> bool:
        """Whether calibration chooses the integers, too."""
        return self.clip or self.compensates

    @classmethod
    def paper(cls, **kwargs: Any) -> "QIGWeightOnlyConfig":
        """The published method as its released code computes it (32 Riemann points, every candidate, clamped zero points,
        uniform weights for the first five groups, groups that cannot be folded left out)."""
        search: dict[str, Any] = dict(
            sensitivity="qig", quadrature="riemann", steps=32, loss="mae", search="exhaustive", warmup_groups=5, compute_dtype=torch.float32
        )
        form: dict[str, Any] = dict(official=True, pre_scale=False, clip=False, compensate=False)
        return cls(**{**search, **form, **kwargs})

    def for_loading(self, pre_scaled: bool) -> "QIGWeightOnlyConfig":
        """What a loader of the quantized model needs: the recipe without the data."""
        nothing: dict[str, Any] = dict.fromkeys(RUNTIME)
        return replace(self, pre_scaled=pre_scaled, **nothing)

    def public(self) -> dict[str, Any]:
        """The fields that say what is computed, as JSON can hold them."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*RUNTIME, "version", "base_config", "format")}
        base, fmt = (None if form is None else repr(form) for form in (self.base_config, self.format))
        kept |= {"sensitivity": self.weighting, "compensate": self.compensates}
        return {**kept, "dtype": None if self.dtype is None else str(self.dtype), "base_config": base, "format": fmt, "int8_activations": self.int8_activations}

    def __deepcopy__(self, memo: dict[int, Any]) -> "QIGWeightOnlyConfig":
        new = object.__new__(type(self))  # shares the loader and the model: a generator cannot be copied
        new.__dict__.update(self.__dict__)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}


# torchao's JSON and copies leave out what begins with an underscore: a saved config holds the recipe, not the data.
RUNTIME = ("calib", "model", "step", "device", "compute_dtype", "micro_batch", "max_host_memory", "checkpoint_dir", "verbose")


def _hidden(name: str, default: Any) -> Any:
    return property(lambda self: self.__dict__.get(f"_{name}", default), lambda self, value: self.__dict__.__setitem__(f"_{name}", value))


for _name in RUNTIME:
    setattr(QIGWeightOnlyConfig, _name, _hidden(_name, _name == "verbose" or None))


@dataclass
class QIGInt8DynamicActivationConfig(QIGWeightOnlyConfig):
    """The same with int8 activations, rounded token by token as they come: linears multiply integers.

    `quantize_(model, QIGInt8DynamicActivationConfig(bits=4, calib=loader))`. Everything is chosen with rounded activations: `sensitivity="qig"`
    integrates from the input that the model quantized so far has to the one of full precision, and tries candidates on the former.

    Args, beside those of `QIGWeightOnlyConfig`:
        bits, group_size, symmetric: here 4 bits, one scale per row, a grid centred on zero; 8 bits have to be symmetric.
        smoothquant: no search, but SmoothQuant's scales with this alpha (0.5): max |x| ** alpha / max |W| ** (1 - alpha).
        base_config: torchao's Int8DynamicActivationIntxWeightConfig or Int8DynamicActivationInt8WeightConfig.
        quadrature, steps: "gauss": 8 points, without interpolation.
        compute_dtype: None: float32.
    """

    bits: Any = 4
    group_size: int = -1
    symmetric: bool = True
    smoothquant: float | None = None
    int8_activations: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.smoothquant is not None:
            _check_number("smoothquant", self.smoothquant, 0.0, 1.0)
            if self.sensitivity not in ("auto", None):
                raise UserError(f"sensitivity={self.sensitivity!r} with smoothquant={self.smoothquant!r}: both choose scales; leave one of them out")
        super().__post_init__()
        if self.base_config is not None and not isinstance(self.base_config, INT8_DYNAMIC_CONFIGS):
            names = " or ".join(c.__name__ for c in INT8_DYNAMIC_CONFIGS)
            raise UserError(f"base_config={self.base_config!r}: does not round activations to int8; pass {names}, or use QIGWeightOnlyConfig")
        if not self.symmetric and (self.bits == "auto" or 8 in self._bits_named()) and self.base_config is None:
            raise UserError(f"bits={self.bits!r}, symmetric=False: integers of 8 bits have to be symmetric beside int8 activations; pass symmetric=True")

    @property
    def weighting(self) -> str | None:
        return None if self.smoothquant is not None else super().weighting

    @property
    def equalizes(self) -> bool:
        return self.weighting is not None or self.smoothquant is not None

    @property
    def smoothing(self) -> float | None:
        return self.smoothquant

    @property
    def on_quantized_inputs(self) -> bool:
        return self.propagate_error or self.weighting == "qig"

    @classmethod
    def paper(cls, **kwargs: Any) -> "QIGInt8DynamicActivationConfig":
        """The published method as its released code computes it: 32 Riemann points, every candidate, no clipped token weights."""
        return super().paper(**{"warmup_groups": 0, **kwargs})


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise UserError(f"{name}={value!r}: pass one of {', '.join(map(repr, choices))}")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f"{name}={value!r}: pass a number of at least {low:g}" + (f" and at most {high:g}" if high < float("inf") else ""))


def _check_count(name: str, value: object, least: int, optional: bool) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{name}={value!r}: pass an integer of at least {least}{' or None' if optional else ''}")
