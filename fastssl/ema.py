"""Target networks that follow online networks: in place, multi-tensor, without host synchronisation."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy that never takes gradients (DDP then leaves it alone)."""
    return copy.deepcopy(module).requires_grad_(False)


def without_drop_path(module: nn.Module) -> nn.Module:
    """`module` itself, its drop path (timm's, known by its `drop_prob`) switched off: a teacher in training mode never drops."""
    for m in module.modules():
        if hasattr(m, "drop_prob"):
            m.drop_prob = 0.0
    return module


@torch.no_grad()
def average_buffers_(online: nn.Module, target: nn.Module, weight: float | Tensor) -> None:
    """target <- target + weight (online - target) for floating buffers; integer ones are copied (EMAN).  weight: may be a 0-d tensor."""
    pairs = list(zip(online.buffers(), target.buffers(), strict=True))
    averaged, counters = ([(o, t) for o, t in pairs if o.is_floating_point() == floating] for floating in (True, False))
    if averaged:
        targets = [t for _, t in averaged]
        change = torch._foreach_sub([o for o, _ in averaged], targets)
        torch._foreach_mul_(change, weight)
        torch._foreach_add_(targets, change)
    if counters:
        torch._foreach_copy_([t for _, t in counters], [o for o, _ in counters])


class Ema:
    """target <- m * target + (1 - m) * online, for one pair of networks of equal structure.

    buffers: average the floating buffers as well and copy the integer ones (EMAN); otherwise only parameters.
    when: the moment of the step it runs.  target_mode: `eval` keeps the target on its running statistics.
    """

    def __init__(
        self,
        online: nn.Module,
        target: nn.Module,
        *,
        buffers: bool = False,
        when: Literal["before_forward", "after_step"] = "after_step",
        target_mode: Literal["train", "eval"] = "train",
    ):
        self.online, self.target = online, target
        self.buffers, self.when, self.target_mode = buffers, when, target_mode

    @torch.no_grad()
    def update_(self, momentum: float) -> None:
        # Collected each time: moving or casting a module may replace its tensors.
        source, target = list(self.online.parameters()), list(self.target.parameters())
        torch._foreach_lerp_(target, source, 1.0 - momentum)
        if self.buffers:
            average_buffers_(self.online, self.target, 1.0 - momentum)
