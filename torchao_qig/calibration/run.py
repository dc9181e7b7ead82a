"""One calibration, from a model and its batches to a `Calibration`. The model is only read.

1. Read this rank's batches, and find the chains of blocks that the model runs.
2. With a budget: give every linear its bits.
3. Make the plan: which linears are quantized, in which chains.
4. Calibrate chain after chain (`chain.py`), in the order in which the model runs them.
5. Note the form of every linear, and the time and memory taken.
"""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from torchao_qig.calibration.chain import ChainRun, Progressed
from torchao_qig.calibration.job import Job
from torchao_qig.calibration.plan import choose
from torchao_qig.calibration.result import Calibration
from torchao_qig.errors import UserError
from torchao_qig.formats.affine import UNQUANTIZED_BITS
from torchao_qig.methods.allocate import allocate
from torchao_qig.methods.shared_weights import SharedWeights
from torchao_qig.system import peak_host_bytes
from torchao_qig.watch import ranks
from torchao_qig.watch.batches import Batch, naming, read
from torchao_qig.watch.chains import Chain, find_chains, quiet, running_order

logger = logging.getLogger(__name__)


def run(model: nn.Module, loader: Iterable[Any], job: Job) -> Calibration:
    """Calibrate the model on the loader's batches, as the job says."""
    _refuse_unlike_twins(model, job)
    with quiet(model):
        started = time.perf_counter()
        batches = _batches_of_this_rank(model, loader)
        first = next(batches)
        with naming(model, first):
            chains = find_chains(model, first)
        if job.budget is not None:
            rest = list(batches)
            _give_bits(model, job, chains, [first, *rest])
            batches = iter(rest)
        plan = choose(model, chains, job.forms, job.modules)
        logger.info("%s", plan)
        if job.verbose and ranks.rank() == 0:
            tqdm.write(str(plan), file=sys.stderr)
        done = Progressed(model, job, started)
        if job.steps:
            every = [first, *batches]
            plan.chains = _in_running_order(model, plan.chains, every)
            for chain in plan.chains:
                ChainRun(done, chain, plan).run(every, last=chain is plan.chains[-1])
            if unseen := sorted(plan.linears - done.ran):
                logger.warning("rounded to nearest, since no token reached them: %s", ", ".join(unseen))
        done.found.grids = {n: job.forms[n].describe() for n in sorted(plan.linears)}
        _describe(done)
    return done.found


def _refuse_unlike_twins(model: nn.Module, job: Job) -> None:
    """Raise where linears that share one weight should get different forms."""
    for family in SharedWeights(model, job.forms).families:
        forms = {name: job.forms[name].describe() for name in family}
        if any(form != forms[family[0]] for form in forms.values()):
            raise UserError(f"bits: {', '.join(f'{name} {form}' for name, form in forms.items())} share one weight; give them the same bits and groups")


def _batches_of_this_rank(model: nn.Module, loader: Iterable[Any]) -> Iterator[Batch]:
    """The batches that this rank calibrates with: all of its loader's, or every n-th where n ranks have the same loader."""
    every = read(model, loader)
    if not ranks.splits(loader):
        return every
    mine = [b for b in every if b.number % ranks.world() == ranks.rank()]
    if not ranks.all_agree(bool(mine)):
        raise UserError(f"calib: fewer batches than ranks ({ranks.world()}); make the batches smaller")
    return iter(mine)


def _give_bits(model: nn.Module, job: Job, chains: list[Chain], batches: list[Batch]) -> None:
    """Choose the bits of every linear within the budget. Linears that stay unquantized leave the job."""
    assert job.budget is not None
    assert job.form_at is not None
    plan = choose(model, chains, job.forms, job.modules)
    blocks = [b for c in plan.chains for b in c.names]
    bits = allocate(model, batches, blocks, sorted(plan.linears), job.form_at, job.budget)
    shared = SharedWeights(model, bits)
    bits |= {n: max(bits[other] for other in shared.family(n)) for n in bits}
    kept = {n for n, b in bits.items() if b == UNQUANTIZED_BITS}
    job.forms = {n: job.form_at(n, bits[n]) if n in bits else form for n, form in job.forms.items() if n not in kept}


def _in_running_order(model: nn.Module, chains: list[Chain], batches: list[Batch]) -> list[Chain]:
    """Sort the chains by when the model runs them, so that each can be calibrated on the outputs of the quantized chains before it."""
    if len(chains) < 2:
        return chains
    orders = ranks.gathered(running_order(model, [c.names[0] for c in chains], batches))
    order = max(orders, key=len)  # of the rank whose batches run the most chains
    return sorted(chains, key=lambda chain: order.index(chain.names[0]) if chain.names[0] in order else -1)


def _describe(done: Progressed) -> None:
    """Note in the result what the calibration took."""
    stats = done.found.stats
    stats["activation_bytes_in_files"], stats["activation_bytes_in_memory"] = done.store.filed, done.store.most
    stats["seconds"] = time.perf_counter() - done.started
    stats["samples"] = len(done.context.samples)
    stats["tokens"] = sum(int((m != 0).sum()) for m in done.found.modality)
    stats["peak_host_bytes"] = peak_host_bytes()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        stats["peak_device_bytes"] = torch.accelerator.max_memory_allocated()
    stats["versions"] = {"torch": torch.__version__}
