"""Work on all cores whose results come back in order, in bounded memory.  Processes, because Pillow's plugins hold the GIL.

Every worker has a pipe of its own: when one is killed, in the middle of a result too, its pipe ends and the work with it.  (In
concurrent.futures they share one, and the reader of half a result waits for the rest for ever.)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.pool import ExceptionWithTraceback
from queue import SimpleQueue
from threading import Thread
from typing import TypeVar

from convert.progress import note
from loaders.errors import DataError

T = TypeVar("T")
AHEAD = 4
"""Tasks per worker that are given beyond the first whose result is not taken yet: where one takes long, the others go on."""
_EACH = 2
"""Tasks that a worker holds: one in work and one to go on with.  Whoever is faster gets more."""


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
    resource_tracker.ensure_running()  # the first process would start it, and starting it lets Ctrl-C through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_order(function: Callable[..., T], tasks: Iterable[tuple], workers: int) -> Iterator[T]:
    """function(*task) of every task, in order, computed by `workers` processes; with one worker in this process.

    A bounded number of results waits, so memory does not grow with the tasks.  Close the iterator to stop early: what is being
    computed is given up.  Raises DataError when a process is killed.
    """
    if workers <= 1:
        for task in tasks:
            yield function(*task)
        return
    crew: list[_Worker] = []
    tasks, outcomes = iter(tasks), {}
    given = taken = 0
    try:
        while True:
            _take_ready(crew, outcomes, wait_for_one=taken < given and taken not in outcomes)
            ahead = given - taken
            held = ahead - len(outcomes)
            for task in islice(tasks, min(AHEAD * workers - ahead, _EACH * workers - held)):
                if len(crew) < workers:
                    crew.append(_Worker(function))
                min(crew, key=lambda worker: len(worker.held)).give(given, task)
                given += 1
            if taken in outcomes:
                done, outcome = outcomes.pop(taken)
                if not done:
                    raise outcome
                yield outcome
                taken += 1
            elif taken == given:
                return
    finally:
        for worker in crew:
            worker.end()


class _Worker:
    """A process that computes what it is given, one task after the other."""

    def __init__(self, function: Callable) -> None:
        # Spawned, not forked: the caller may hold threads and their locks (torch, numba).
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, function), daemon=True)
        with _interrupts_held():
            self._process.start()
        theirs.close()  # the process alone holds it: the pipe ends with it
        self.held: deque[int] = deque()
        """Numbers of the tasks without an outcome yet, in order."""

    def give(self, number: int, task: tuple) -> None:
        with _killed_is_said():
            self.pipe.send(task)
        self.held.append(number)

    def take(self) -> tuple[int, tuple[bool, object]]:
        """Wait for the outcome of the first task held: its number, and whether it is a result, and the result or error."""
        with _killed_is_said():
            outcome = self.pipe.recv()
        return self.held.popleft(), outcome

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()


@contextmanager
def _killed_is_said() -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as e:
        raise DataError("A worker process was killed, most likely for lack of memory. Try again with fewer --workers.") from e


def _take_ready(crew: list[_Worker], outcomes: dict[int, tuple[bool, object]], wait_for_one: bool) -> None:
    """Take from every pipe the outcome that lies in it; where none does, perhaps wait for one."""
    ready = wait([worker.pipe for worker in crew], timeout=None if wait_for_one else 0)
    outcomes.update(worker.take() for worker in crew if worker.pipe in ready)


def _work(pipe: Connection, function: Callable) -> None:
    """A worker's life.  Tasks are read beside the work: whoever gives them never waits, even when nobody takes the results."""
    tasks: SimpleQueue[tuple] = SimpleQueue()

    def read() -> None:
        try:
            while True:
                tasks.put(pipe.recv())
        except (EOFError, OSError):
            os._exit(0)  # the parent is gone

    Thread(target=read, daemon=True).start()
    while True:
        task = tasks.get()
        try:
            outcome = True, function(*task)
        except Exception as e:
            outcome = False, ExceptionWithTraceback(e, e.__traceback__)
        pipe.send(outcome)
