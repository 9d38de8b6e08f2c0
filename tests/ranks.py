"""Run a function on several gloo ranks of this machine."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

MOST = 4
"""Ranks."""
_pool: ProcessPoolExecutor | None = None


def _rank_main(rank: int, world: int, folder: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # what earlier calls compiled does not count
        torch._dynamo.reset()
    store = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": world}
    torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=5), **store)
    try:
        result = function(rank, world, *args)
        torch.save(result, f"{folder}/rank{rank}.pt")
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """[function(rank, world, *args) for each rank], each in its own process of one group.  `function` must be importable.

    The processes stay for the next call, since a new one spends seconds on its imports.  After a rank has failed they are ended, and
    its error is raised here: the others may wait for it.
    """
    global _pool
    if _pool is None:
        _pool = ProcessPoolExecutor(MOST, mp_context=mp.get_context("spawn"))
    with tempfile.TemporaryDirectory() as folder:
        ranks = [_pool.submit(_rank_main, rank, world, folder, function, args) for rank in range(world)]
        done, _ = wait(ranks, return_when=FIRST_EXCEPTION)
        failed = next((rank.exception() for rank in done if rank.exception()), None)
        if failed is not None:
            processes = list(_pool._processes.values())
            _pool.shutdown(wait=False, cancel_futures=True)
            _pool = None
            for process in processes:
                process.kill()
            raise failed
        return [torch.load(Path(folder) / f"rank{r}.pt", weights_only=False) for r in range(world)]
