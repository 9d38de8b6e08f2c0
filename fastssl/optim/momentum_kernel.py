"""The CUDA form of `momentum`: Triton kernels over tables of addresses, fp32.  Imported only where a CUDA device is used.

Weights and gradients are read twice, buffers once: 7 passes over the parameters where torch's operations take 12.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastssl.optim.tables import BLOCK, addresses, chunks

PARTS = 1024
"""Chunks whose sums are added at a time."""


@triton.jit
def squares_kernel(weights, grads, sizes, owners, starts, parts, decay, BLOCK: tl.constexpr):
    """parts[c] = (sum w^2, sum (g + decay w)^2) of chunk c."""
    chunk = tl.program_id(0)
    i = tl.load(owners + chunk)
    at = tl.load(starts + chunk) + tl.arange(0, BLOCK)
    inside = at < tl.load(sizes + i)
    w = tl.load(tl.load(weights + i).to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
    g = tl.load(tl.load(grads + i).to(tl.pointer_type(tl.float32)) + at, mask=inside, other=0.0)
    d = g + decay * w
    tl.store(parts + 2 * chunk, tl.sum(w * w))
    tl.store(parts + 2 * chunk + 1, tl.sum(d * d))


@triton.jit
def roots_kernel(parts, firsts, roots, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """roots[k, i]: of the sum of parts[c, k] over the chunks c of tensor i, at most ROUNDS x BLOCK of them."""
    i, k = tl.program_id(0), tl.program_id(1)
    c, end = tl.load(firsts + i) + tl.arange(0, BLOCK), tl.load(firsts + i + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(ROUNDS):
        total += tl.load(parts + 2 * c + k, mask=c < end, other=0.0)
        c += BLOCK
    tl.store(roots + k * tl.num_programs(0) + i, tl.sqrt(tl.sum(total)))


@triton.jit
def step_kernel(
    weights, grads, buffers, sizes, owners, starts, scales, found_inf, decay, momentum, lr, SKIPS: tl.constexpr, BLOCK: tl.constexpr
):
    """`momentum_step_` on chunk c of tensor i = owners[c]."""
    chunk = tl.program_id(0)
    i = tl.load(owners + chunk)
    at = tl.load(starts + chunk) + tl.arange(0, BLOCK)
    end = tl.load(sizes + i)
    if SKIPS:
        end = tl.where(tl.load(found_inf) == 0.0, end, 0)
    inside = at < end
    weight = tl.load(weights + i).to(tl.pointer_type(tl.float32)) + at
    buffer = tl.load(buffers + i).to(tl.pointer_type(tl.float32)) + at
    w = tl.load(weight, mask=inside)
    g = tl.load(tl.load(grads + i).to(tl.pointer_type(tl.float32)) + at, mask=inside)
    b = momentum * tl.load(buffer, mask=inside) + tl.load(scales + i) * (g + decay * w)
    tl.store(buffer, b, mask=inside)
    tl.store(weight, w - lr * b, mask=inside)


def norms(params: Sequence[Tensor], grads: Sequence[Tensor], decay: float, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """`momentum.norms` on CUDA."""
    c = chunks(tuple(p.numel() for p in params), params[0].device, block)
    parts, roots = params[0].new_empty(len(c.owners), 2), params[0].new_empty(2, len(params))
    squares_kernel[(len(c.owners),)](addresses(params), addresses(grads), c.sizes, c.owners, c.starts, parts, decay, BLOCK=block)
    roots_kernel[(len(params), 2)](parts, c.firsts, roots, ROUNDS=triton.cdiv(c.most, PARTS), BLOCK=PARTS)
    return roots[0], roots[1]


def step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    scales: Tensor | float,
    decay: float,
    momentum: float,
    lr: float,
    found_inf: Tensor | None,
    block: int = BLOCK,
) -> None:
    """`momentum.momentum_step_` on CUDA."""
    c = chunks(tuple(p.numel() for p in params), params[0].device, block)
    if not isinstance(scales, Tensor):
        scales = params[0].new_full((len(params),), scales)
    tables = (addresses(params), addresses(grads), addresses(buffers), c.sizes, c.owners, c.starts)
    skips = found_inf is not None
    step_kernel[(len(c.owners),)](*tables, scales, found_inf if skips else scales, decay, momentum, lr, SKIPS=skips, BLOCK=block)
