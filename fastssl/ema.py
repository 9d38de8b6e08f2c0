"""Target networks that follow online networks: in place, multi-tensor, without host synchronisation."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import nn


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy that never takes gradients (DDP then leaves it alone)."""
    return copy.deepcopy(module).requires_grad_(False)


def without_drop_path(module: nn.Module) -> nn.Module:
    """`module` itself, its drop path (timm's, known by its `drop_prob`) switched off: a teacher in training mode never drops."""
    for m in module.modules():
        if hasattr(m, "drop_prob"):
            m.drop_prob = 0.0
    return module


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
        if self.buffers:
            pairs = list(zip(self.online.buffers(), self.target.buffers(), strict=True))
            source += [o for o, _ in pairs if o.is_floating_point()]
            target += [t for _, t in pairs if t.is_floating_point()]
            counters = [(t, o) for o, t in pairs if not o.is_floating_point()]
            if counters:
                torch._foreach_copy_([t for t, _ in counters], [o for _, o in counters])
        torch._foreach_lerp_(target, source, 1.0 - momentum)
