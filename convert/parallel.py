"""Work on all cores whose results come back in order, in bounded memory.  Processes, because Pillow's plugins hold the GIL."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from convert.progress import note
from loaders.errors import DataError

T = TypeVar("T")


def usable_workers(workers: int) -> int:
    """Processes to start when `workers` are asked for; 0: one per core.  Raises DataError for a negative number."""
    cores = len(os.sched_getaffinity(0))
    if workers < 0:
        raise DataError(f"There cannot be {workers} workers. Give --workers 1 or more, or 0 for one per core.")
    if workers > cores:
        note(f"{workers} workers asked for, but {cores} cores are available: using {cores}.")
    return min(workers, cores) or cores


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back.  Processes that are started meanwhile inherit that for life, and from their first instruction on: they
    leave it to this process, which gets it afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_order(function: Callable[..., T], tasks: Iterable[tuple], workers: int) -> Iterator[T]:
    """function(*task) of every task, in order, computed by `workers` processes; with one worker in this process.

    A bounded number of results waits, so memory does not grow with the tasks.  Close the iterator to stop early.  Raises
    DataError when a process is killed.
    """
    if workers <= 1:
        for task in tasks:
            yield function(*task)
        return
    # Spawned, not forked: the caller may hold threads and their locks (torch, numba).
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    pending = deque()
    try:
        for task in tasks:
            with _interrupts_held():  # the pool starts a process when a task needs one
                pending.append(pool.submit(function, *task))
            if len(pending) == 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as e:
        raise DataError("A worker process was killed, most likely for lack of memory. Try again with fewer --workers.") from e
    finally:
        pool.shutdown(cancel_futures=True)
