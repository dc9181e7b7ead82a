"""What a `torchao.quantize_` with data does: find the one calibration that its configs ask for, run it, and put its result into the model."""

from typing import Any

import torch
from torch import nn

from torchao_qig._compat import Assignment, QuantizeCall
from torchao_qig.calibrate.apply import changes, commit
from torchao_qig.calibrate.record import Recorder
from torchao_qig.calibrate.result import Calibration
from torchao_qig.calibrate.run import calibrate_linears
from torchao_qig.config import RUNTIME, QIGWeightOnlyConfig
from torchao_qig.errors import UserError

RECORDER = "_qig_recorder"  # attribute of a prepared model
FORM = ("bits", "group_size", "symmetric", "dtype", "base_config", "format")  # what linears of one calibration may differ in


def _settings(config: QIGWeightOnlyConfig) -> dict[str, Any]:
    """What must be alike in all configs of one calibration: all but the form of the weights."""
    return {key: value for key, value in config.public().items() if key not in FORM}


def _running(config: QIGWeightOnlyConfig) -> dict[str, Any]:
    """The same of how it runs. Loaders and models are told apart by identity."""
    return {key: id(value) if key in ("calib", "model") else value for key in RUNTIME for value in [getattr(config, key)]}


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
        has_data = a.config.calib is not None or a.config.step is not None  # otherwise it goes with the data of the others
        if other := [key for key, value in _running(a.config).items() if has_data and value != running[key]]:
            raise UserError(f"{other[0]}: {chosen.fqn} and {a.fqn} have different ones; one call calibrates once, so pass the same to both configs")
    return chosen.config


def calibrate_all(call: QuantizeCall, assigned: list[Assignment]) -> list[nn.Linear]:
    """Calibrate, make every packed weight, and only then set them. The linears that are quantized now."""
    config = _the_one_method(assigned)
    if config.step == "prepare":
        _prepare(call, config)
        return []
    if any(not isinstance(a.config.bits, int) for a in assigned) and call.config is not config:
        raise UserError(f"bits={config.bits!r} inside {type(call.config).__name__}: pass such a config to quantize_ itself")
    root = config.model if config.model is not None else call.model
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
        found = loader if isinstance(loader, Calibration) else calibrate_linears(root, loader, config, linears)
        targets = _targets(found, linears)
        with torch.inference_mode(False), torch.no_grad():
            pre_scaled = {name for name, c in targets.items() if c.pre_scaled}
            made = changes(root, found, {name: c.form for name, c in targets.items()}, pre_scaled)
    except BaseException:
        if recorder is not None:  # still prepared: convert may be tried again
            recorder.start(root)
        raise
    commit(made)
    if recorder is not None:
        delattr(root, RECORDER)
    return [linear for name in targets if isinstance(linear := root.get_submodule(name), nn.Linear)]


def _prepare(call: QuantizeCall, config: QIGWeightOnlyConfig) -> None:
    root = config.model if config.model is not None else call.model
    if hasattr(root, RECORDER):
        raise RuntimeError("step='prepare': this model is prepared already; run it on some batches, then call quantize_ with step='convert'")
    setattr(root, RECORDER, Recorder(root))


def _targets(found: Calibration, linears: dict[str, QIGWeightOnlyConfig]) -> dict[str, QIGWeightOnlyConfig]:
    """The linears that this call quantizes, with their configs."""
    targets = {
        name: config if isinstance(config.bits, int) else config.at(int(found.grids[name][0])) for name, config in linears.items() if name in found.grids
    }
    if not targets:
        raise UserError(f"calib: the calibration covers none of the linears chosen here; it has {', '.join(found.grids) or 'none'}")
    for name, config in targets.items():
        if (described := config.form.describe()) != list(found.grids[name]):
            raise UserError(
                f"calib: {name} was calibrated for [bits, group_size, symmetric] = {found.grids[name]}, the config has {described}; calibrate again"
            )
    return targets
