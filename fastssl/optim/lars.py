"""LARS-SGD (You et al., arXiv 1708.03888) in the two forms that self-supervised code bases use."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.optim.momentum import momentum_step_, norms


class _Lars(torch.optim.Optimizer):
    """buf <- mu buf + d;  w <- w - lr buf, where the direction d = s (g + c w) of each form is made from w and its gradient.

    All norms and ratios stay on the device.  A non-finite gradient found by the GradScaler skips the update there too (`found_inf`).
    Gradients may be consumed.
    """

    _step_supports_amp_scaling = True

    def __init__(self, groups: list[dict], *, lr: float, weight_decay: float, sgd_momentum: float = 0.9, eta: float = 0.001):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "sgd_momentum": sgd_momentum, "eta": eta, "excluded": False})

    def direction(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> tuple[Tensor | float, float, float]:
        """-> s of every tensor of one group, [tensors], or of all; c; the learning rate outside the buffer."""
        raise NotImplementedError(f"{type(self).__name__} has no direction")

    @torch.no_grad()
    def step(self) -> None:
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads, buffers = [in_layout(p.grad, p) for p in params], [self._buffer(p) for p in params]
            scales, decay, lr = self.direction(group, params, grads)
            options = {"momentum": group["sgd_momentum"], "lr": lr, "found_inf": found_inf}
            momentum_step_(params, grads, buffers, scales, decay, **options)

    def _buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        # A checkpoint may come from a run with other layouts.
        state["momentum_buffer"] = in_layout(state["momentum_buffer"], p) if state else torch.zeros_like(p)
        return state["momentum_buffer"]


def in_layout(t: Tensor, p: Tensor) -> Tensor:
    """`t` itself, or a copy of it where its elements lie in another order than those of `p`."""
    same = t.stride() == p.stride() or all(a == b for n, a, b in zip(p.shape, t.stride(), p.stride(), strict=True) if n != 1)
    return t if same else torch.empty_like(p).copy_(t)


class LARS(_Lars):
    """The EMAN / LEWEL / BYOL-PyTorch line, in its |g| + wd |w| form.  For each tensor w with gradient g:  d = (g + wd w) r lr.

    Adapted groups: r = eta |w| / (|g| + wd |w|), 0 where both norms are 0; groups with `excluded` take r = 1 and wd = 0.
    The learning rate is inside the buffer (DeepMind's LARS applies it outside, and uses |g + wd w|).
    """

    def direction(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> tuple[Tensor | float, float, float]:
        if group["excluded"]:
            return group["lr"], 0.0, 1.0
        wd = group["weight_decay"]
        w_norm, g_norm = norms(params, grads)
        denominator = g_norm + wd * w_norm
        return torch.where(denominator > 0, group["eta"] * w_norm / denominator, 0.0) * group["lr"], wd, 1.0


class BarlowLARS(_Lars):
    """The Barlow Twins line (DINO, SCFS, MoCo v3, W2SSL, VICReg, SFRIK).  For each tensor w with gradient g:  d = (g + wd w) r.

    Adapted groups: r = eta |w| / |g + wd w|, 1 where either norm is 0; groups with `excluded` take d = g.
    The learning rate is outside the buffer.
    """

    def direction(self, group: dict, params: list[Tensor], grads: list[Tensor]) -> tuple[Tensor | float, float, float]:
        if group["excluded"]:
            return 1.0, 0.0, group["lr"]
        wd = group["weight_decay"]
        w_norm, d_norm = norms(params, grads, wd)
        return torch.where((w_norm > 0) & (d_norm > 0), group["eta"] * w_norm / d_norm, 1.0), wd, group["lr"]
