"""Calibrate one chain of blocks.

The samples run up to the chain's first block and wait there. Then, for each block:

1. The block runs on the samples and is watched. Its outputs wait as the inputs of the next block.
2. Every step decides something about the block and writes it into the block's draft.
3. Where a step needs the inputs that the quantized model has, the same samples also run through the quantized block, which the draft makes.
"""

import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from torchao_qig.calibration import resume
from torchao_qig.calibration.job import Job
from torchao_qig.calibration.plan import Plan
from torchao_qig.calibration.quantized_model import running_quantized
from torchao_qig.calibration.result import Calibration
from torchao_qig.errors import UserError
from torchao_qig.formats import LinearForm
from torchao_qig.methods import Context
from torchao_qig.methods.draft import Draft
from torchao_qig.methods.fold import Folds
from torchao_qig.methods.per_sample import modalities
from torchao_qig.methods.shared_weights import SharedWeights
from torchao_qig.methods.token_weights.modality import Ratios
from torchao_qig.methods.token_weights.weighting import Modality
from torchao_qig.watch import ranks
from torchao_qig.watch.batches import Batch, naming
from torchao_qig.watch.block import Block
from torchao_qig.watch.chains import Chain, NotRun
from torchao_qig.watch.groups import join, linears_in
from torchao_qig.watch.quantized_stream import QuantizedStream
from torchao_qig.watch.store import Store
from torchao_qig.watch.stream import MicroBatch, Stream

logger = logging.getLogger(__name__)


