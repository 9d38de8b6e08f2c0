"""BatchNorm policies: `local`, `sync` and `eman` (config.ModelConfig.norm); `shuffle` is local here, see shuffle.py.

SyncBatchNorm is ours because torch.nn.SyncBatchNorm refuses CPU tensors and breaks compiled graphs.  One collective in the
forward pass (every rank's mean, variance and count), one in the backward pass (two sums), both functional
(collectives.py), so that it compiles without a graph break and runs on gloo.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastssl.collectives import gathered, total, world_size


class _SyncNorm(torch.autograd.Function):
    """x [N, C, *], weight, bias [C] -> normalised x, mean [C], variance [C] (biased), count; statistics over all ranks."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        dims = [0, *range(2, x.dim())]
        wide = torch.promote_types(x.dtype, torch.float32)
        local_var, local_mean = torch.var_mean(x.to(wide), dims, correction=0)
        local_count = torch.full((1,), x.numel() // x.shape[1], dtype=wide, device=x.device)
        packed = torch.cat((local_mean, local_var, local_count)).unsqueeze(0)
        means, variances, counts = gathered(packed).split((x.shape[1], x.shape[1], 1), dim=1)
        # Merging means and deviations keeps the precision that sums of squares lose when |mean| >> std.
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = ((variances + (means - mean).square()) * counts).sum(0) / count
        inv_std = torch.rsqrt(var + eps)
        shape = [1, -1] + [1] * (x.dim() - 2)
        scale = weight * inv_std
        y = (x.to(wide) * scale.view(shape) + (bias - mean * scale).view(shape)).to(x.dtype)
        return y, mean, var, inv_std, count

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, _ = inputs
        _, mean, var, inv_std, count = output
        ctx.mark_non_differentiable(mean, var, inv_std, count)
        ctx.save_for_backward(x, weight, mean, inv_std, count)

    @staticmethod
    def backward(ctx, grad_y: Tensor, *_):
        x, weight, mean, inv_std, count = ctx.saved_tensors
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        wide = mean.dtype
        grad_y, x_hat = grad_y.to(wide), (x.to(wide) - mean.view(shape)) * inv_std.view(shape)
        grad_bias, grad_weight = grad_y.sum(dims), (grad_y * x_hat).sum(dims)
        mean_grad, mean_grad_x_hat = (total(torch.cat((grad_bias, grad_weight))) / count).chunk(2)
        grad_x = grad_y - mean_grad.view(shape) - x_hat * mean_grad_x_hat.view(shape)
        grad_x = (grad_x * (weight * inv_std).view(shape)).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the global batch in training; same parameters, buffers and evaluation as nn.BatchNorm."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm takes [N, C, *], got {tuple(input.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        weight, bias = (self.weight, self.bias) if self.affine else (torch.ones_like(self.running_var), torch.zeros_like(self.running_mean))
        y, mean, var, _, count = _SyncNorm.apply(x, weight, bias, self.eps)
        with torch.no_grad():
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), self.momentum)
        return y


def apply_norm_policy(module: nn.Module, norm: str) -> nn.Module:
    """Replace every BatchNorm by SyncBatchNorm for the policy `sync`; parameters and buffers are kept, not copied."""
    if norm != "sync":
        return module
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            sync = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine)
            sync.weight, sync.bias = child.weight, child.bias
            sync.running_mean, sync.running_var = child.running_mean, child.running_var
            sync.num_batches_tracked = child.num_batches_tracked
            sync.train(child.training)
            setattr(module, name, sync)
        else:
            apply_norm_policy(child, norm)
    return module


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Means and variances of all BatchNorms; none of a transformer."""
    return [b for name, b in module.named_buffers() if name.endswith(("running_mean", "running_var"))]


def broadcast_running_statistics(module: nn.Module) -> None:
    """Rank 0's BatchNorm running statistics on every rank, in one flat broadcast.

    EMAN with local BatchNorm needs it, and MoCo's shuffle-BN has it: in the published runs DDP's buffer broadcast did it before every
    forward pass.
    """
    if not (stats := running_statistics(module)):
        return
    flat = torch.cat([b.reshape(-1) for b in stats])
    dist.broadcast(flat, src=0)
    torch._foreach_copy_(stats, [part.view_as(b) for part, b in zip(flat.split([b.numel() for b in stats]), stats, strict=True)])


@contextlib.contextmanager
def statistics_of_rank_zero(module: nn.Module) -> Iterator[None]:
    """Every rank has the running statistics that checkpoints hold, rank 0's; its own again afterwards.  All ranks enter together."""
    stats = running_statistics(module)
    if not stats or world_size() == 1:
        yield
        return
    own = [b.clone() for b in stats]
    broadcast_running_statistics(module)
    try:
        yield
    finally:
        torch._foreach_copy_(stats, own)


class RunningStatistics:
    """The running statistics of a network that lies where it stays: looked up once, which takes the host longer than what is done.

    Around every training pass: `keep`, with policies whose statistics are rank 0's `take_rank_zeros`, and afterwards `mend`.  No
    host synchronisation.
    """

    def __init__(self, module: nn.Module):
        self._statistics = running_statistics(module)
        if self._statistics:
            sizes = [b.numel() for b in self._statistics]
            self._before, self._after = (torch.cat([b.reshape(-1) for b in self._statistics]) for _ in range(2))
            self._views = [
                [part.view_as(b) for part, b in zip(flat.split(sizes), self._statistics, strict=True)]
                for flat in (self._before, self._after)
            ]

    @torch.no_grad()
    def keep(self) -> None:
        """To be called before the forward pass."""
        if self._statistics:
            torch._foreach_copy_(self._views[0], self._statistics)

    @torch.no_grad()
    def take_rank_zeros(self) -> None:
        """What rank 0 has kept, on every rank, in one broadcast (see `broadcast_running_statistics`)."""
        if self._statistics:
            dist.broadcast(self._before, src=0)
            torch._foreach_copy_(self._statistics, self._views[0])

    @torch.no_grad()
    def mend(self) -> None:
        """What is not finite becomes what was kept: the step of a forward pass that overflows is skipped, but no later one would ever
        make the statistics finite again."""
        if self._statistics:
            torch._foreach_copy_(self._views[1], self._statistics)
            torch.where(self._after.isfinite(), self._after, self._before, out=self._after)
            torch._foreach_copy_(self._statistics, self._views[1])
