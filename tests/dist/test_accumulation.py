"""Accumulation on two DDP ranks is one large batch: gradients are exchanged once, and all of them."""

from __future__ import annotations

import pytest
import torch

from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from tests.golden.toy import two_views
from tests.ranks import run_ranks
from tests.unit.test_engine import Regression, batch, config


def train(rank: int, world: int, accumulation: int) -> dict[str, torch.Tensor]:
    state = prepare(Regression(), config(accumulation_steps=accumulation), Dist(rank, world, rank, world, torch.device("cpu")), 2)
    x, y = batch()
    share = len(x) // (world * accumulation)
    for _ in range(3):
        starts = [(rank * accumulation + k) * share for k in range(accumulation)]
        train_step(state, [two_views(x[a : a + share], y[a : a + share]) for a in starts])
    return state.method.state_dict()


@pytest.mark.slow
def test_two_ranks_with_two_micro_batches():
    whole = train(0, 1, 1)
    for rank in run_ranks(2, train, 2):
        torch.testing.assert_close(rank, whole)
