"""What losses over the global batch need from the other ranks.  Alone, without a process group, every call is free.

Every rank computes the same loss from all rows, and DDP averages gradients.  So the gradient of a rank's own rows is the one
of the loss times the number of ranks: the average is then what one process would get on the concatenated batch, and no
gradient crosses the ranks.  The collectives are functional: they compile without a graph break and run on gloo.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor

# Renamed in torch 2.15.
_all_gather = funcol.all_gather_single if hasattr(funcol, "all_gather_single") else funcol.all_gather_tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gathered(x: Tensor) -> Tensor:
    """x: [B, *] of every rank, B equal -> [W B, *] in rank order, without a gradient."""
    if world_size() == 1:
        return x.detach()
    return funcol.wait_tensor(_all_gather(x.detach().contiguous(), 0, dist.group.WORLD))


def total(x: Tensor) -> Tensor:
    """Sum of x over the ranks, without a gradient."""
    if world_size() == 1:
        return x.detach()
    return funcol.wait_tensor(funcol.all_reduce(x.detach(), "sum", dist.group.WORLD))


class _GlobalSum(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Equal on all ranks, like everything that follows from the sum.
        return grad * world_size()


def global_sum(x: Tensor) -> Tensor:
    """Sum of x over the ranks, with the gradient that DDP's average expects."""
    return x if world_size() == 1 else _GlobalSum.apply(x)
