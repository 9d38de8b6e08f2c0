"""The CUDA form of `scale_each_`: one Triton launch over a table of addresses.  Imported only where a CUDA device is used."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.optim.tables import BLOCK, addresses, chunks

DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def scale_kernel(tensors, sizes, owners, starts, factors, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Program c multiplies elements starts[c] to starts[c] + BLOCK of tensor i = owners[c] by factors[i]."""
    chunk = tl.program_id(0)
    i = tl.load(owners + chunk)
    at = tl.load(starts + chunk) + tl.arange(0, BLOCK)
    tensor = tl.load(tensors + i).to(tl.pointer_type(DTYPE))
    inside = at < tl.load(sizes + i)
    tl.store(tensor + at, tl.load(tensor + at, mask=inside) * tl.load(factors + i), mask=inside)


def launch(tensors: Sequence[Tensor], factors: Tensor, block: int = BLOCK) -> None:
    """`scale_each_` on CUDA.  ValueError for types that differ or are no fp32 or fp64."""
    if factors.dtype not in DTYPES or any(t.dtype != factors.dtype for t in tensors):
        raise ValueError(f"the kernel takes factors and tensors of fp32, or all of fp64, got {factors.dtype}, {tensors[0].dtype}")
    c = chunks(tuple(t.numel() for t in tensors), factors.device, block)
    grid = (len(c.owners),)
    scale_kernel[grid](addresses(tensors), c.sizes, c.owners, c.starts, factors, DTYPE=DTYPES[factors.dtype], BLOCK=block)
