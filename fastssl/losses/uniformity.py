"""Uniformity of embeddings on the sphere (methods/auh.md): Wang and Isola, ICML 2020, arXiv 2005.10242, section 4.1.2."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.collectives import world_size
from fastssl.losses.pairs import pair_sum


def uniformity(z: Tensor, scale: float) -> Tensor:
    """log of the mean over i != j of exp(-s |z_i - z_j|^2) = exp(-2 s (1 - z_i . z_j)), s = scale.

    z: [B, q], this rank's unit rows -> scalar, equal on all ranks: 0 when collapsed, -2 s + 2 s^2 / q for uniform points of
    a large q.  No shift as in log-sum-exp is needed: the mean is at least exp(-4 s).
    """
    n = len(z) * world_size()

    def gaussian(t: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.exp(2 * scale * (t - 1))
        return k, 2 * scale * k

    return torch.log(pair_sum(z, gaussian, diagonal=False) / (n * (n - 1)))
