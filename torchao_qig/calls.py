"""The calls that use data: `calibrate`, `plan`, and the calibration inside a `quantize_` with our configs."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from torchao_qig._compat import Assignment, QuantizeCall
from torchao_qig.calibration.apply import changes, commit
from torchao_qig.calibration.job import Job
from torchao_qig.calibration.plan import Plan, make_plan, plan_to_round
from torchao_qig.calibration.result import Calibration
from torchao_qig.calibration.run import run
from torchao_qig.config import LEAST_BITS_OF_AUTO, RUNTIME, QIGWeightOnlyConfig
from torchao_qig.errors import UserError, UserTypeError
from torchao_qig.formats import LinearForm
from torchao_qig.formats.affine import UNQUANTIZED_BITS
from torchao_qig.methods.allocate import Budget
from torchao_qig.stored_config import PackedIntWeightOnlyConfig
from torchao_qig.watch.recorder import Recorder

Filter = Callable[[nn.Module, str], bool]
RECORDER = "_qig_recorder"  # attribute of a prepared model
FORM = ("bits", "group_size", "symmetric", "dtype", "format")  # settings in which the linears of one calibration may differ
MOST_BITS_OF_AUTO = 8


def calibrate(model: nn.Module, loader: Iterable[Any], config: QIGWeightOnlyConfig | None = None, filter_fn: Filter | None = None) -> Calibration:
    """Calibrate a model: choose from its runs on some batches how its linears are quantized.

    Args:
        model: any `nn.Module`; it is not changed.
        loader: batches as the model takes them: dicts (passed as keywords), tuples, tensors; a DataLoader, a datasets.Dataset.
        config: see `QIGWeightOnlyConfig`.
        filter_fn: which linears to quantize, as in torchao's `quantize_`; by default all of the decoder's blocks.

    Returns:
        The calibration. `quantize_(model, QIGWeightOnlyConfig(..., calib=calibration))` applies it.
    """
    config = config or QIGWeightOnlyConfig()
    return run(model, loader, job_of(config, dict.fromkeys(_linears(model, filter_fn), config)))


def plan(model: nn.Module, config: QIGWeightOnlyConfig | PackedIntWeightOnlyConfig, filter_fn: Filter | None = None) -> Plan:
    """Tell what `quantize_(model, config)` will do: what is quantized, what stays and why, bytes, and the memory and time of calibration.

    Nothing is quantized, and the model may lie on the meta device: shapes are enough. Where its weights are at hand and `config.calib` is
    something that can be read again (a list, a DataLoader), the first batch runs once, to see which blocks run; otherwise blocks are
    those that the model lists, and 128 samples of 1,024 tokens are assumed.

    Args:
        model, config, filter_fn: as for `quantize_` or `calibrate`.
    """
    if not isinstance(config, (QIGWeightOnlyConfig, PackedIntWeightOnlyConfig)):
        raise UserTypeError(f"config={type(config).__name__}: plan knows QIGWeightOnlyConfig, QIGInt8DynamicActivationConfig and PackedIntWeightOnlyConfig")
    names = _linears(model, filter_fn)
    if isinstance(config, PackedIntWeightOnlyConfig):  # all that the filter matches, nothing to calibrate
        return plan_to_round(model, dict.fromkeys(names, config.form))
    return make_plan(model, job_of(config, dict.fromkeys(names, config), LEAST_BITS_OF_AUTO), config.calib)


def _linears(model: nn.Module, filter_fn: Filter | None) -> list[str]:
    """The names of the linears that the filter chooses."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and (filter_fn is None or filter_fn(m, name))]


def job_of(config: QIGWeightOnlyConfig, linears: dict[str, QIGWeightOnlyConfig], bits_of_auto: int = MOST_BITS_OF_AUTO) -> Job:
    """The job that a config describes for these linears; each gets the form of its own config. `bits_of_auto`: the bits of linears that have none yet."""
    if isinstance(config.bits, dict):
        unknown = sorted(set(config.bits) - set(linears))
        if unknown:
            raise UserError(f"bits: no such linear, or not among those chosen: {', '.join(unknown)}; pass full names, as in Calibration.grids")
        linears = {n: c.with_bits(config.bits[n]) for n, c in linears.items() if config.bits.get(n, UNQUANTIZED_BITS) != UNQUANTIZED_BITS}
    budget = form_at = None
    if config.bits == "auto":
        budget = Budget(config.budget, config.max_bytes)
        asked = linears

        def form_at(name: str, bits: int) -> LinearForm:
            return asked[name].with_bits(bits).form

    forms = {n: c.form if isinstance(c.bits, int) else c.with_bits(bits_of_auto).form for n, c in linears.items()}
    return Job(
        forms, config.chosen_steps, config.activations, config.modules, budget, form_at, config.public(), config.running, config.device,
        config.checkpoint_dir, config.verbose,
    )  # fmt: skip


