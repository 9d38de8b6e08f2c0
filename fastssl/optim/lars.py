"""LARS-SGD of the EMAN / LEWEL / BYOL-PyTorch line (You et al., arXiv 1708.03888, in its |g| + wd |w| form)."""

from __future__ import annotations

import torch


class LARS(torch.optim.Optimizer):
    """For each tensor w with gradient g:  d = (g + wd w) r lr;  buf <- mu buf + d;  w <- w - buf.

    Adapted groups: r = eta |w| / (|g| + wd |w|), 0 where both norms are 0; groups with `excluded` take r = 1 and wd = 0.
    The learning rate is inside the buffer (DeepMind's LARS applies it outside, and uses |g + wd w|).

    All norms and ratios stay on the device.  A non-finite gradient found by the GradScaler skips the update there too
    (`found_inf`), through torch's fused SGD.  Gradients are consumed: `.grad` holds d afterwards.
    """

    _step_supports_amp_scaling = True

    def __init__(self, groups: list[dict], *, lr: float, weight_decay: float, sgd_momentum: float = 0.9, eta: float = 0.001):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "sgd_momentum": sgd_momentum, "eta": eta, "excluded": False})

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
            buffers = [self.state[p]["momentum_buffer"] for p in params]
            if group["excluded"]:
                torch._foreach_mul_(grads, group["lr"])
            else:
                wd = group["weight_decay"]
                w_norm, g_norm = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(grads))
                denominator = g_norm + wd * w_norm
                ratio = torch.where(denominator > 0, group["eta"] * w_norm / denominator, 0.0) * group["lr"]
                torch._foreach_add_(grads, params, alpha=wd)
                torch._foreach_mul_(grads, list(ratio.unbind()))
            torch._fused_sgd_(
                params,
                grads,
                buffers,
                weight_decay=0.0,
                momentum=group["sgd_momentum"],
                lr=1.0,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                grad_scale=None,
                found_inf=found_inf,
            )
