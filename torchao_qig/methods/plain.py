"""Steps as plain data, for recipes (YAML), receipts and fingerprints: `Equalize(grid=10)` is `{"equalize": {"grid": 10, ...}}`."""

from dataclasses import fields
from typing import Any

from torchao_qig.errors import UserError
from torchao_qig.methods.compensate import Clip, Compensate
from torchao_qig.methods.equalize import Equalize
from torchao_qig.methods.smooth import Smooth
from torchao_qig.methods.step import Step
from torchao_qig.methods.token_weights.weighting import WEIGHTINGS, TokenWeighting

STEPS: dict[str, type[Step]] = {c.__name__.lower(): c for c in (Equalize, Smooth, Compensate, Clip)}


def plain(step: Step) -> dict[str, dict[str, Any]]:
    """A step with all of its settings."""
    return {type(step).__name__.lower(): _settings(step)}


def _settings(made: Any) -> dict[str, Any]:
    return {f.name: _value(getattr(made, f.name)) for f in fields(made)}


def _value(value: Any) -> Any:
    if isinstance(value, TokenWeighting):
        return {value.name: _settings(value)}
    return value


def from_plain(data: Any) -> Step:
    """Make a step from its plain data. A name alone gives the step with its default settings."""
    name, settings = _one("steps", data, STEPS)
    if isinstance(settings.get("sensitivity"), dict):
        chosen, own = _one("sensitivity", settings["sensitivity"], WEIGHTINGS)
        settings = settings | {"sensitivity": _made(WEIGHTINGS[chosen], chosen, own)}
    step = _made(STEPS[name], name, settings)
    assert isinstance(step, Step)
    return step


def _one(argument: str, data: Any, known: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Split `{name: settings}`, or a name alone, into name and settings. Raise for a name that is not in `known`."""
    if isinstance(data, str):
        data = {data: {}}
    if not (isinstance(data, dict) and len(data) == 1):
        raise UserError(f"{argument}={data!r}: write a name with its settings, such as {{{next(iter(known))}: {{}}}}")
    name, settings = next(iter(data.items()))
    settings = {} if settings is None else settings
    if name not in known or not isinstance(settings, dict):
        raise UserError(f"{argument}={data!r}: pass one of {', '.join(known)} with its settings")
    return name, settings


def _made(kind: type, name: str, settings: dict[str, Any]) -> Any:
    """An object of class `kind` with these settings. Raise for a setting that the class does not have."""
    allowed = [f.name for f in fields(kind)]
    for key in settings:
        if key not in allowed:
            raise UserError(f"steps: {name} has no setting {key!r}; it has {', '.join(allowed)}")
    return kind(**settings)
