"""The configs that `torchao.quantize_` calibrates with: the form of the weights, the steps, and options of the run. Only data and validation."""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torchao.core.config import AOBaseConfig

from torchao_qig._compat import INT8_DYNAMIC_CONFIGS, OurConfig
from torchao_qig.errors import UserError, check_choice, check_count, check_flag, check_number
from torchao_qig.formats import Activations, Affine, CodedFormat, Float, Foreign, Format, Int8PerToken, LinearForm
from torchao_qig.formats.affine import UNQUANTIZED_BITS
from torchao_qig.running import Running, check_dtype
from torchao_qig.stored_config import check_int8_grid, from_version_1, loading_config
from torchao_qig.tensor.affine import check_grid

if TYPE_CHECKING:
    from torchao_qig.methods import Step

LEAST_BITS_OF_AUTO = 2
USUAL_RUN = Running()
EQUALIZE, QIG, COMPENSATE, RUNNING = (
    "steps=[Equalize({}=...)]",
    "steps=[Equalize(sensitivity=QIG({}=...))]",
    "steps=[Compensate({}=...)]",
    "running=Running({}=...)",
)
MOVED = {  # settings that were keywords of the config once, and where they are now
    "base_config": "format=...",
    "compensate": "method='qig' for scales alone, method='default+qig' for both; more in steps=[...]",
    "sensitivity": "method='qig' (or 'awq', 'mbq', 'rtn'), or steps=[Equalize(sensitivity=...)]",
    "modality_ratio": "steps=[Equalize(sensitivity=Modality(ratio=...))]",
    "clip": "steps=[Compensate(clip=True)], or steps=[Clip()]",
    "official": "method='qig-paper', or steps=[Equalize(paper_rules=True)]",
    "smoothquant": "steps=[Smooth(alpha=...)]",
    **{name: EQUALIZE.format(name) for name in ("loss", "grid", "search", "fold", "pre_scale", "propagate_error")},
    **{name: QIG.format(name) for name in ("quadrature", "warmup_groups")},
    **{name: COMPENSATE.format(name) for name in ("damping", "repair", "sweeps")},
    **{name: RUNNING.format(name) for name in ("model", "compute_dtype", "micro_batch", "max_host_memory")},
}


