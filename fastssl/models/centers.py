"""Running centres of teacher outputs (DINO, SCFS, iBOT): buffers that follow the mean over the global batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastssl.collectives import world_size


class Centers(nn.Module):
    """c <- m c + (1 - m) mean of the step's teacher rows, for several centres c [1, O] at once (DINO eq. 4).

    `accumulate` in the forward pass, `update` after the step: a step uses the centres of the steps before it, and the mean is
    over all rows of all micro-batches and ranks, however they are shared out.

    sizes: name -> O; the names are the state-dict keys.  momentum: m of all, or by name.  Sums are fp32, or fp64 in a double
    module.
    """

    def __init__(self, sizes: Mapping[str, int], momentum: float | Mapping[str, float] = 0.9):
        super().__init__()
        self.sizes = dict(sizes)
        self.momentum = dict(momentum) if isinstance(momentum, Mapping) else dict.fromkeys(self.sizes, momentum)
        for name, size in self.sizes.items():
            self.register_buffer(name, torch.zeros(1, size))
        # The sums of all centres, then their row counts: one collective takes them all.  Zero between steps, hence not saved.
        self.register_buffer("pending", torch.zeros(sum(self.sizes.values()) + len(self.sizes)), persistent=False)

    def __getitem__(self, name: str) -> Tensor:
        """The centre [1, O]."""
        return self.get_buffer(name)

    @torch.no_grad()
    def accumulate(self, rows: Mapping[str, Tensor]) -> None:
        """Add this micro-batch's teacher outputs, [R, O] for every centre, to the pending means."""
        sums = [rows[name].sum(0, dtype=self.pending.dtype) for name in self.sizes]
        counts = [self.pending.new_full((1,), len(rows[name])) for name in self.sizes]
        self.pending.add_(torch.cat((*sums, *counts)))

    @torch.no_grad()
    def update(self) -> None:
        """Move every centre towards the mean of what all ranks accumulated since the last call; a collective.

        A centre stays where that mean is not finite: the step is skipped, and it would spoil every step that follows.
        """
        if world_size() > 1:
            dist.all_reduce(self.pending)
        *sums, counts = self.pending.split((*self.sizes.values(), len(self.sizes)))
        for name, total, count in zip(self.sizes, sums, counts, strict=True):
            center, mean = self[name], (total / count).unsqueeze(0)
            center.copy_(torch.where(mean.isfinite().all(), center.lerp(mean, 1 - self.momentum[name]), center))
        self.pending.zero_()
