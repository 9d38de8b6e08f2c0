"""Losses over all pairs on several ranks: rank-averaged gradients are those of the dense formula on the whole batch."""

from __future__ import annotations

import pytest
import torch

from tests.dense_losses import LOSSES, value_and_gradients, views
from tests.ranks import run_ranks

SHAPES = ((12, 20), (24, 8))
"""More columns than rows, and fewer: VICReg's two ways."""
ONE_OF_EACH = ("mmd L=3", "nt_xent", "uniformity", "variance", "covariance")


def on_rank(rank: int, world: int, compiled: bool) -> dict:
    out = {}
    for shape in SHAPES[: 1 if compiled else 2]:
        x, y = (v.chunk(world)[rank] for v in views(*shape))
        for name in ONE_OF_EACH if compiled else LOSSES:
            ours = torch.compile(LOSSES[name][0], fullgraph=True, backend="aot_eager") if compiled else LOSSES[name][0]
            out[name, shape, torch.float64] = value_and_gradients(ours, x, y)
            if name in ONE_OF_EACH:
                with torch.autocast("cpu", torch.bfloat16):
                    out[name, shape, torch.bfloat16] = value_and_gradients(ours, x.float(), y.float())
    return out


@pytest.mark.parametrize(
    ("world", "compiled"), [(2, False), pytest.param(4, False, marks=pytest.mark.slow), pytest.param(2, True, marks=pytest.mark.slow)]
)
def test_equals_the_dense_loss_of_the_whole_batch(world: int, compiled: bool):
    ranks = run_ranks(world, on_rank, compiled)
    for name, shape, dtype in ranks[0]:
        exact = dtype is torch.float64
        dense = value_and_gradients(LOSSES[name][1], *views(*shape))
        for i, expected in enumerate(dense):
            results = [result[name, shape, dtype][i].double() for result in ranks]
            assert i > 0 or all(torch.equal(value, results[0]) for value in results)
            # DDP adds up the ranks' gradients, each times 1 / world.
            actual = results[0] if i == 0 else torch.cat(results) / world
            assert (actual - expected).norm() <= (1e-11 if exact else 2e-2) * expected.norm(), f"{name}, {shape}, {dtype}, {i}"
