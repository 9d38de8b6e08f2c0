"""MoCo's synchronised BatchNorm over two ranks with unequal shares: every rank's moments count the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eval.detection.norm import NaiveSyncBatchNorm
from tests.ranks import run_ranks

SHARES = (2, 5)


def data() -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return tuple([torch.randn(n, 3, 4, 4, generator=generator, dtype=torch.float64) for n in SHARES] for _ in range(2))


def on_rank(rank: int, world: int) -> dict[str, Tensor]:
    norm = NaiveSyncBatchNorm(3).double()
    x, weights = (parts[rank] for parts in data())
    x.requires_grad_()
    y = norm(x)
    (y * weights).sum().backward()
    return {"y": y.detach(), "grad_x": x.grad, "grad_weight": norm.weight.grad, "mean": norm.running_mean, "var": norm.running_var}


@pytest.mark.slow
def test_ranks_count_equally():
    ranks = run_ranks(2, on_rank)
    parts, weights = data()
    for x in parts:
        x.requires_grad_()
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    mean = sum(x.mean((0, 2, 3)) for x in parts) / 2
    var = sum(x.square().mean((0, 2, 3)) for x in parts) / 2 - mean.square()
    y = [scale[:, None, None] * (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() for x in parts]
    sum((a * w).sum() for a, w in zip(y, weights, strict=True)).backward()
    for i, found in enumerate(ranks):
        torch.testing.assert_close(found["y"], y[i].detach())
        torch.testing.assert_close(found["grad_x"], parts[i].grad)
        torch.testing.assert_close(found["mean"], 0.1 * mean.detach())
        torch.testing.assert_close(found["var"], 0.9 + 0.1 * var.detach())  # biased
    torch.testing.assert_close(sum(found["grad_weight"] for found in ranks), scale.grad)
