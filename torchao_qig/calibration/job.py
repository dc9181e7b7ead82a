"""`Job`: what one calibration has to do, in terms of formats and steps. `calls.py` makes a job from a config."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from torchao_qig.formats import Activations, LinearForm
from torchao_qig.methods import Step
from torchao_qig.methods.allocate import Budget
from torchao_qig.running import Running
from torchao_qig.watch.block import Needs


@dataclass
class Job:
    """One calibration.

    Attributes:
        forms: what every chosen linear becomes, by its name.
        steps: what the calibration decides, in this order.
        activations: what all of these linears do to their inputs.
        modules: names of modules that linears have to lie in; None: the decoder's blocks.
        budget: for `bits="auto"`: the bits of all linears are first chosen within this budget.
        form_at: for `bits="auto"`: what the linear of a name becomes at a number of bits.
        settings: what the result says about how it was made.
        running: rarer options.
        device: where blocks are computed; None: on the device that they are on.
        checkpoint_dir: a directory for the progress, from which an interrupted calibration continues.
        verbose: show the plan and a progress bar.
    """

    forms: dict[str, LinearForm]
    steps: list[Step]
    activations: Activations
    modules: list[str] | None = None
    budget: Budget | None = None
    form_at: Callable[[str, int], LinearForm] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    running: Running = field(default_factory=Running)
    device: Any = None
    checkpoint_dir: Any = None
    verbose: bool = True

    @cached_property
    def needs(self) -> Needs:
        """What has to be recorded for the steps together."""
        needs = Needs()
        for step in self.steps:
            needs |= step.needs(self.activations)
        return needs

    @property
    def two_streams(self) -> bool:
        """Whether the samples also run through the model as it has been quantized so far."""
        return self.needs.second_stream or self.needs.between_blocks

    def computes_in(self, device: torch.device) -> torch.dtype:
        """The dtype in which losses and gradients are computed on this device."""
        if self.running.compute_dtype is not None:
            return self.running.compute_dtype
        if self.needs.float32 or self.activations.rounds:  # bfloat16 rounds as coarsely as int8
            return torch.float32
        fast = torch.cpu._is_amx_tile_supported() if device.type == "cpu" else True
        return torch.bfloat16 if fast else torch.float32
