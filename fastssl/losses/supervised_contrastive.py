"""The supervised contrastive loss (Khosla et al., NeurIPS 2020, arXiv 2004.11362, eq. 2) over the global batch.

W2SSL's "what" loss, whose classes are the images (methods/w2ssl.md sections 7 and 16).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.collectives import gathered, rank, total, world_size


def supervised_contrastive(rows: Tensor, positives: Tensor, *, temperature: float, base_temperature: float) -> Tensor:
    """T / T_b times the mean over the N rows of all ranks of  log sum_{j != i} exp(s_ij) - mean_{j in P(i)} s_ij,  s_ij = F_i . F_j / T.

    rows: [M, D], this rank's F_i, fp32 or wider; positives: int64 [M, p], P(i) as numbers of rows over all ranks in rank order ->
    scalar, equal on all ranks; T / T_b ln(N - 1) at chance.  "j is a positive of i" has to hold both ways.

    Each rank computes the similarities of its own rows, [M, N], without masks.  With everybody's log-sum-exps, N numbers, it has the
    gradient with respect to them too, so that none crosses the ranks.
    """
    with torch.autocast(rows.device.type, enabled=False):  # cosines of 8 bits divided by T are too coarse
        return _SupervisedContrastive.apply(rows, positives, temperature, base_temperature)[0]


class _SupervisedContrastive(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, positives: Tensor, temperature: float, base_temperature: float):
        everyone = gathered(rows)
        n, first = len(everyone), rank() * len(rows)
        s = rows @ everyone.T / temperature
        s[:, first : first + len(rows)].diagonal().fill_(-torch.inf)
        lse, mean_positive = s.logsumexp(1), everyone[positives].mean(1)
        loss = total((lse - (rows * mean_positive).sum(1) / temperature).sum()) * (temperature / (base_temperature * n))
        # How much i looks at j, and j at i: s is symmetric, and so are the positives.
        p = torch.exp(s - lse[:, None]) + torch.exp(s - gathered(lse))
        return loss, (p @ everyone - 2 * mean_positive) * (world_size() / (base_temperature * n))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        return grad * ctx.saved_tensors[0], None, None, None