@dataclass
class QIGWeightOnlyConfig(OurConfig):
    """Calibrate on some batches, then quantize the weights: `quantize_(model, QIGWeightOnlyConfig(bits=3, calib=loader))`.

    By default (`method="default"`) no equalization scales are searched. Codes are chosen by compensated rounding: columns are rounded one after another, and
    the error of each is passed on to those after it. This is done on the inputs that the model quantized so far has, and aims at the full-precision outputs.
    Then the scales of the codes are fitted, and single codes changed where that lowers the error. The published method, whose token weights come from
    integrated gradients, is `method="qig"`, or `QIGWeightOnlyConfig.paper(...)` exactly as its released code computes it.

    Without `calib` weights are rounded to nearest.

    Args:
        bits, group_size, symmetric, dtype: see `PackedIntWeightOnlyConfig`. `bits` may also be "auto", or a dict from names of linears to their bits: 1 to
            8, or 16 for a linear that stays as it is.
        format: another stored form instead of bits, group_size and symmetric: one of `torchao_qig.formats`, or any torchao config.
        budget: for bits="auto": the mean number of bits per weight. Scales do not count; a weight that stays counts 16.
        max_bytes: for bits="auto", instead of budget: the bytes of all weights together, scales included.
        modules: names of modules whose linears are quantized ("visual", "lm_head", "model.layers.3"; a name stands for all that ends in it);
            None: the decoder's repeated blocks.
        steps: the steps of the calibration, in this order: `Equalize` or `Smooth` (scales), `Compensate` or `Clip` (codes); [] rounds to nearest.
        method: instead of steps, a name for them: "default", "rtn", "awq", "mbq", "smoothquant", "qig", "qig-paper", "gptq", "gptaq", ...
            (`methods/presets.py`).
        calib: an iterable of batches (dicts passed as keywords, tuples, tensors, a datasets.Dataset), or a `Calibration`.
        step: "prepare" records the batches that the model is then run on, "convert" calibrates with them.
        device: where blocks are computed; None: on the device that they are on.
        checkpoint_dir: a directory for the progress, from which an interrupted calibration continues.
        verbose: show a progress bar.
        running: rarer options of the run, see `Running`.
    """

    bits: Any = 3
    group_size: int = 128
    symmetric: bool = False
    dtype: torch.dtype | None = None
    format: Format | AOBaseConfig | None = None
    budget: float | None = None
    max_bytes: int | None = None
    modules: list[str] | None = None
    steps: "Sequence[Step] | None" = None
    calib: Any = field(default=None, repr=False, compare=False)  # a loader may be long, and tensors in it have no plain ==
    step: str | None = None
    device: Any = None
    checkpoint_dir: Any = None
    verbose: bool = True
    running: Running = USUAL_RUN
    method: InitVar[str | None] = None
    int8_activations: ClassVar[bool] = False

    def __new__(cls, *args: Any, **settings: Any) -> Any:
        if "pre_scaled" in settings:  # from a config.json of version 1: keep what it says of the stored form
            known = {"pre_scaled", "version", *MOVED, *(f.name for f in fields(cls))} - {*RUNTIME}
            if args or settings.keys() - known:
                raise UserError(f"pre_scaled={settings['pre_scaled']!r}: is about the stored form; pass it to PackedIntWeightOnlyConfig")
            return from_version_1(settings, cls.int8_activations)
        for name in settings.keys() & MOVED.keys():
            raise UserError(f"{name}={settings[name]!r}: is said in another place now: {MOVED[name]}")
        return super().__new__(cls)

    def __post_init__(self, method: str | None) -> None:
        if isinstance(self.format, AOBaseConfig):
            self.format = Foreign(self.format)
        self._check_form()
        check_choice("step", self.step, (None, "prepare", "convert"))
        check_flag("verbose", self.verbose)
        if not isinstance(self.running, Running):
            raise UserError(f"running={self.running!r}: pass torchao_qig.Running(...)")
        if self.modules is not None and not (isinstance(self.modules, (list, tuple)) and all(isinstance(m, str) for m in self.modules)):
            raise UserError(f"modules={self.modules!r}: pass a list of module names, or None for the decoder's blocks")
        if method is not None:
            if self.steps is not None:
                raise UserError(f"method={method!r}, steps=[...]: both say how to calibrate; leave one of them out")
            from torchao_qig.methods.presets import preset

            self.steps = preset(method, self.int8_activations)
        if self.steps is not None:
            from torchao_qig.methods.fit import check_list, check_steps

            self.steps = check_list(self.steps)
            check_steps(self.steps, self._format)
        if self.step == "prepare" and self.calib is not None:
            raise UserError("calib: not used with step='prepare', which records what the model is run on; leave one of them out")
        for name, used in (("checkpoint_dir", self.steps is None or bool(self.steps)), ("running", self.calibrates)):
            if not used and getattr(self, name) not in (None, USUAL_RUN):
                raise UserError(f"{name}={getattr(self, name)!r}: has no effect where weights are rounded to nearest; leave it out")

    def _check_form(self) -> None:
        check_dtype("dtype", self.dtype)
        check_count("max_bytes", self.max_bytes, 1, optional=True)
        if self.budget is not None:
            check_number("budget", self.budget, 2, UNQUANTIZED_BITS)
        given = [name for name in ("budget", "max_bytes") if getattr(self, name) is not None]
        if (self.bits == "auto") != (len(given) == 1):
            raise UserError(
                f"bits={self.bits!r} with {' and '.join(given) or 'no budget'}: bits='auto' takes one of budget= and max_bytes=, other bits neither"
            )
        if self.format is None:
            for bits in self._bits_named():
                check_grid(bits, self.group_size, self.symmetric)
            if self.int8_activations:
                check_int8_grid([8] if self.bits == "auto" else self._bits_named(), self.symmetric)
            return
        if not isinstance(self.format, Format):
            raise UserError(f"format={self.format!r}: pass a format such as torchao_qig.formats.Affine(bits=3), or a torchao config")
        plain = {f.name: f.default for f in fields(self) if f.name in ("bits", "group_size", "symmetric")}
        for name in [n for n, default in plain.items() if getattr(self, n) != default]:
            raise UserError(f"{name}={getattr(self, name)!r}: format={self.format!r} says how weights are stored; leave {name} out")
        if self.int8_activations and isinstance(self.format, Affine):
            check_int8_grid([self.format.bits], self.format.symmetric)
        if isinstance(self.format, Foreign) and self.dtype is not None:
            raise UserError(f"dtype={self.dtype!r}: has no effect with format={self.format.config!r}; leave it out")
        if self.int8_activations and isinstance(self.format, Foreign) and not isinstance(self.format.config, INT8_DYNAMIC_CONFIGS):
            names = " or ".join(c.__name__ for c in INT8_DYNAMIC_CONFIGS)
            raise UserError(f"format={self.format.config!r}: does not round activations to int8; pass {names}, or use QIGWeightOnlyConfig")

    def _bits_named(self) -> list[Any]:
        """The numbers of bits that quantized linears get; for "auto" the fewest."""
        if isinstance(self.bits, dict):
            return [b for b in self.bits.values() if b != UNQUANTIZED_BITS]
        return [LEAST_BITS_OF_AUTO if self.bits == "auto" else self.bits]

    @property
    def calibrates(self) -> bool:
        """Whether anything is chosen by means of calibration data."""
        return self.steps is None or bool(self.steps) or self.bits == "auto"

    @property
    def chosen_steps(self) -> "list[Step]":
        """The steps. Where none are named, they are those of "default"; or of "qig", where the format chooses its codes itself."""
        if self.steps is not None:
            return list(self.steps)
        from torchao_qig.methods.presets import preset

        return preset("default" if isinstance(self._format, CodedFormat) else "qig", self.int8_activations)

    @property
    def paper_rules(self) -> bool:
        """Whether the grids of the weights follow the published code (see `Equalize`)."""
        return any(step.paper_rules for step in self.steps or [])

    @property
    def activations(self) -> Activations:
        """What every quantized linear does to its input."""
        return Int8PerToken(self.paper_rules) if self.int8_activations else Float()

    @property
    def _format(self) -> Format:
        if self.format is not None:
            assert isinstance(self.format, Format)
            return self.format
        return Affine(
            self._bits_named()[0] if not isinstance(self.bits, int) and self._bits_named() else self.bits, self.group_size, self.symmetric, self.paper_rules
        )

    @property
    def form(self) -> LinearForm:
        """What every linear becomes. Where linears have different bits, `with_bits(bits).form` is what one of them becomes."""
        return LinearForm(self._format, self.activations, self.dtype)

    def with_bits(self, bits: int) -> "QIGWeightOnlyConfig":
        """The same config with this number of bits for every weight."""
        return replace(self, bits=bits, budget=None, max_bytes=None)

    @classmethod
    def paper(cls, **kwargs: Any) -> "QIGWeightOnlyConfig":
        """The published method as its released code computes it: 32 Riemann points, every candidate tried, and clamped zero points.

        Groups whose scale cannot be folded are left out. The first five groups get uniform token weights, or with int8 activations none.
        """
        made: QIGWeightOnlyConfig = cls(method="qig-paper", **kwargs)
        return made

    def for_loading(self, pre_scaled: bool) -> Any:
        """The config that a loader of the quantized model needs: it names the stored form only."""
        form = {name: getattr(self, name) for name in ("bits", "group_size", "symmetric", "dtype")}
        if isinstance(self.format, Foreign):
            form = {name: value for name, value in vars(self.format.config).items() if name in form}
        return loading_config(self._format, {**form, "int8_activations": self.int8_activations, "pre_scaled": pre_scaled})

    def public(self) -> dict[str, Any]:
        """The settings that decide the result, as plain data for JSON."""
        from torchao_qig.methods.plain import plain

        form = {name: getattr(self, name) for name in ("bits", "group_size", "symmetric", "budget", "max_bytes", "modules", "int8_activations")}
        dtype, fmt = (None if value is None else str(value) for value in (self.dtype, self.format))
        return {**form, "dtype": dtype, "format": fmt, "steps": [plain(step) for step in self.chosen_steps]}

    def __deepcopy__(self, memo: dict[int, Any]) -> "QIGWeightOnlyConfig":
        new = object.__new__(type(self))  # the copy shares loader and model, since a generator cannot be copied
        new.__dict__.update(self.__dict__)
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if not k.startswith("_")}


