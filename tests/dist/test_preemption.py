"""A signal that one of several ranks receives."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import torch

from fastssl.config import LogConfig
from fastssl.distributed import Dist
from fastssl.hooks import Preemption
from tests.ranks import run_ranks


def until_stopped(rank: int, world: int, every_steps: int, step_s: float, every_s: float, at: int) -> tuple[int, int]:
    """-> (step after which the loop ended, how often the ranks met); rank 1 receives a signal in step `at`, rank 0 none."""
    meetings = []

    class Counted(Dist):
        def gather_objects(self, value):
            meetings.append(value)
            return super().gather_objects(value)

    dist = Counted(rank, world, rank, world, torch.device("cpu"))
    state = SimpleNamespace(dist=dist, cfg=SimpleNamespace(log=LogConfig(every_steps=every_steps)), step=0, stop="", record=None)
    hook = Preemption(Path("runs/somewhere"))
    hook.EVERY_S = every_s
    hook.start(state)
    try:
        while not state.stop and state.step < 2 * at:
            time.sleep(step_s * (1 + rank))  # clocks differ
            state.step += 1
            state.record = {} if state.step % every_steps == 0 else None
            if state.step == at and rank == 1:
                hook.received = "SIGTERM"
            hook.after_step(state)
    finally:
        hook.close()
    return state.step, len(meetings)


def test_ranks_stop_together_long_before_a_log_step():
    """Steps of 20 to 40 ms, an agreement about every 0.6 s, no log step at all."""
    first, second = run_ranks(2, until_stopped, 10_000, 0.02, 0.6, 60)
    assert first == second and 60 <= first[0] < 90 and first[1] < first[0] / 2


def test_fast_steps_meet_at_log_steps_only():
    """But for the first steps, whose time is not yet known."""
    first, second = run_ranks(2, until_stopped, 50, 0.0, 5.0, 490)
    assert first == second and first[0] == 500 and first[1] <= 14
