"""Who this process is among its ranks, and the few collectives that are not part of a loss."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.config import ConfigError


@dataclass(frozen=True)
class Dist:
    """One process of the run."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def broadcast_object(self, value):
        """Rank 0's picklable `value`, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value) -> list:
        """Every rank's picklable `value`, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        out = [None] * self.world
        dist.all_gather_object(out, value)
        return out


@contextlib.contextmanager
def session(device: str = "auto") -> Iterator[Dist]:
    """The process group of torchrun's environment (NCCL with CUDA, gloo on a CPU), or this process alone.

    The group is torn down on the way out; after an error it is left to torchrun, which ends the other ranks: a rank that
    waits in a collective would never reach a tear-down.  ConfigError when there are more ranks than GPUs.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    use_cuda = torch.cuda.is_available() and device != "cpu"
    if use_cuda:
        if local_world > (gpus := torch.cuda.device_count()):
            raise ConfigError(
                f"{local_world} ranks on a machine that shows {gpus} GPUs: each rank needs one. Take torchrun --nproc-per-node {gpus}, or "
                f"see what CUDA_VISIBLE_DEVICES hides."
            )
        torch.cuda.set_device(local_rank)
    here = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if use_cuda else "gloo", timeout=timedelta(minutes=30), device_id=here if use_cuda else None)
    yield Dist(rank, world, local_rank, local_world, here)
    if world > 1:
        dist.destroy_process_group()


def data_parallel(module: nn.Module, **options) -> DistributedDataParallel:
    """DDP that leaves buffers alone after the start: running statistics are synchronised by whoever needs them equal."""
    # torch 2.13 renamed the option.
    renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    return DistributedDataParallel(module, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False}, **options)
