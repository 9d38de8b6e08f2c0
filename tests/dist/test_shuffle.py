"""Shuffle-BN on two ranks: one permutation for all, undone after the encoder, other statistics than without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastssl.models.shuffle import random_permutation, shuffled
from tests.ranks import run_ranks

SHARE = 5


def on_a_rank(rank: int, world: int) -> dict[str, torch.Tensor]:
    """`plain`, `shuffled`: rows of an encoder without BatchNorm; `local`, `mixed`: of one with it, and its statistics."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 4, 3))
    norm = nn.BatchNorm2d(3, momentum=1.0)
    images = torch.randn(world * SHARE, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    x = images[rank * SHARE : (rank + 1) * SHARE].to(memory_format=torch.channels_last)
    torch.manual_seed(10 + rank)
    order = random_permutation(world * SHARE, x.device)
    with torch.no_grad():
        out = {"order": order, "plain": encoder(x), "shuffled": shuffled(encoder, x)}
        out |= {"local": norm(x), "mixed": shuffled(norm, x, lambda n, device: order)}
    return {**out, "running_mean": norm.running_mean, "x": x}


def test_two_ranks():
    ranks = run_ranks(2, on_a_rank)
    order = ranks[0]["order"]
    assert torch.equal(order, ranks[1]["order"]) and torch.equal(order.sort()[0], torch.arange(2 * SHARE))
    assert not torch.equal(order, torch.arange(2 * SHARE))
    images = torch.cat([r["x"] for r in ranks])
    for rank, r in enumerate(ranks):
        torch.testing.assert_close(r["shuffled"], r["plain"])
        assert not torch.allclose(r["mixed"], r["local"])
        mine = images[order[rank * SHARE : (rank + 1) * SHARE]]
        torch.testing.assert_close(r["running_mean"], mine.mean((0, 2, 3)))


def compiled(rank: int, world: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    encoder = nn.Linear(3 * 4 * 4, 3)
    torch.manual_seed(1 + rank)
    x = torch.randn(SHARE, 3, 4, 4)

    def encode(images: torch.Tensor) -> torch.Tensor:
        return shuffled(lambda part: encoder(part.flatten(1)), images)

    with torch.no_grad():
        return [torch.compile(encode, fullgraph=True, dynamic=False)(x), encoder(x.flatten(1))]


@pytest.mark.slow
def test_it_is_part_of_the_graph():
    for actual, expected in run_ranks(2, compiled):
        torch.testing.assert_close(actual, expected)
