"""Gradient clipping of the DINO family: every tensor by its own norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastssl.optim.scale import scale_each_


@torch.no_grad()
def clip_each_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """g <- g min(1, max_norm / (|g|_2 + 1e-6)) for every gradient by itself (methods/dino.md section 4), without host synchronisation.

    -> the norms before, [number of gradients], in order; parameters without a gradient are left out.  A non-finite gradient stays one.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    scale_each_(grads, (max_norm / (norms + 1e-6)).clamp(max=1.0))
    return norms
