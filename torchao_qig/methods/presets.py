"""Known methods by name, each as a list of steps: `QIGWeightOnlyConfig(method="awq")`.

AWQ and MBQ search the same candidates at the same outputs as QIG. What differs is how much an error at each token counts, and AWQ's loss.
"""

from collections.abc import Callable

from torchao_qig.errors import UserError
from torchao_qig.methods.compensate import Clip, Compensate
from torchao_qig.methods.equalize import Equalize
from torchao_qig.methods.smooth import Smooth
from torchao_qig.methods.step import Step
from torchao_qig.methods.token_weights.weighting import QIG


def _paper(int8_activations: bool) -> list[Step]:
    """QIG as its released code computes it."""
    weighting = QIG("riemann", 32, 0 if int8_activations else 5)
    return [Equalize(weighting, "mae", search="exhaustive", pre_scale=False, paper_rules=True)]


PRESETS: dict[str, Callable[[bool], list[Step]]] = {
    "default": lambda int8: [Compensate()],
    "rtn": lambda int8: [],  # rounded to nearest
    # equalization scales alone
    "awq": lambda int8: [Equalize("uniform", "mse")],
    "mbq": lambda int8: [Equalize("modality")],
    "smoothquant": lambda int8: [Smooth()],
    "qig": lambda int8: [Equalize("qig")],
    "qig-paper": _paper,
    # codes alone
    "gptq": lambda int8: [Compensate(repair=0.0, sweeps=0)],
    "gptq-modality": lambda int8: [Compensate("modality", repair=0.0, sweeps=0)],
    "gptaq": lambda int8: [Compensate(sweeps=0)],
    "default+clip": lambda int8: [Compensate(clip=True)],
    "default+qig-weights": lambda int8: [Compensate("qig")],
    # scales, then codes
    "qig+clip": lambda int8: [Equalize("qig"), Clip("qig")],
    "qig+gptq": lambda int8: [Equalize("qig"), Compensate("qig", repair=0.0, sweeps=0)],
    "default+qig": lambda int8: [Equalize("qig"), Compensate("qig")],
}


def preset(name: str, int8_activations: bool = False) -> list[Step]:
    """The steps of the method with this name."""
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"method={name!r}: pass one of {', '.join(PRESETS)}, or steps=[...]")
    return PRESETS[name](int8_activations)
