"""Check that steps fit together, and that they fit the format of the weights."""

from collections.abc import Sequence
from typing import Any

from torchao_qig.errors import UserError
from torchao_qig.formats import CodedFormat, Format
from torchao_qig.methods.step import Step
from torchao_qig.methods.token_weights.weighting import Modality


def check_list(steps: Any) -> list[Step]:
    """The steps as a list. Raise if anything among them is no step."""
    if not isinstance(steps, (list, tuple)) or not all(isinstance(step, Step) for step in steps):
        raise UserError(f"steps={steps!r}: pass a list of steps such as torchao_qig.Compensate(), or method= with a name")
    return list(steps)


def check_steps(steps: Sequence[Step], fmt: Format) -> None:
    """Raise where two steps choose the same, where scales come after codes, where a format leaves no codes to choose, or where modality ratios differ."""
    before: dict[str, Step] = {}
    for step in steps:
        kind = step.decides
        if kind in before:
            raise UserError(f"steps: {before[kind]!r} and {step!r} both choose {kind}; leave one of them out")
        if kind == "scales" and "codes" in before:
            raise UserError(f"steps: {step!r} after {before['codes']!r}: codes are chosen for given scales; put scales first")
        if kind == "codes" and not isinstance(fmt, CodedFormat):
            raise UserError(f"steps: {step!r} chooses codes, which format={fmt!r} chooses itself; leave it out")
        if kind:
            before[kind] = step
    ratios = {repr(step.weighting.ratio) for step in steps if isinstance(step.weighting, Modality)}
    if len(ratios) > 1:
        raise UserError(f"steps: modality ratios of {' and '.join(sorted(ratios))}; a model has one, give it to all steps")
