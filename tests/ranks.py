"""Run a function on several gloo ranks of this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def _rank_main(rank: int, world: int, folder: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = function(rank, world, *args)
    torch.save(result, f"{folder}/rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_ranks(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """[function(rank, world, *args) for each rank], each in its own process of one group.  `function` must be importable."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank_main, (world, folder, function, args), nprocs=world)
        return [torch.load(Path(folder) / f"rank{r}.pt", weights_only=False) for r in range(world)]
