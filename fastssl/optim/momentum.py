"""SGD with momentum along a direction of each tensor's own, d = s (g + c w): what the forms of LARS have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.optim.scale import scale_each_


def norms(params: Sequence[Tensor], grads: Sequence[Tensor], decay: float = 0.0) -> tuple[Tensor, Tensor]:
    """|w_i| and |g_i + decay w_i| of every tensor, [tensors] each, without host synchronisation."""
    if _has_kernel(params):
        from fastssl.optim import momentum_kernel  # needs Triton

        return momentum_kernel.norms(params, grads, decay)
    decayed = torch._foreach_add(grads, params, alpha=decay) if decay else grads
    return torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(decayed))


def momentum_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    scales: Tensor | float,
    decay: float,
    *,
    momentum: float,
    lr: float,
    found_inf: Tensor | None = None,
) -> None:
    """buf <- momentum buf + s (g + decay w);  w <- w - lr buf, in place; nothing where `found_inf` is 1.

    scales: s of every tensor, [tensors], or of all.  The tensors of a parameter share its layout.  Gradients may be consumed.
    On CUDA in fp32 one kernel reads gradients once; torch's operations are a pass each.
    """
    if _has_kernel(params):
        from fastssl.optim import momentum_kernel

        momentum_kernel.step_(params, grads, buffers, scales, decay, momentum, lr, found_inf)
        return
    if decay:
        torch._foreach_add_(grads, params, alpha=decay)
    if isinstance(scales, Tensor):
        scale_each_(grads, scales)
    elif scales != 1.0:
        torch._foreach_mul_(grads, scales)
    options = {"weight_decay": 0.0, "momentum": momentum, "lr": lr, "dampening": 0.0, "nesterov": False, "maximize": False}
    torch._fused_sgd_(params, grads, buffers, **options, is_first_step=False, grad_scale=None, found_inf=found_inf)


def _has_kernel(params: Sequence[Tensor]) -> bool:
    return params[0].is_cuda and all(p.dtype is torch.float32 for p in params)
