"""Projection and prediction heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MLP(nn.Module):
    """linear - BN - ReLU, (layers - 1) times, then a linear; no biases.  x: [R, in] rows -> [R, out].

    Position-wise heads (LEWEL) pass B * P rows: BatchNorm statistics are then over all of them.  Linears start from
    N(0, init_std), by default N(0, sqrt(2 / out_features)) (Kaiming fan-out).
    """

    def __init__(self, in_features: int, hidden: int, out_features: int, *, layers: int = 2, init_std: float | None = None):
        super().__init__()
        widths = [in_features] + [hidden] * (layers - 1)
        blocks: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            blocks += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
        self.mlp = nn.Sequential(*blocks, nn.Linear(widths[-1], out_features, bias=False))
        for m in self.mlp:
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=init_std if init_std is not None else (2.0 / m.out_features) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)

    def rows(self, x: Tensor) -> Tensor:
        """[B, P, in] -> [B, P, out], every position one row."""
        return self.mlp(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def embed_std(z: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of unit rows of z [B, D], times sqrt(D): about 1 when spread, 0 when collapsed."""
    unit = torch.nn.functional.normalize(z.detach().float(), dim=-1)
    return unit.std(dim=0).mean() * z.shape[-1] ** 0.5
