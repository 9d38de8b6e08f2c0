"""NT-Xent, the loss of SimCLR (methods/simclr.md): Chen et al., ICML 2020, arXiv 2002.05709, eq. 1."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.collectives import gathered, rank, world_size
from fastssl.losses.pairs import global_loss
from fastssl.precision import product


def nt_xent(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    """Mean over all 2N embeddings of -log softmax of their partner among the 2N - 1 others, of cosines / temperature.

    x, y: [B, q], this rank's unit rows of the two views -> scalar, equal on all ranks: log(2N - 1) when collapsed.

    Each rank computes the logits of its own 2B embeddings.  With the log-sum-exps of all 2N it knows also its part in the
    softmax of the others, so that no gradient crosses the ranks.  At most two matrices [2B, 2N] fp32 and one of operands are
    alive together: N = 4096 in bf16, 80 MiB on each of 8 ranks.
    """

    def terms(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s, b = similarities(rows, others, temperature), len(rows) // 2
        lse = s.logsumexp(1)
        value = lse.sum() - 2 * own_columns(s).diagonal(b).sum()
        # softmax of the own rows, and of the others' rows in the columns of the own ones
        c = (s - lse[:, None]).exp_()
        c += s.sub_(gathered(lse)).exp_()
        for partner in (b, -b):
            own_columns(c).diagonal(partner).sub_(2)
        return value, c, c.new_full((len(c), 1), 1 / temperature)

    z = torch.cat((x, y))
    return global_loss(z, terms) / (len(z) * world_size())


def similarities(rows: Tensor, others: Tensor, temperature: float) -> Tensor:
    """Cosines / temperature, -inf for an embedding with itself.

    rows: [2B, q], this rank's embeddings of view 1, then of view 2; others: [2N, q], the rows of all ranks -> [2B, 2N].
    """
    s = product(rows, others.T).div_(temperature)
    own_columns(s).diagonal().fill_(-torch.inf)
    return s


def own_columns(s: Tensor) -> Tensor:
    """[R, W R] -> [R, R], this rank's rows with one another."""
    return s[:, rank() * len(s) : (rank() + 1) * len(s)]
