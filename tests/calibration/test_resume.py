"""Calibrations that are interrupted, killed, short of memory, or spread over ranks find the same."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.calibration.test_run import SCALES, assert_same, assert_untouched, build, calibrate, state_of
from tests.plain_models import Block, Decoder, Experts, tokens
from tests.ranks import in_ranks
from torchao_qig import Calibration, Running
from torchao_qig.calibration.chain import ChainRun


def continued(model: nn.Module, attempt: Callable[[], Calibration], monkeypatch: pytest.MonkeyPatch) -> Calibration:
    """What `attempt` finds after it was stopped in every one of three blocks in turn; finished blocks are not redone."""
    original, ran = ChainRun.run_block, []

    def stopping(self: ChainRun, name: str) -> Any:
        ran.append(name)
        if ran.count(name) == 1:
            raise KeyboardInterrupt
        return original(self, name)

    monkeypatch.setattr(ChainRun, "run_block", stopping)
    before = state_of(model)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            attempt()
        assert_untouched(model, before)
    found = attempt()
    assert ran == ["blocks.0", "blocks.0", "blocks.1", "blocks.1", "blocks.2", "blocks.2"]
    return found


@pytest.mark.parametrize("settings", [{}, {"steps": [SCALES(propagate_error=True)]}], ids=["original inputs", "quantized inputs"])
def test_interrupted_and_continued(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in every block in turn and started again: the same bits as in one go, and finished blocks are not redone."""
    model, batches = build(3), [tokens(3, 9), tokens(2, 6)]
    expected = calibrate(model, batches, **settings)
    assert_same(continued(model, lambda: calibrate(model, batches, checkpoint_dir=tmp_path, **settings), monkeypatch), expected, exactly=True)


def test_killed_and_continued(tmp_path: Path) -> None:
    """The process dies without a chance to tidy up; another one goes on."""
    killed = (
        "import os, sys; from tests.calibration.test_resume import *\n"
        "original = ChainRun.run_block\n"
        "ChainRun.run_block = lambda self, name: os._exit(9) if name == 'blocks.1' else original(self, name)\n"
        "torch.set_num_threads(1); calibrate(build(3), [tokens(3, 9)], checkpoint_dir=sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", killed, str(tmp_path)], check=False, capture_output=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 9
    assert (tmp_path / "blocks.0" / "manifest.json").exists()
    assert_same(calibrate(build(3), [tokens(3, 9)], checkpoint_dir=tmp_path), calibrate(build(3), [tokens(3, 9)]), exactly=True)


@pytest.mark.parametrize("change", ["settings", "model", "data"])
def test_checkpoint_of_another_calibration(change: str, tmp_path: Path) -> None:
    """Named, and never used."""
    model, batches = build(), [tokens(3, 9)]
    calibrate(model, batches, checkpoint_dir=tmp_path)
    if change == "model":
        model.blocks[0].mlp.up.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=rf"checkpoint_dir=.*\({change} was"):
        calibrate(model, [tokens(3, 9, 8)] if change == "data" else batches, checkpoint_dir=tmp_path, bits=4 if change == "settings" else 3)


@pytest.mark.parametrize("limit", [0, 1000])
def test_activations_in_files(limit: int) -> None:
    model, batches = build(), [tokens(3, 9), tokens(2, 6)]
    found = calibrate(model, batches, running=Running(max_host_memory=limit))
    assert_same(found, calibrate(model, batches), exactly=True)
    assert found.stats["activation_bytes_in_files"] > 0
    assert found.stats["peak_host_bytes"] > 0


def _rank(rank: int, directory: str, batches: list[Tensor], experts: bool) -> None:
    torch.set_num_threads(1)
    calibrate(expert_model() if experts else build(), batches).save(f"{directory}/{rank}")


def expert_model() -> nn.Module:
    torch.manual_seed(1)
    return Decoder(partial(Block, mlp=Experts), layers=1)


@pytest.mark.parametrize(("world", "experts"), [(2, False), (3, False), (2, True)])
def test_ranks(world: int, experts: bool, tmp_path: Path) -> None:
    """Samples split over ranks: every rank ends with what one would have found."""
    batches = [tokens(2, 8, 1), tokens(3, 6, 2), tokens(1, 9, 3), tokens(2, 5, 4)]
    in_ranks(_rank, world, tmp_path, str(tmp_path), batches, experts)
    alone = calibrate(expert_model() if experts else build(), batches)
    for rank in range(world):
        assert_same(Calibration.load(tmp_path / str(rank)), alone)
        assert len(Calibration.load(tmp_path / str(rank)).modality) == 8
