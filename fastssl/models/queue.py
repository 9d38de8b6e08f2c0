"""A first-in, first-out queue of keys (MoCo, arXiv 1911.05722): buffers that are the same on all ranks and in every checkpoint."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.collectives import gathered


class Queue(nn.Module):
    """`rows` [size, dim]: unit vectors, random at first; `pointer`: the oldest, which is overwritten next.

    Both are buffers.  The pointer stays on the device: nothing is read back, and no compiled graph depends on its value.
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("rows", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, rows: Tensor) -> None:
        """Put all ranks' rows [n, dim], in rank order, in the place of the oldest; a collective.

        The oldest stay where a row is not finite: the step that made it was skipped, and it would spoil every step until it leaves.
        """
        rows = gathered(rows).to(self.rows.dtype)
        at = (self.pointer + torch.arange(len(rows), device=rows.device)) % len(self.rows)
        self.rows.index_copy_(0, at, torch.where(rows.isfinite().all(1, keepdim=True), rows, self.rows[at]))
        self.pointer.copy_((self.pointer + len(rows)) % len(self.rows))
