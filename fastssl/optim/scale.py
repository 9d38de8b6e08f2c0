"""Multiply many tensors each by its own number that lies on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def scale_each_(tensors: Sequence[Tensor], factors: Tensor) -> None:
    """tensors[i] <- tensors[i] * factors[i], in place and without host synchronisation.

    tensors: of one dtype, each without gaps in memory (any order of its axes); factors [len(tensors)], of the same dtype.
    On CUDA torch launches a kernel per tensor here, unless it knows the factors on the host: ours is one for all.
    """
    if factors.is_cuda:
        from fastssl.optim.scale_kernel import launch  # needs Triton

        launch(tensors, factors)
    else:
        torch._foreach_mul_(tensors, list(factors.unbind()))
