"""Shuffle-BN (MoCo, arXiv 1911.05722 section 3.3): keys normalised with the statistics of a random group of other images.

With local BatchNorm a query and its key would share the statistics of one rank's images, by which the positive can be told without
looking at the image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

from fastssl.collectives import gathered, rank

Permutation = Callable[[int, torch.device], Tensor]
"""(n, device) -> an order of 0 .. n - 1, the same on all ranks."""


def random_permutation(n: int, device: torch.device) -> Tensor:
    """Rank 0's permutation of 0 .. n - 1 on all ranks.  The engine seeds the generator by the step: a resumed run draws the same."""
    drawn = torch.randperm(n, device=device)
    return funcol.wait_tensor(funcol.broadcast(drawn, 0, dist.group.WORLD))


def shuffled(encode: Callable[[Tensor], Tensor], x: Tensor, permutation: Permutation = random_permutation) -> Tensor:
    """encode(x), each rank's BatchNorm having seen a random part of all ranks' images.  x: [B, 3, s, s] -> [B, ...]; no gradient.

    Rank r encodes the global rows pi[r B : (r + 1) B]; the results go back to the ranks that have the images.  Every rank
    receives all images: the norms `sync` and `eman` move none.
    """
    n = len(x)
    mine = slice(rank() * n, (rank() + 1) * n)
    images = gathered(x.movedim(1, -1))  # channels last, as they lie in memory
    order = permutation(len(images), x.device)
    rows = gathered(encode(images[order[mine]].movedim(-1, 1)))
    return rows[order.argsort()[mine]]
