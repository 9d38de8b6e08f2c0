"""Rates and CPU time of whatever hands over batches, this process and its live children counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import psutil


class Rate(NamedTuple):
    """One measurement."""

    images_per_s: float
    """Source images per second of wall time."""
    cpu_ms_per_image: float
    """Milliseconds of CPU time, of all threads and child processes, per source image."""


def cpu_seconds() -> float:
    """User and system time of this process and of its children that are alive, to 10 ms where there are children."""
    total = time.process_time()
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def clock(one_batch: Callable[[], object], batch: int, seconds: float, multiple: int = 1) -> Rate:
    """`one_batch` again and again for at least `seconds`, after `multiple` calls that are not counted.

    multiple: batches arrive in bursts of that many, so whole bursts are counted.
    """
    for _ in range(multiple):
        one_batch()
    start, cpu, images = time.perf_counter(), cpu_seconds(), 0
    while (elapsed := time.perf_counter() - start) < seconds or images == 0:
        for _ in range(multiple):
            one_batch()
        images += multiple * batch
    return Rate(images / elapsed, 1e3 * (cpu_seconds() - cpu) / images)


def settle(timeout: float = 10.0) -> None:
    """Return once this process is idle: batches prefetched for nobody must not burden the next measurement."""
    end = time.perf_counter() + timeout
    while time.perf_counter() < end:
        before = cpu_seconds()
        time.sleep(0.1)
        if cpu_seconds() - before < 0.02:
            return
