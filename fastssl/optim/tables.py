"""Many tensors as one array of chunks: what kernels read that take all tensors of an optimizer in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 1024
"""Elements of a chunk."""


class Chunks(NamedTuple):
    """Tensors: int64, on the device."""

    sizes: Tensor
    """[tensors]: elements."""
    owners: Tensor
    """[chunks]: of which tensor a chunk is."""
    starts: Tensor
    """[chunks]: its first element there."""
    firsts: Tensor
    """[tensors + 1]: the first chunk of each tensor; their number."""
    most: int
    """Chunks of the largest tensor."""


@lru_cache(maxsize=8)
def chunks(sizes: tuple[int, ...], device: torch.device, block: int = BLOCK) -> Chunks:
    each = torch.tensor([-(-n // block) for n in sizes])
    firsts = torch.cat((torch.zeros(1, dtype=torch.int64), each.cumsum(0)))
    owners = torch.arange(len(sizes)).repeat_interleave(each)
    starts = (torch.arange(len(owners)) - firsts[:-1].repeat_interleave(each)) * block
    return Chunks(*(on_device(t, device) for t in (torch.tensor(sizes), owners, starts, firsts)), most=int(each.max()))


def addresses(tensors: Sequence[Tensor]) -> Tensor:
    """[tensors], int64."""
    return _addresses(tuple(t.data_ptr() for t in tensors), tensors[0].device)


@lru_cache(maxsize=32)
def _addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """Weights stay, and gradients mostly lie where those of the step before did (in DDP's buckets always): then nothing is copied."""
    return on_device(torch.tensor(pointers), device)


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
