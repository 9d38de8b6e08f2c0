"""Time per call of work that may run on a device, and the rate of the device's memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import NamedTuple

import torch

from fastssl.bench.augment_work import Run

_COPIED = {"cuda": 1 << 30, "cpu": 1 << 28}
"""Bytes of the copies that the memory's rate is measured with: many times any cache."""
_COPIES = 5
_MOST_CALLS = 1000


class Time(NamedTuple):
    """Of one call."""

    ms: float
    """CUDA: of the clock on the wall; CPU: of the processor, all threads counted, which others on the machine do not change."""
    host_ms: float
    """Until it returned; less than `ms` where the device was still at work."""


def clock(run: Run, device: torch.device, seconds: float) -> Time:
    """Mean over as many calls as fit into `seconds`, at least one; the device is idle before and after."""

    cuda = device.type == "cuda"
    now = time.perf_counter if cuda else time.process_time
    synchronise = torch.cuda.synchronize if cuda else lambda: None

    def timed(calls: int) -> Time:
        synchronise()
        start = now()
        for _ in range(calls):
            run()
        returned = now()
        synchronise()
        return Time(1e3 * (now() - start) / calls, 1e3 * (returned - start) / calls)

    once = timed(1)
    calls = min(_MOST_CALLS, int(1e3 * seconds / max(once.ms, 1e-3)))
    return timed(calls) if calls > 1 else once


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy within the device's memory moves, reads and writes counted (torch's threads on a CPU)."""
    source = torch.randint(0, 256, (_COPIED[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    ms = median(clock(lambda: target.copy_(source), device, 0.02).ms for _ in range(_COPIES))
    return 2e3 * source.numel() / ms


def samples(run: Run, device: torch.device, calls: int, now: Callable[[], float] = time.process_time) -> list[float]:
    """ms of each of so many calls, one after the other.  CUDA: between events on the device; CPU: by `now`, in seconds."""
    if device.type == "cpu":
        times = [now()]
        for _ in range(calls):
            run()
            times.append(now())
        return [1e3 * (b - a) for a, b in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]
