"""Online evaluation on several ranks, whose BatchNorms have seen different images."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from fastssl.distributed import Dist
from fastssl.hooks import OnlineEvaluation
from fastssl.metrics import Metrics
from tests.ranks import run_ranks


def evaluate(rank: int, world: int) -> tuple[list[float], float]:
    """-> (mean and variance that the evaluation saw, mean afterwards); before, they are rank + 1 and rank + 2."""
    norm, seen = nn.BatchNorm2d(3), []
    norm.running_mean.fill_(rank + 1)
    norm.running_var.fill_(rank + 2)

    def look(backbone: nn.Module) -> dict[str, float]:
        seen.extend(float(b.mean()) for b in (backbone.running_mean, backbone.running_var))
        return {"top1": 1.0}

    dist = Dist(rank, world, rank, world, torch.device("cpu"))
    state = SimpleNamespace(method=SimpleNamespace(backbone=norm), dist=dist, step=4, steps_per_epoch=4, metrics=Metrics())
    OnlineEvaluation(look, lambda record: None, every_epochs=1).run(state)
    return seen, float(norm.running_mean.mean())


def test_every_rank_evaluates_the_network_of_the_checkpoint():
    """Rank 0's; training goes on with each rank's own."""
    assert run_ranks(2, evaluate) == [([1.0, 2.0], 1.0), ([1.0, 2.0], 2.0)]
    assert evaluate(0, 1) == ([1.0, 2.0], 1.0)
