"""Gradients exchanged in bf16: the same on all ranks, and those of fp32 within the rounding."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastssl.config import EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import forward_backward, prepare
from tests.golden.toy import two_views
from tests.ranks import run_ranks
from tests.unit.test_engine import Regression, batch, config


def gradients(rank: int, world: int) -> dict[str, list[torch.Tensor]]:
    """Of one step, by the type in which they are exchanged."""
    x, y = batch()
    share = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
    found = {}
    for dtype in ("auto", "bf16"):
        cfg = dataclasses.replace(config(), efficiency=EfficiencyConfig(dtype="fp64", compile="off", gradient_dtype=dtype))
        torch.manual_seed(0)
        state = prepare(Regression(), cfg, Dist(rank, world, rank, world, torch.device("cpu")), 2)
        forward_backward(state, iter([two_views(x[share], y[share])]), state.schedules.at(0))
        found[dtype] = [p.grad for p in state.method.parameters() if p.requires_grad]
    return found


@pytest.mark.slow
def test_bf16_rounds_what_is_exchanged():
    here, there = run_ranks(2, gradients)
    for exact, rounded, other in zip(here["auto"], here["bf16"], there["bf16"], strict=True):
        assert torch.equal(rounded, other)
        assert not torch.equal(rounded, exact)
        # Each rank's half of the sum is rounded, then the sum: 2^-9 of the largest each.
        torch.testing.assert_close(rounded, exact, rtol=0, atol=3 * 2**-8 * exact.abs().max().item())
