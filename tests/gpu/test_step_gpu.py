"""Training steps on CUDA: no host synchronisation between log steps, nothing compiled after the first step, replayed graphs."""

from __future__ import annotations

import pytest
import torch

from fastssl import batch as batches
from fastssl.distributed import Dist
from fastssl.engine import train_step
from tests.gpu import steps

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

CUDA = Dist(0, 1, 0, 1, torch.device("cuda", 0))
MINI = ("byol_mini", "lewel_mini", "dino_mini", "dino_vit_mini", "scfs_mini", "ibot_mini", "sere_mini")
CASES = [(preset, {"compile": compile}) for preset in MINI for compile in ("off", "on")]
CASES += [(preset, {"compile": c, "checkpointing": "stages"}) for preset in ("lewel_mini", "dino_vit_mini") for c in ("off", "on")]


@pytest.fixture(autouse=True)
def short_lists(monkeypatch):
    """The number of listed patches changes from step to step."""
    torch._dynamo.reset()
    monkeypatch.setattr(batches, "MASKED_CHUNK", 32)


@pytest.mark.parametrize(("preset", "efficiency"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(x.values()))
def test_steps_neither_synchronise_nor_compile_again(preset: str, efficiency: dict):
    state = steps.prepared(steps.configured(preset, **efficiency), CUDA)
    given = [steps.batch(state, seed) for seed in range(6)]
    losses = [train_step(state, [views]).loss for views in given[:2]]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            losses += [train_step(state, [views]).loss for views in given[2:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("preset", ["lewel_mini", "dino_vit_mini", "ibot_mini", "w2ssl_mini"])
def test_cuda_graphs_give_the_same_losses(preset: str):
    losses = {}
    for graphs in (False, True):
        state = steps.prepared(steps.configured(preset, compile="on", cuda_graphs=graphs), CUDA)
        losses[graphs] = torch.stack([train_step(state, [steps.batch(state, seed)]).loss.clone() for seed in range(8)])
    torch.testing.assert_close(losses[True], losses[False], rtol=2e-3, atol=2e-3)
