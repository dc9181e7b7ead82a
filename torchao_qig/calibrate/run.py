"""`calibrate`: the whole way from a model and its batches to a `Calibration`. The model is only read."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from torchao_qig.calibrate import gather, modality, ranks, resume, search
from torchao_qig.calibrate.allocate import allocate
from torchao_qig.calibrate.batches import Batch, naming, read
from torchao_qig.calibrate.block import CHEAP, DEAR, Block
from torchao_qig.calibrate.chains import Chain, NotRun, find_chains, quiet, running_order
from torchao_qig.calibrate.distort import Distortion, running_quantized
from torchao_qig.calibrate.draft import Draft
from torchao_qig.calibrate.fold import Fold, Folds, SmallRun
from torchao_qig.calibrate.groups import Group, join, labels, linears_in
from torchao_qig.calibrate.int8 import Int8Block, smoothing_scale
from torchao_qig.calibrate.plan import Plan, choose
from torchao_qig.calibrate.result import Calibration, GroupResult
from torchao_qig.calibrate.rounding import Rounding
from torchao_qig.calibrate.shared import SharedWeights
from torchao_qig.calibrate.store import Store
from torchao_qig.calibrate.stream import Piece, Stream
from torchao_qig.calibrate.work import Work
from torchao_qig.config import FULL, QIGWeightOnlyConfig
from torchao_qig.errors import UserError
from torchao_qig.formats import LinearForm
from torchao_qig.system import peak_host_bytes

logger = logging.getLogger(__name__)

Filter = Callable[[nn.Module, str], bool]
PARTS = {DEAR: 8, CHEAP: 2}  # share of the block's weights that an evaluation uses -> the coarse search looks at every 8th, 2nd sample


def calibrate(model: nn.Module, loader: Iterable[Any], config: QIGWeightOnlyConfig | None = None, filter_fn: Filter | None = None) -> Calibration:
    """Choose equalization scales for the linears of a model from its runs on some batches.

    Args:
        model: any `nn.Module`; it is not changed.
        loader: batches as the model takes them: dicts (passed as keywords), tuples, tensors; a DataLoader, a datasets.Dataset.
        config: see `QIGWeightOnlyConfig`.
        filter_fn: as in torchao's `quantize_`: which linears; by default all of the decoder's blocks.
    """
    config = config or QIGWeightOnlyConfig()
    chosen = filter_fn or (lambda m, name: isinstance(m, nn.Linear))
    linears = {name: config for name, m in model.named_modules() if isinstance(m, nn.Linear) and chosen(m, name)}
    return calibrate_linears(model, loader, config, linears)


def calibrate_linears(model: nn.Module, loader: Iterable[Any], config: QIGWeightOnlyConfig, linears: dict[str, QIGWeightOnlyConfig]) -> Calibration:
    """The same for these linears, each with the grid of its own config."""
    if isinstance(config.bits, dict):
        unknown = sorted(set(config.bits) - set(linears))
        if unknown:
            raise UserError(f"bits: no such linear, or not among those chosen: {', '.join(unknown)}; pass full names, as in Calibration.grids")
        linears = {n: c.at(config.bits[n]) for n, c in linears.items() if config.bits.get(n, FULL) != FULL}
    for family in SharedWeights(model, linears).families:
        forms = {name: linears[name].form.describe() for name in family}
        if any(form != forms[family[0]] for form in forms.values()):
            raise UserError(f"bits: {', '.join(f'{name} {form}' for name, form in forms.items())} share one weight; give them the same bits and groups")
    with quiet(model):
        return Run(model, config, linears).run(loader)


class Run:
    """One calibration."""

    def __init__(self, model: nn.Module, config: QIGWeightOnlyConfig, linears: dict[str, QIGWeightOnlyConfig]) -> None:
        self.model, self.config, self.linears = model, config, linears
        self.found = Calibration(settings=config.public())
        self.started = time.perf_counter()
        self.folds = Folds(model) if config.fold and config.equalizes else None  # no scales, nothing to fold
        self.ran: set[str] = set()  # linears that took part
        self.odd: set[str] = set()  # linears that do more than multiply, which stay
        self.shared = SharedWeights(model, linears)
        self.done: dict[str, dict[str, LinearForm]] = {}  # blocks of the chains before: what of them is quantized, by name in the block
        self.searched = 0  # groups so far
        self.distortion: Distortion | None = None
        self.store = Store(config.max_host_memory)
        self.steps: dict[str, int] = {}  # points of the Gauss rule, by group
        self.samples: dict[tuple[int, int], int] = {}
        self.ratios = modality.Ratios()
        self.cuttable = False

    def run(self, loader: Iterable[Any]) -> Calibration:
        batches = self._mine(loader)
        first = next(batches)
        with naming(self.model, first):
            chains = find_chains(self.model, first)
        if self.config.bits == "auto":
            rest = list(batches)
            self._allocate(chains, [first, *rest])
            batches = iter(rest)
        plan = choose(self.model, chains, self.linears, self.config)
        logger.info("%s", plan)
        if self.config.verbose and ranks.rank() == 0:
            tqdm.write(str(plan), file=sys.stderr)
        if self.config.equalizes or self.config.rounds:
            every = [first, *batches]
            plan.chains = self._in_order(plan.chains, every)
            self._run_chains(plan, every)
        self.found.grids = {n: self.linears[n].form.describe() for n in sorted(plan.linears)}
        self._describe()
        return self.found

    def _mine(self, loader: Iterable[Any]) -> Iterator[Batch]:
        """This rank's batches."""
        every = read(self.model, loader)
        if not ranks.splits(loader):
            return every
        mine = [b for b in every if b.number % ranks.world() == ranks.rank()]
        if not ranks.all_agree(bool(mine)):
            raise UserError(f"calib: fewer batches than ranks ({ranks.world()}); make the batches smaller")
        return iter(mine)

    def _allocate(self, chains: list[Chain], batches: list[Batch]) -> None:
        """Give every linear its bits; those that keep all of theirs are not calibrated."""
        plan = choose(self.model, chains, {n: c.at(8) for n, c in self.linears.items()}, self.config)
        configs = {n: self.linears[n] for n in sorted(plan.linears)}
        bits = allocate(self.model, batches, [b for c in plan.chains for b in c.names], configs)
        shared = SharedWeights(self.model, bits)
        bits |= {n: max(bits[other] for other in shared.family(n)) for n in bits}
        self.linears = {n: c.at(bits.get(n, 8)) for n, c in self.linears.items() if bits.get(n) != FULL}

    def _in_order(self, chains: list[Chain], batches: list[Batch]) -> list[Chain]:
        """The chains as the model runs them, so that each is calibrated on what those before it have become."""
        if len(chains) < 2:
            return chains
        orders = ranks.gathered(running_order(self.model, [c.names[0] for c in chains], batches))
        order = max(orders, key=len)  # of a rank whose batches run all of them
        return sorted(chains, key=lambda chain: order.index(chain.names[0]) if chain.names[0] in order else -1)

    def _run_chains(self, plan: Plan, batches: list[Batch]) -> None:
        for chain in plan.chains:
            self._run_chain(chain, plan, batches, last=chain is plan.chains[-1])
        unseen = sorted(plan.linears - self.ran)
        if unseen:
            logger.warning("rounded to nearest, since no token reached them: %s", ", ".join(unseen))

    # One chain of blocks

    def _run_chain(self, chain: Chain, plan: Plan, batches: list[Batch], last: bool) -> None:
        device = self._device(chain)
        self.steps = {}
        self.distortion = None  # the last chain's memory is free
        stream = Stream(self.model, chain, device, self.store)
        for batch in batches:
            with naming(self.model, batch), suppress(NotRun):
                stream.add(batch, self.config.micro_batch)
        if not ranks.all_agree(bool(stream.pieces)):
            self._leave(chain, plan)
            return
        self._number_samples(stream)
        self.cuttable = stream.cuttable
        if self.config.weighting == "modality":
            self.ratios = modality.Ratios.measured(self.model, chain, plan.linears, batches, stream.pieces, self.config.modality_ratio)
        apart = self.config.compensates or (self.config.on_quantized_inputs and (self.config.int8_activations or not chain.whole_model))
        self.distortion = self._second_stream(stream, batches) if apart else None
        if last:
            batches.clear()  # large images are no longer needed
        done, progress = self._resume(stream, chain)
        bar = tqdm(total=len(chain.names), initial=done, desc="calibrating", unit="block", disable=not self.config.verbose or ranks.rank() > 0)
        with bar:
            for index, name in enumerate(chain.names):
                if index >= done:
                    began = time.perf_counter()
                    gain = self._run_block(name, plan, stream)
                    self.found.stats.setdefault("block_seconds", []).append(time.perf_counter() - began)
                    if gain is not None:
                        bar.set_postfix_str(f"loss {gain:+.1%}")
                    bar.update()
                stream.next_block()
                if self.distortion:
                    self.distortion.quantized.next_block()
                if progress is not None and index >= done:
                    hidden = self._hidden(stream)
                    times = {"block_seconds": self.found.stats["block_seconds"], "seconds": time.perf_counter() - self.started}
                    notes = {"searched": self.searched, "steps": self.steps, "ran": sorted(self.ran), "odd": sorted(self.odd), **times}
                    progress.save(index + 1, self.found.of_block(name), hidden, notes)
        plan.linears -= self.odd
        self.done |= {name: mine for name in chain.names if (mine := self._mine_of(name, plan))}
        self.found.modality = gather.modalities(stream.pieces) or self.found.modality

    def _second_stream(self, stream: Stream, batches: list[Batch]) -> Distortion:
        """The samples as the model gives them to this chain with all chains before it quantized."""
        if not self.done:
            return Distortion(stream)
        quantized = stream.empty()
        with running_quantized(self.model, self.done, self.found):
            for batch in batches:
                with naming(self.model, batch), suppress(NotRun):
                    quantized.add(batch, self.config.micro_batch)
        return Distortion(stream, quantized)

    def _mine_of(self, block: str, plan: Plan) -> dict[str, LinearForm]:
        """The linears of a block that are quantized, by name in it."""
        return {n: self.linears[join(block, n)].form for n in linears_in(self.model.get_submodule(block)) if join(block, n) in plan.linears}

    def _leave(self, chain: Chain, plan: Plan) -> None:
        """No batch goes through this chain: its linears stay. (A linear may also be used without being called.)"""
        idle = {n for n in plan.linears if any(n == c or n.startswith(f"{c}.") for c in chain.names)}
        plan.linears -= idle
        logger.warning("left as they are, since no batch runs them: %s", ", ".join(sorted(idle)))

    def _device(self, chain: Chain) -> torch.device:
        if self.config.device is not None:
            return torch.device(self.config.device)
        devices = {p.device for p in self.model.get_submodule(chain.names[0]).parameters()}
        if any(d.type == "meta" for d in devices):
            raise UserError(f"model: {chain.names[0]} has weights on the meta device (offloaded by accelerate?); load the model on the CPU and pass device=")
        return next(iter(devices), torch.device("cpu"))

    def _number_samples(self, stream: Stream) -> None:
        mine = [(p.batch, row) for p in stream.pieces for row in p.rows]
        self.samples = {key: i for i, key in enumerate(sorted(key for keys in ranks.gathered(mine) for key in keys))}

    def _part(self, pieces: list[Piece], share: float) -> dict[int, list[int]]:
        """Per piece the rows that the coarse search looks at: every row where there are few, or where they are cheap to evaluate."""
        step = next((n for least, n in PARTS.items() if share > least), 1)
        step = step if len(self.samples) >= 8 else 1
        part = {i: [r for r, row in enumerate(p.rows) if self.samples[p.batch, row] % step == 0] for i, p in enumerate(pieces)}
        return part if self.cuttable else {i: list(range(len(pieces[i].rows))) if rows else [] for i, rows in part.items()}

    def _hidden(self, stream: Stream) -> list[Tensor]:
        """All that has to be kept of the samples between two blocks."""
        return [piece.hidden for piece in self._pieces(stream)]

    def _pieces(self, stream: Stream) -> list[Piece]:
        """Those of both streams that have a hidden state."""
        return [p for s in (stream, *([self.distortion.quantized] if self.distortion else [])) for p in s.pieces if p.hidden is not None]

    def _resume(self, stream: Stream, chain: Chain) -> tuple[int, resume.Progress | None]:
        if self.config.checkpoint_dir is None:
            return 0, None
        hidden = [p.hidden for p in stream.pieces if p.hidden is not None]
        shown = {k: v for k, v in self.config.public().items()} | {"linears": {n: c.form.describe() for n, c in self.linears.items()}}
        data = ranks.gathered(resume.fingerprint_of_data(hidden))
        marks = {"settings": shown, "model": resume.fingerprint_of_model(self.model), "data": data}
        progress = resume.Progress(Path(self.config.checkpoint_dir) / (chain.names[0] or "model"), marks)
        done = progress.done()
        if done:
            found, states, notes = progress.load(done)
            for part in found:
                self.found.add(part)
            self.searched, self.steps, self.ran, self.odd = notes["searched"], notes["steps"], set(notes["ran"]), set(notes["odd"])
            self.found.stats["block_seconds"] = notes["block_seconds"]
            self.started = min(self.started, time.perf_counter() - notes["seconds"])
            for piece, state in zip(self._pieces(stream), states, strict=True):
                piece.hidden = stream.store.put(state)
            logger.info("continuing after block %d of %d", done, len(chain.names))
        return done, progress

    # One block

    def _run_block(self, name: str, plan: Plan, stream: Stream) -> float | None:
        """Calibrate one block; the relative change of its loss."""
        module = self.model.get_submodule(name)
        mine = self._mine_of(name, plan)
        rounders = {n: form.rounder(module.get_submodule(n).weight.dtype) for n, form in mine.items()}
        given = module, rounders, stream, self.config, self.config.computes_in(stream.device), self.steps
        if self.config.int8_activations:
            block: Block = Int8Block(*given, products={n: form.product(module.get_submodule(n).weight.dtype) for n, form in mine.items()})
        else:
            block = Block(*given)
        finder = self.folds.finder(module, block.exact, SmallRun(stream), block.device, list(mine)) if mine and self.folds else None
        block.observe()
        self.ran |= {join(name, n) for w in block.works for n in w.group.linears}
        if block.odd:
            self.odd |= {join(name, n) for n in block.odd}
            mine = {n: form for n, form in mine.items() if n not in block.odd}
            logger.warning("left as they are, since they do more than a linear: %s", ", ".join(join(name, n) for n in sorted(block.odd)))
        if not mine:  # the samples go through it all the same
            if self.distortion:
                self.distortion.advance(block, block.exact)
            return None
        groups = [w.group for w in block.works]
        folds = self.folds.find(finder, groups) if finder and self.folds else dict.fromkeys(groups)
        names = dict(zip(groups, labels(groups, name), strict=True))
        results: list[GroupResult] = []
        for work in block.works:
            ties = any(join(name, n) in self.shared for n in work.group.linears)
            placed = self.config.equalizes and not ties and (folds[work.group] is not None or self.config.pre_scale)
            if placed or self.config.rounds:
                self._prepare(block, work, name, mine, placed)
            if placed:
                results.append(self._run_group(block, work, names[work.group], name, folds[work.group]))
            work.only_inputs() if self.config.rounds else work.parts.clear()
        if self.config.rounds:
            bent = self._round(block, name, results, mine, names)
        elif self.distortion:
            bent = Draft.of(self.model, name, mine, self.found).module(block.exact, block.device)
        if self.distortion:
            self.distortion.advance(block, bent)
        errors = [self.found.squared_errors[label] for label in names.values()] if self.config.rounds else [(r.rounding_loss, r.loss) for r in results]
        before, after = (sum(losses) for losses in zip(*errors, strict=True)) if errors else (0.0, 0.0)
        return after / before - 1 if before > 0 else None

    def _prepare(self, block: Block, work: Work, name: str, mine: dict[str, LinearForm], placed: bool) -> None:
        """Give a group its token weights, and the inputs that candidates are tried on."""
        int8 = self.config.int8_activations  # token weights are then about those inputs
        if not int8:
            self._weigh(block, work, name)
        routed = all(part.layout.rows is not None for part in work.parts)
        if self.distortion and self.config.on_quantized_inputs and (placed or int8) and not routed:
            self.distortion.feed(block, Draft.of(self.model, name, mine, self.found).module(block.exact, block.device), work)
        if int8:
            self._weigh(block, work, name)

    def _run_group(self, block: Block, work: Work, label: str, block_name: str, fold: Fold | None) -> GroupResult:
        pieces = block.stream.pieces
        x_mean = work.x_mean(block.weight(work.group.linears[0]).shape[1], block.device)
        part = self._part(pieces, block.share(work.group))
        ratio, winner, losses, scale = self._smoothed(block, work, part) or self._searched(block, work, x_mean, part)
        weights = gather.token_weights(work, pieces)
        if weights is not None:
            self.found.tokens[label], self.found.completeness[label] = weights
        result = GroupResult(
            label=label, block=block_name, linears=[join(block_name, n) for n in work.group.linears], inspected=join(block_name, work.group.inspected),
            weighting=work.weighting, fold_kind=fold.kind if fold else "act_pre_scale", fold_into=join(block_name, fold.producer) if fold else "",
            ratio=ratio, winner=winner, losses=losses, x_mean=x_mean.cpu(), scale=scale.cpu(),
        )  # fmt: skip
        self.found.groups[label] = result
        return result

    def _searched(self, block: Block, work: Work, x_mean: Tensor, part: dict[int, list[int]]) -> tuple[float, int, dict[int, float], Tensor]:
        """Ratio, number, losses and scale of the winning candidate."""
        winner, losses = block.search(work, x_mean, part)
        ratio = search.ratios(self.config.grid)[winner]
        return ratio, winner, losses, search.scale_for(x_mean, ratio)

    def _smoothed(self, block: Block, work: Work, part: dict[int, list[int]]) -> tuple[float, int, dict[int, float], Tensor] | None:
        """The same for SmoothQuant, whose scale is not searched; None where it was not asked for."""
        alpha = self.config.smoothing
        if alpha is None:
            return None
        scale = smoothing_scale(work, [block.weight(n) for n in work.group.linears], alpha)
        evaluate, _ = block.evaluator(work, [None, scale], part)
        with torch.no_grad():
            return alpha, 1, dict(enumerate(evaluate([0, 1], False))), scale

    def _weigh(self, block: Block, work: Work, block_name: str) -> None:
        warming_up = self.searched < self.config.warmup_groups
        self.searched += 1
        sensitivity = "uniform" if warming_up or self.config.weighting is None else self.config.weighting
        block.weigh(work, sensitivity, self.ratios.of(join(block_name, work.group.inspected)), self.ratios.counts)

    def _round(self, block: Block, name: str, results: list[GroupResult], mine: dict[str, LinearForm], names: dict[Group, str]) -> nn.Module:
        """Choose the integers of a block; what it becomes."""
        rounding = Rounding(self.model, block, name, results, mine, self.distortion if self.config.compensates else None)
        for work in block.works:
            decided = {n: source for n in work.group.linears if (source := self.shared.decided(join(name, n), self.found.weights)) is not None}
            packed, self.found.squared_errors[names[work.group]] = rounding.round(work, {n: self.found.weights[source] for n, source in decided.items()})
            self.found.weights |= packed
            work.parts.clear()
        return rounding.bent

    def _describe(self) -> None:
        stats = self.found.stats
        stats["activation_bytes_in_files"], stats["activation_bytes_in_memory"] = self.store.filed, self.store.most
        stats["seconds"] = time.perf_counter() - self.started
        stats["samples"] = len(self.samples)
        stats["tokens"] = sum(int((m != 0).sum()) for m in self.found.modality)
        stats["peak_host_bytes"] = peak_host_bytes()
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is not None:
            stats["peak_device_bytes"] = torch.accelerator.max_memory_allocated()
        stats["versions"] = {"torch": torch.__version__}
