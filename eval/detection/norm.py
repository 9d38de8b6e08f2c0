"""The BatchNorms of detectors, synchronised over the ranks by one of two rules (methods/transfer.md, 1.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.collectives import total, world_size
from fastssl.models.norm import SyncBatchNorm


class _MeanOverRanks(torch.autograd.Function):
    """Mean of x over the ranks; the gradient is that of the sum of all ranks' losses."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return total(x) / world_size()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return total(grad) / world_size()


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """MoCo's: mean and mean of squares of the ranks count equally, however many pixels each has, and the running variance is biased.
    On one process a BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        moments = torch.stack((wide.mean((0, 2, 3)), wide.square().mean((0, 2, 3))))
        mean, mean_of_squares = _MeanOverRanks.apply(moments)
        var = mean_of_squares - mean.square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(var.to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        shift = self.bias - mean * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


NORMS = {"sync": SyncBatchNorm, "naive": NaiveSyncBatchNorm}