# A saved config says what is computed, not with which data. These settings are kept in attributes that begin with an underscore, since
# torchao's JSON and copies leave such attributes out.
RUNTIME = ("calib", "step", "device", "checkpoint_dir", "verbose", "running")
_DEFAULTS: dict[str, Any] = {"verbose": True, "running": USUAL_RUN}


def _hidden(name: str) -> Any:
    """A property that keeps its value in the attribute `_name`."""
    default = _DEFAULTS.get(name)
    return property(lambda self: self.__dict__.get(f"_{name}", default), lambda self, value: self.__dict__.__setitem__(f"_{name}", value))


for _name in RUNTIME:
    setattr(QIGWeightOnlyConfig, _name, _hidden(_name))


@dataclass
class QIGInt8DynamicActivationConfig(QIGWeightOnlyConfig):
    """Like `QIGWeightOnlyConfig`, with int8 activations: linears round their input, token by token, when they run, and multiply integers.

    `quantize_(model, QIGInt8DynamicActivationConfig(bits=4, calib=loader))`. Everything is chosen with rounded activations. `method="qig"` integrates from
    the input that the model quantized so far has to the full-precision input (8 points, without interpolation), and tries candidates on the former.

    Args, beside those of `QIGWeightOnlyConfig`:
        bits, group_size, symmetric: the defaults are 4 bits, one scale per row, and a grid centred on zero; 8 bits have to be symmetric.
        format: of torchao's configs only Int8DynamicActivationIntxWeightConfig and Int8DynamicActivationInt8WeightConfig.
    """

    bits: Any = 4
    group_size: int = -1
    symmetric: bool = True
    int8_activations: ClassVar[bool] = True