@dataclass
class Progressed:
    """How far a calibration has come.

    Attributes:
        started: the time when it began.
        found: the result so far.
        ran: names of the linears that have run.
        not_plain: names of linears that do more than multiply, which stay as they are.
        quantized: for each block of the finished chains, what its linears become, by their names in the block.
    """

    model: nn.Module
    job: Job
    started: float
    ran: set[str] = field(default_factory=set)
    not_plain: set[str] = field(default_factory=set)
    quantized: dict[str, dict[str, LinearForm]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.found = Calibration(settings=self.job.settings)
        self.store = Store(self.job.running.max_host_memory)
        folds = Folds(self.model) if self.job.needs.sample else None
        shared = SharedWeights(self.model, self.job.forms)
        self.context = Context(self.model, shared, None, {}, folds, Ratios(), self.found.weights)


class ChainRun:
    """The calibration of one chain."""

    def __init__(self, done: Progressed, chain: Chain, plan: Plan) -> None:
        self.done, self.chain, self.plan = done, chain, plan
        self.model, self.job, self.found, self.context = done.model, done.job, done.found, done.context
        self.stream = Stream(self.model, chain, self._device(), done.store)
        self.context.points, self.context.second = {}, None  # frees the memory that the chain before has used

    def run(self, batches: list[Batch], last: bool) -> None:
        """Calibrate all blocks of the chain. `last`: no other chain follows, so `batches` is emptied once its samples are captured."""
        self._fill(self.stream, batches)
        if not ranks.all_agree(bool(self.stream.pieces)):
            self._leave()
            return
        self._number_samples()
        self._measure_modalities(batches)
        if self.job.needs.second_stream or (self.job.needs.between_blocks and not self.chain.whole_model):
            self.context.second = self._second_stream(batches)
        if last:
            batches.clear()  # large images are no longer needed
        finished, progress = self._resume()
        hidden = not self.job.verbose or ranks.rank() > 0
        with tqdm(total=len(self.chain.names), initial=finished, desc="calibrating", unit="block", disable=hidden) as bar:
            for index, name in enumerate(self.chain.names):
                if index >= finished:
                    began = time.perf_counter()
                    gain = self.run_block(name)
                    self.found.stats.setdefault("block_seconds", []).append(time.perf_counter() - began)
                    if gain is not None:
                        bar.set_postfix_str(f"loss {gain:+.1%}")
                    bar.update()
                self.stream.next_block()
                if self.context.second:
                    self.context.second.quantized.next_block()
                if progress is not None and index >= finished:
                    progress.save(index + 1, self.found.of_block(name), [piece.hidden for piece in self._waiting()], self._notes())
        self.plan.linears -= self.done.not_plain
        self.done.quantized |= {name: forms for name in self.chain.names if (forms := self._forms_in(name))}
        self.found.modality = modalities(self.stream.pieces) or self.found.modality

    def run_block(self, name: str) -> float | None:
        """Calibrate one block. Returns the relative change of its error against rounding to nearest, None where it was not measured."""
        forms, second, job = self._forms_in(name), self.context.second, self.job
        block = Block(self.model.get_submodule(name), forms, self.stream, job.computes_in(self.stream.device), job.needs)
        block.observe()
        self.done.ran |= {join(name, n) for state in block.groups for n in state.group.linears}
        if block.not_plain:
            self.done.not_plain |= {join(name, n) for n in block.not_plain}
            logger.warning("left as they are, since they do more than a linear: %s", ", ".join(join(name, n) for n in sorted(block.not_plain)))
        draft = Draft(self.model, name, {n: form for n, form in forms.items() if n not in block.not_plain})
        draft.name_groups(state.group for state in block.groups)
        if draft.forms:
            for number, step in enumerate(job.steps):
                step.run(block, draft, self.context)
                if not any(later.replays for later in job.steps[number + 1 :]):
                    for state in block.groups:
                        state.keep_inputs_only()
        if second:  # the samples also go through a block in which nothing is quantized
            second.advance(block, draft.made or (draft.module(block.exact, block.device) if draft.forms else block.exact))
        self.found.add(draft)
        return draft.relative_gain()

    # Before the first block

    def _device(self) -> torch.device:
        if self.job.device is not None:
            return torch.device(self.job.device)
        devices = {p.device for p in self.model.get_submodule(self.chain.names[0]).parameters()}
        if any(d.type == "meta" for d in devices):
            raise UserError(
                f"model: {self.chain.names[0]} has weights on the meta device (offloaded by accelerate?); load the model on the CPU and pass device="
            )
        return next(iter(devices), torch.device("cpu"))

    def _fill(self, stream: Stream, batches: list[Batch]) -> None:
        """Capture the batches that go through the chain."""
        for batch in batches:
            with naming(self.model, batch), suppress(NotRun):
                stream.add(batch, self.job.running.micro_batch)

    def _leave(self) -> None:
        """Leave the chain's linears as they are, since no batch runs them. (A model may use a linear's weight without calling the linear.)"""
        idle = {n for n in self.plan.linears if any(n == c or n.startswith(f"{c}.") for c in self.chain.names)}
        self.plan.linears -= idle
        logger.warning("left as they are, since no batch runs them: %s", ", ".join(sorted(idle)))

    def _number_samples(self) -> None:
        """Number the samples in an order that all ranks share."""
        mine = [(p.batch, row) for p in self.stream.pieces for row in p.rows]
        self.context.samples = {key: i for i, key in enumerate(sorted(key for keys in ranks.gathered(mine) for key in keys))}

    def _measure_modalities(self, batches: list[Batch]) -> None:
        """Measure MBQ's ratios, if a step weighs tokens by modality."""
        asked = [w for s in self.job.steps if isinstance(w := s.weighting, Modality)]
        if asked:
            self.context.ratios = Ratios.measured(self.model, self.chain, self.plan.linears, batches, self.stream.pieces, asked[0].ratio)

    def _second_stream(self, batches: list[Batch]) -> QuantizedStream:
        """The second stream before the chain's first block: the samples as they arrive there when all chains before are quantized."""
        if not self.done.quantized:
            return QuantizedStream(self.stream)
        quantized = self.stream.empty()
        with running_quantized(self.model, self.done.quantized, self.found):
            self._fill(quantized, batches)
        return QuantizedStream(self.stream, quantized)

    def _forms_in(self, block: str) -> dict[str, LinearForm]:
        """What the quantized linears of a block become, by their names in the block."""
        return {n: self.job.forms[join(block, n)] for n in linears_in(self.model.get_submodule(block)) if join(block, n) in self.plan.linears}

    # Saving progress, and resuming from it

    def _waiting(self) -> list[MicroBatch]:
        """The micro-batches of both streams that have a hidden state. Between two blocks, nothing else of the samples has to be saved."""
        second = self.context.second
        return [p for s in (self.stream, *([second.quantized] if second else [])) for p in s.pieces if p.hidden is not None]

    def _notes(self) -> dict[str, Any]:
        """What a resumed run has to know beside results and hidden states."""
        times = {"block_seconds": self.found.stats["block_seconds"], "seconds": time.perf_counter() - self.done.started}
        sets = {"ran": sorted(self.done.ran), "not_plain": sorted(self.done.not_plain)}
        return {"weighed": self.context.weighed, "points": self.context.points, **sets, **times}

    def _resume(self) -> tuple[int, resume.Progress | None]:
        """Load what an earlier run finished. Returns the number of its blocks, and where to save progress (None without checkpoint_dir)."""
        job, done = self.job, self.done
        if job.checkpoint_dir is None:
            return 0, None
        hidden = [p.hidden for p in self.stream.pieces if p.hidden is not None]
        settings = job.settings | {"linears": {n: form.describe() for n, form in job.forms.items()}}
        data = ranks.gathered(resume.fingerprint_of_data(hidden))
        marks = {"settings": settings, "model": resume.fingerprint_of_model(self.model), "data": data}
        progress = resume.Progress(Path(job.checkpoint_dir) / (self.chain.names[0] or "model"), marks)
        finished = progress.done()
        if finished:
            found, states, notes = progress.load(finished)
            for part in found:
                self.found.add(part)
            self.context.weighed, self.context.points = notes["weighed"], notes["points"]
            done.ran, done.not_plain = set(notes["ran"]), set(notes["not_plain"])
            self.found.stats["block_seconds"] = notes["block_seconds"]
            done.started = min(done.started, time.perf_counter() - notes["seconds"])
            for piece, state in zip(self._waiting(), states, strict=True):
                piece.hidden = self.stream.store.put(state)
            logger.info("continuing after block %d of %d", finished, len(self.chain.names))
        return finished, progress
