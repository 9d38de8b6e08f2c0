"""LARS-SGD (You et al., arXiv 1708.03888) in the two forms that self-supervised code bases use."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.optim.scale import scale_each_


class _Lars(torch.optim.Optimizer):
    """buf <- mu buf + d;  w <- w - lr buf, where the direction d of each form is made from w and its gradient.

    All norms and ratios stay on the device.  A non-finite gradient found by the GradScaler skips the update there too
    (`found_inf`), through torch's fused SGD.  Gradients are consumed: `.grad` holds d afterwards.
    """

    _step_supports_amp_scaling = True

    def __init__(self, groups: list[dict], *, lr: float, weight_decay: float, sgd_momentum: float = 0.9, eta: float = 0.001):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "sgd_momentum": sgd_momentum, "eta": eta, "excluded": False})

    def direction_(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> float:
        """Turn the gradients of one group into d, in place -> the learning rate outside the buffer."""
        raise NotImplementedError(f"{type(self).__name__} has no direction_")

    @torch.no_grad()
    def step(self) -> None:
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            lr = self.direction_(group, params, grads)
            torch._fused_sgd_(
                params,
                grads,
                [self.state[p]["momentum_buffer"] for p in params],
                weight_decay=0.0,
                momentum=group["sgd_momentum"],
                lr=lr,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                grad_scale=None,
                found_inf=found_inf,
            )


class LARS(_Lars):
    """The EMAN / LEWEL / BYOL-PyTorch line, in its |g| + wd |w| form.  For each tensor w with gradient g:  d = (g + wd w) r lr.

    Adapted groups: r = eta |w| / (|g| + wd |w|), 0 where both norms are 0; groups with `excluded` take r = 1 and wd = 0.
    The learning rate is inside the buffer (DeepMind's LARS applies it outside, and uses |g + wd w|).
    """

    def direction_(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> float:
        if group["excluded"]:
            torch._foreach_mul_(grads, group["lr"])
        else:
            wd = group["weight_decay"]
            w_norm, g_norm = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(grads))
            denominator = g_norm + wd * w_norm
            ratio = torch.where(denominator > 0, group["eta"] * w_norm / denominator, 0.0) * group["lr"]
            torch._foreach_add_(grads, params, alpha=wd)
            scale_each_(grads, ratio)
        return 1.0


class BarlowLARS(_Lars):
    """The Barlow Twins line (DINO, SCFS, MoCo v3, W2SSL, VICReg, SFRIK).  For each tensor w with gradient g:  d = (g + wd w) r.

    Adapted groups: r = eta |w| / |g + wd w|, 1 where either norm is 0; groups with `excluded` take d = g.
    The learning rate is outside the buffer.
    """

    def direction_(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> float:
        if not group["excluded"]:
            torch._foreach_add_(grads, params, alpha=group["weight_decay"])
            w_norm, d_norm = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(grads))
            ratio = torch.where((w_norm > 0) & (d_norm > 0), group["eta"] * w_norm / d_norm, 1.0)
            scale_each_(grads, ratio)
        return group["lr"]
