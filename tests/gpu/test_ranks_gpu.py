"""Two ranks share one GPU: what they train, compiled under DDP, is what one process trains on the whole batch."""

from __future__ import annotations

import pytest
import torch

from fastssl.distributed import Dist
from fastssl.engine import train_step
from tests.gpu import steps
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def losses(rank: int, world: int, preset: str, compile: str, cuda_graphs: bool = False) -> torch.Tensor:
    """Of five steps on this rank's share of each batch."""
    torch.cuda.set_device(0)
    dist = Dist(rank, world, rank, world, torch.device("cuda", 0))
    cfg = steps.configured(preset, norm="sync", compile=compile, cuda_graphs=cuda_graphs, dtype="fp32")
    state, share = steps.prepared(cfg, dist), steps.IMAGES // world
    rows = slice(rank * share, (rank + 1) * share)
    return torch.stack([train_step(state, [steps.batch(state, seed, rows)]).loss.clone() for seed in range(5)]).cpu()


@pytest.mark.parametrize(("preset", "graphs"), [("scfs_mini", False), ("ibot_mini", False), ("scfs_mini", True)])
def test_two_ranks_train_as_one(preset: str, graphs: bool):
    """gloo, since NCCL takes no GPU twice."""
    expected = losses(0, 1, preset, "off")
    found = torch.stack(run_ranks(2, losses, preset, "on", graphs)).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
