"""Centres follow the mean over the global batch, however ranks and micro-batches share it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.models.centers import Centers
from tests.ranks import run_ranks

# Rows of each micro-batch, by rank.
SHARES = ((3, 1), (2, 6))
SIZES = {"final": 5, "stage": 3}


def rows(step: int) -> dict[str, Tensor]:
    n = sum(map(sum, SHARES))
    return {k: torch.randn(n, size, generator=torch.Generator().manual_seed(step), dtype=torch.float64) for k, size in SIZES.items()}


def centres(rank: int, world: int) -> list[dict[str, Tensor]]:
    """The centres after each of three steps; on one rank the whole batch at once."""
    centers, out = Centers(SIZES).double(), []
    for step in range(3):
        whole = rows(step)
        if world == 1:
            centers.accumulate(whole)
        else:
            parts = {k: r.split(sum(SHARES, ())) for k, r in whole.items()}
            first = sum(map(len, SHARES[:rank]))
            for i in range(len(SHARES[rank])):
                centers.accumulate({k: p[first + i] for k, p in parts.items()})
        centers.update()
        out.append({k: v.clone() for k, v in centers.state_dict().items()})
    return out


def test_unequal_ranks_and_micro_batches_are_one_batch():
    expected = centres(0, 1)
    ranks = run_ranks(len(SHARES), centres)
    torch.testing.assert_close(ranks[0], expected, rtol=1e-12, atol=1e-15)
    for here, there in zip(*ranks, strict=True):
        assert all(torch.equal(here[k], there[k]) for k in SIZES)