def _settings(config: QIGWeightOnlyConfig) -> dict[str, Any]:
    """The settings that must be equal in all configs of one calibration: all but the form of the weights."""
    return {key: value for key, value in config.public().items() if key not in FORM}


def _running(config: QIGWeightOnlyConfig) -> dict[str, Any]:
    """How a config runs, to be compared with others. Loaders and models are compared by identity."""
    known = {key: id(value) if key == "calib" else value for key in RUNTIME for value in [getattr(config, key)]}
    return known | {"running.model": id(config.running.model)}


def _the_one_method(assigned: list[Assignment]) -> QIGWeightOnlyConfig:
    """The config that says how this call calibrates; all others may differ from it in the form of the weights alone."""
    chosen = next(a for a in assigned if a.config.calib is not None or a.config.step is not None)
    if len({a.config.int8_activations for a in assigned}) > 1:
        raise UserError(
            "calib: QIGWeightOnlyConfig and QIGInt8DynamicActivationConfig with data in one FqnToConfig; calibrate each on its own"
            " (torchao_qig.calibrate with filter_fn), then call quantize_ twice, with one calibration each"
        )
    settings, running = _settings(chosen.config), _running(chosen.config)
    for a in assigned:
        theirs = _settings(a.config)
        for key in sorted(settings.keys() | theirs.keys()):
            if settings.get(key) != theirs.get(key):
                raise UserError(
                    f"{key}={settings.get(key)!r} for {chosen.fqn}, {theirs.get(key)!r} for {a.fqn}: one call calibrates in one way, and its configs"
                    f" may differ in {', '.join(FORM)} only; call quantize_ once for each"
                )
        has_data = a.config.calib is not None or a.config.step is not None  # a config without data uses those of the others
        if other := [key for key, value in _running(a.config).items() if has_data and value != running[key]]:
            raise UserError(f"{other[0]}: {chosen.fqn} and {a.fqn} have different ones; one call calibrates once, so pass the same to both configs")
    return chosen.config


def calibrate_all(call: QuantizeCall, assigned: list[Assignment]) -> list[nn.Linear]:
    """Calibrate, make every packed weight, and only then set them. Returns the linears that are quantized now."""
    config = _the_one_method(assigned)
    if config.step == "prepare":
        _prepare(call, config)
        return []
    if any(not isinstance(a.config.bits, int) for a in assigned) and call.config is not config:
        raise UserError(f"bits={config.bits!r} inside {type(call.config).__name__}: pass such a config to quantize_ itself")
    root = config.running.model if config.running.model is not None else call.model
    names = {id(m): name for name, m in root.named_modules()}
    if any(id(a.module) not in names for a in assigned):
        raise UserError(f"model: the {type(root).__name__} given does not contain the modules that quantize_ was called on; pass the whole model")
    linears = {names[id(a.module)]: a.config for a in assigned if isinstance(a.module, nn.Linear) and a.parameter == "weight"}
    loader, recorder = config.calib, getattr(root, RECORDER, None)
    if config.step == "convert" and loader is None:
        if recorder is None or not recorder.calls:
            raise RuntimeError("step='convert': nothing was recorded; call quantize_ with step='prepare' on the same model, then run it on some batches")
        loader = recorder.calls
    if recorder is not None:
        recorder.stop()
    try:
        found = loader if isinstance(loader, Calibration) else run(root, loader, job_of(config, linears))
        targets = _targets(found, linears)
        with torch.inference_mode(False), torch.no_grad():
            made = changes(root, found, {name: c.form for name, c in targets.items()})
    except BaseException:
        if recorder is not None:  # still prepared: convert may be tried again
            recorder.start(root)
        raise
    commit(made)
    if recorder is not None:
        delattr(root, RECORDER)
    return [linear for name in targets if isinstance(linear := root.get_submodule(name), nn.Linear)]


def _prepare(call: QuantizeCall, config: QIGWeightOnlyConfig) -> None:
    """Attach a `Recorder` to the model."""
    root = config.running.model if config.running.model is not None else call.model
    if hasattr(root, RECORDER):
        raise RuntimeError("step='prepare': this model is prepared already; run it on some batches, then call quantize_ with step='convert'")
    setattr(root, RECORDER, Recorder(root))


def _targets(found: Calibration, linears: dict[str, QIGWeightOnlyConfig]) -> dict[str, QIGWeightOnlyConfig]:
    """The linears that this call quantizes, with their configs."""
    targets = {
        name: config if isinstance(config.bits, int) else config.with_bits(int(found.grids[name][0])) for name, config in linears.items() if name in found.grids
    }
    if not targets:
        raise UserError(f"calib: the calibration covers none of the linears chosen here; it has {', '.join(found.grids) or 'none'}")
    for name, config in targets.items():
        if (described := config.form.describe()) != list(found.grids[name]):
            raise UserError(
                f"calib: {name} was calibrated for [bits, group_size, symmetric] = {found.grids[name]}, the config has {described}; calibrate again"
            )
    return targets
