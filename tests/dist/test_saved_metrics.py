"""A log window that a checkpoint interrupts, on several ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastssl import checkpoint, hooks
from fastssl.distributed import Dist
from fastssl.method import StepOutput
from fastssl.metrics import Metrics, Record
from tests.ranks import run_ranks


def window(rank: int, world: int, folder: str) -> tuple[Record, Record]:
    """-> records of two steps without and with an interruption between them; rank 1 has other losses, the first not finite."""
    dist = Dist(rank, world, rank, world, torch.device("cpu"))
    losses = [(1.0, 3.0), (float("nan"), 11.0)][rank]

    def add(metrics: Metrics, loss: float) -> None:
        metrics.add(StepOutput(torch.tensor(loss), {"top1": torch.tensor(10.0 * rank)}), images=8)
        metrics._skipped = metrics._bad_run = torch.zeros((), dtype=torch.float64)

    def read(metrics: Metrics) -> Record:
        schedules = SimpleNamespace(at=lambda step: SimpleNamespace(lr=0.1, ema_momentum=0.9))
        state = SimpleNamespace(dist=dist, step=2, steps_per_epoch=4, schedules=schedules, dtype=torch.float32)
        record = metrics.read(state, SimpleNamespace(wait_s=0.0))
        return {name: value for name, value in record.items() if name.startswith("train/")}

    whole, resumed = Metrics(), Metrics()
    add(whole, losses[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda state, folder, *, keep: torch.save(state.metrics.state_dict(), folder / "saved.pt"))
        state = SimpleNamespace(dist=dist, metrics=whole, step=1, steps_per_epoch=4)
        patch.setattr(checkpoint, "not_finite", lambda state: "")
        hooks.Checkpointer(Path(folder), every_epochs=1, keep_every=0).save(state)
    resumed.load_state_dict(torch.load(Path(folder) / "saved.pt"), dist.device)
    for metrics in (whole, resumed):
        add(metrics, losses[1])
    return read(whole), read(resumed)


def test_the_first_record_after_a_restart_is_that_of_all_ranks(tmp_path: Path):
    for whole, resumed in run_ranks(2, window, str(tmp_path)):
        assert whole == resumed
        assert (whole["train/loss"], whole["train/top1"]) == (5.0, 5.0)
