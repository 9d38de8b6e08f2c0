"""Losses over all pairs of rows of the global batch, with their gradients in closed form: MMD, uniformity, NT-Xent, covariance.

Legend: B rows of this rank, W ranks, N = W B, q columns; T = Z Z^T [N, N] are the products of all rows.

Each rank computes its B rows of T and, from these, the gradient with respect to its own rows: two products of B N q
multiplications, one gather forward, nothing backward (methods/sfrik.md 12).  Autograd on a gathered Z would take three of
N N q on every rank and exchange the gradient of all rows, [N, q].

Precision: under autocast the operands of the products are 16-bit; sums, and all that is done with T, are fp32 or wider.  C becomes
an operand: its range is for s to take, as fp16 ends at 65,504 and below 6e-8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastssl.collectives import gathered, rank, total, world_size
from fastssl.precision import operand_dtype, product, wide

Kernel = Callable[[Tensor], tuple[Tensor, Tensor]]
"""T -> k(T) and k'(T), element by element."""
Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""This rank's rows, all rows -> its share of a sum; C [B, N] and s [B, 1], the sum's gradient being s (C Z) for this rank's rows."""

_CHUNK = 1 << 21
"""Entries of T that are looked at together, 8 MiB in fp32: 512 rows of N = 4096."""


def global_loss(z: Tensor, terms: Terms) -> Tensor:
    """Sum over the ranks of what `terms` gives.  z: [B, q], this rank's rows -> scalar, equal on all ranks.

    Kept for the backward pass: the gradient [B, q] fp32; alone C, N N operands, instead.  Until the forward pass ends also the
    gathered rows, N q operands, and C.
    """
    return _GlobalLoss.apply(wide(z), operand_dtype(z), terms)


class _GlobalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor, dtype: torch.dtype, terms: Terms) -> Tensor:
        rows = z.to(dtype)
        others = gathered(rows)
        value, c, scale = terms(rows, others)
        c = c.to(dtype)
        # Several ranks give the gathered rows back; alone C is the smaller thing to keep.
        ctx.save_for_backward(z, scale, c if world_size() == 1 else product(c, others).mul_(scale * world_size()))
        return total(value)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        # The scale of the loss, 1 / N^2 or a scaler's, meets the gradient in fp32.
        z, scale, kept = ctx.saved_tensors
        return (product(kept, z.to(kept.dtype)).mul_(scale * grad) if world_size() == 1 else kept * grad), None, None


def pair_sum(z: Tensor, kernel: Kernel, *, diagonal: bool) -> Tensor:
    """sum_ij k(z_i . z_j) over all N x N pairs of rows; without i = j unless `diagonal`.

    z: [B, q], this rank's rows -> scalar, equal on all ranks.  Gradient: 2 sum_j k'(t_ij) z_j, j over the same pairs.

    N = 4096, q = 32768 in bf16: 64 MiB are kept on each of 8 ranks, 32 MiB on one (and z).  For a while it takes 292 MiB more
    for gathered and own rows and C on each of 8, 256 + 24 MiB on one, where 768 MiB more pass in the backward pass.
    """

    def terms(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, step = rank() * len(rows), max(1, _CHUNK // len(others))
        sums, scales, c = [], [], rows.new_empty(len(rows), len(others))
        for a in range(0, len(rows), step):
            b = min(a + step, len(rows))
            value, slope = kernel(product(rows[a:b], others.T))
            if not diagonal:
                for t in (value, slope):
                    t[:, first + a : first + b].diagonal().fill_(0)
            sums.append(value.sum())
            largest = torch.linalg.vector_norm(slope, torch.inf, 1, keepdim=True).clamp_(min=torch.finfo(slope.dtype).tiny)
            scales.append(2 * largest)
            c[a:b] = slope.div_(largest)
            del value, slope  # before the next ones are made
        return torch.stack(sums).sum(), c, torch.cat(scales)

    return global_loss(z, terms)
