"""Variance and covariance of VICReg (methods/vicreg.md): Bardes, Ponce, LeCun, ICLR 2022, arXiv 2105.04906, eq. 1-4.

Statistics are those of the global batch of N rows.  The mean is a constant for the gradient: what would flow through it sums to
zero over the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.collectives import global_sum, total, world_size
from fastssl.losses.pairs import pair_sum
from fastssl.precision import product, wide


def centered(x: Tensor) -> Tensor:
    """x: [B, q] minus the mean of each column over the global batch, fp32 or wider."""
    x = wide(x)
    return x - total(x.sum(0)) / (len(x) * world_size())


def standard_deviations(x: Tensor) -> Tensor:
    """sqrt(var + 1e-4) of each column, var over the global batch, unbiased.  x: [B, q] -> [q]."""
    return torch.sqrt(global_sum(centered(x).square().sum(0)) / (len(x) * world_size() - 1) + 1e-4)


def variance_hinge(x: Tensor, y: Tensor) -> Tensor:
    """Mean over the columns of both views of max(0, 1 - standard deviation).  x, y: [B, q] -> scalar; 0.99 when collapsed."""
    return torch.relu(1 - standard_deviations(torch.cat((x, y), dim=1))).mean()


def covariance(x: Tensor, y: Tensor, n: int) -> Tensor:
    """1/q sum_{d != e} C_de^2, C = X^T X / (n - 1) of the centred X; the *sum* of the two views.

    x, y: [B, q] -> scalar.  n: the configured global batch, which the published code divides by even where the last batch of an
    epoch has fewer rows.
    """
    return squared_off_diagonal(x, n) + squared_off_diagonal(y, n)


def squared_off_diagonal(x: Tensor, n: int) -> Tensor:
    """One view's term of `covariance`, by the smaller of the two Gram matrices: |X^T X| = |X X^T| (Frobenius).

    With more columns than rows the off-diagonal part dominates |X X^T|^2, whose rank is below N: little cancels below.
    """
    rows, (_, q) = len(x) * world_size(), x.shape
    x = centered(x) / (n - 1) ** 0.5
    if rows < q:
        squares = pair_sum(x, lambda t: (t.square(), 2 * t), diagonal=True)
        diagonal = global_sum(x.square().sum(0))
    else:
        c = covariance_matrix(x)
        squares, diagonal = c.square().sum(), c.diagonal()
    return (squares - diagonal.square().sum()) / q


def covariance_matrix(x: Tensor) -> Tensor:
    """C [q, q] of the global batch from x: [B, q], centred and divided by sqrt(n - 1)."""
    return global_sum(product(x.T, x))
