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


Pairs = list[tuple[Tensor, Tensor]]
"""(online, target)."""


def average_buffers_(online: nn.Module, target: nn.Module, weight: float | Tensor) -> None:
    """target <- target + weight (online - target) for floating buffers; integer ones are copied (EMAN).  weight: may be a 0-d tensor."""
    _average_(list(zip(online.buffers(), target.buffers(), strict=True)), weight)


@torch.no_grad()
def _average_(buffers: Pairs, weight: float | Tensor) -> None:
    averaged, counters = ([(o, t) for o, t in buffers if o.is_floating_point() == floating] for floating in (True, False))
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
        self._collected: tuple[Pairs, Pairs] | None = None

    def collect(self) -> None:
        """Keep the tensors that `update_` works on, for networks that lie where they stay: moving or casting may replace them.

        Looking them up takes the host longer than launching what is done with them (2 to 4 ms for a ResNet-50 or a ViT-S pair).
        """
        self._collected = self._tensors()

    def _tensors(self) -> tuple[Pairs, Pairs]:
        parameters = list(zip(self.online.parameters(), self.target.parameters(), strict=True))
        return parameters, list(zip(self.online.buffers(), self.target.buffers(), strict=True)) if self.buffers else []

    @torch.no_grad()
    def update_(self, momentum: float) -> None:
        parameters, buffers = self._collected or self._tensors()
        torch._foreach_lerp_([t for _, t in parameters], [o for o, _ in parameters], 1.0 - momentum)
        _average_(buffers, 1.0 - momentum)
