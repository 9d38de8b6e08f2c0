"""InfoNCE against a queue (van den Oord et al., arXiv 1807.03748; MoCo, He et al., CVPR 2020, arXiv 1911.05722, eq. 1).

The negatives of all rows are the same K unit vectors and get no gradient.  So the [R, 1 + K] logits are never held: they are made a
block of the queue at a time for a running log-sum-exp, and the softmax-weighted mean of the negatives, which is all that the gradient
needs, is summed in the same pass (as attention kernels do, the queue being both keys and values).  The backward pass makes no logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.precision import wide

BLOCK = 2**23
"""Logits held at a time (32 MB in fp32)."""


class _InfoNCE(torch.autograd.Function):
    """q, k [R, D], queue [K, D] -> loss [R], its gradient in q [R, D], rank of the positive [R]."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, queue: Tensor, temperature: float, block: int):
        pos = (q * k).sum(-1, keepdim=True) / temperature
        top, total, mix = pos, torch.zeros_like(pos), torch.zeros_like(q)
        rank = torch.zeros(len(q), dtype=torch.int64, device=q.device)
        for negatives in queue.split(max(1, block // len(q))):
            s = q @ negatives.T / temperature
            rank = rank + (s > pos).sum(-1)
            new = torch.maximum(top, s.amax(-1, keepdim=True))
            fade, weight = torch.exp(top - new), torch.exp(s - new)
            total = total * fade + weight.sum(-1, keepdim=True)
            mix = mix * fade + weight @ negatives
            top = new
        whole = torch.exp(pos - top) + total
        # sum_j p_j (n_j - k) / T over the negatives: the positive's share has cancelled, also in floating point.
        slope = (mix - total * k) / (whole * temperature)
        return (top - pos + whole.log()).squeeze(-1), slope, rank

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, slope, rank = output
        ctx.mark_non_differentiable(slope, rank)
        ctx.save_for_backward(slope)

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_):
        (slope,) = ctx.saved_tensors
        return grad_loss.unsqueeze(-1) * slope, None, None, None, None


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float, *, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """mean over rows of -log(exp(q.k / T) / (exp(q.k / T) + sum_j exp(q.n_j / T))), and the rank of each row's positive.

    q, k: [R, D] unit rows, queue: [K, D] unit rows n_j -> scalar; int64 [R]: negatives nearer to q than its k is (0: none).
    Gradients go to q only.  fp32 or wider, also under autocast.
    """
    with torch.autocast(q.device.type, enabled=False):
        loss, _, rank = _InfoNCE.apply(wide(q), wide(k.detach()), wide(queue), temperature, block)
    return loss.mean(), rank


def top(rank: Tensor, n: int) -> Tensor:
    """Share of the rows [R] whose positive is among the n nearest; a scalar."""
    return (rank < n).to(torch.float32).mean()
