"""The CUDA form of `scale_each_`: one Triton launch over a table of addresses.  Imported only where a CUDA device is used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Elements per program."""
DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def scale_kernel(addresses, sizes, owners, starts, factors, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Program c multiplies elements starts[c] to starts[c] + BLOCK of tensor i = owners[c] by factors[i]."""
    chunk = tl.program_id(0)
    i = tl.load(owners + chunk)
    at = tl.load(starts + chunk) + tl.arange(0, BLOCK)
    tensor = tl.load(addresses + i).to(tl.pointer_type(DTYPE))
    inside = at < tl.load(sizes + i)
    tl.store(tensor + at, tl.load(tensor + at, mask=inside) * tl.load(factors + i), mask=inside)


def launch(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """`scale_each_` on CUDA.  ValueError for types that differ or are no fp32 or fp64."""
    if factors.dtype not in DTYPES or any(t.dtype != factors.dtype for t in tensors):
        raise ValueError(f"the kernel takes factors and tensors of fp32, or all of fp64, got {factors.dtype}, {tensors[0].dtype}")
    owners, starts, sizes = chunks(tuple(t.numel() for t in tensors), factors.device)
    table = addresses(tuple(t.data_ptr() for t in tensors), factors.device)
    scale_kernel[(len(owners),)](table, sizes, owners, starts, factors, DTYPE=DTYPES[factors.dtype], BLOCK=BLOCK)


@lru_cache(maxsize=8)
def chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """-> of which tensor each chunk is [chunks], its first element there [chunks], and the sizes [tensors]; all int64."""
    each = torch.tensor([triton.cdiv(n, BLOCK) for n in sizes])
    owners = torch.arange(len(sizes)).repeat_interleave(each)
    before = (each.cumsum(0) - each).repeat_interleave(each)
    starts = (torch.arange(len(owners)) - before) * BLOCK
    return tuple(on_device(t, device) for t in (owners, starts, torch.tensor(sizes)))


@lru_cache(maxsize=8)
def addresses(pointers: tuple[int, ...], device: torch.device) -> Tensor:
    """[tensors], int64.  Gradients mostly lie where those of the step before did (in DDP's buckets always): then nothing is copied."""
    return on_device(torch.tensor(pointers), device)


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
