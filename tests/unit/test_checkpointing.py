"""Stages that are computed again in the backward pass: the same numbers, statistics counted once, and less kept."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from fastssl.config import EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.methods.byol import BYOL
from fastssl.models.backbones import build_backbone
from fastssl.models.features import Backbone
from fastssl.models.swin import Swin
from fastssl.models.vit import ViT
from fastssl.presets import PRESETS
from tests.golden.dino_family import TinyConv
from tests.golden.toy import two_views
from tests.ranks import run_ranks

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
BACKBONES = {
    "resnet": lambda: build_backbone("resnet18"),
    "vit": lambda: ViT(16, 3, 2, 8, image_size=32, drop_path=0.3),
    "swin": lambda: Swin(8, (1, 2), (2, 4), 4, image_size=32, drop_path=0.3),
}


def passes(backbone: Backbone, *, recompute: bool) -> tuple[Tensor, dict[str, Tensor], int]:
    """-> the output of the second of two training passes, gradients and buffers after it, and the bytes kept for its backward."""
    backbone.recompute, kept = recompute, {}

    def keep(t: Tensor) -> Tensor:
        if not isinstance(t, torch.nn.Parameter):
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for seed in (1, 2):
        torch.manual_seed(seed)
        x = torch.randn(4, 3, 32, 32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = backbone(x).pooled
        size = sum(kept.values())
        y.square().sum().backward()
        kept.clear()
    grads = {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}
    return y.detach(), {**grads, **dict(backbone.named_buffers())}, size


@pytest.mark.parametrize("name", BACKBONES)
def test_recomputed_is_kept(name: str):
    results = []
    for recompute in (False, True):
        torch.manual_seed(0)
        results.append(passes(BACKBONES[name]().train(), recompute=recompute))
    (y, state, size), (y_again, state_again, size_again) = results
    assert torch.equal(y_again, y)
    torch.testing.assert_close(state_again, state, rtol=1e-5, atol=1e-6)
    assert size_again < 0.6 * size


def trained(dist: Dist, norm: str, **switches: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses of two steps of BYOL on this rank's share of a batch, and all weights and buffers after them."""
    cfg = dataclasses.replace(PRESETS["byol_mini"](), efficiency=EfficiencyConfig(dtype="fp64", **switches))
    torch.manual_seed(0)
    state = prepare(BYOL(BYOL.Config(hidden=16, dim=8), lambda: TinyConv([4, 4, 6, 8]), norm), cfg, dist, steps_per_epoch=4)
    images = torch.randn(2, 8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = [x.chunk(dist.world)[dist.rank].numpy() for x in images]
    return torch.stack([train_step(state, [two_views(*mine)]).loss for _ in range(2)]), state.method.state_dict()


def with_and_without(rank: int, world: int) -> list:
    here = Dist(rank, world, rank, world, torch.device("cpu"))
    return [trained(here, "sync", compile="off", checkpointing=value) for value in ("off", "stages")]


@pytest.mark.slow
def test_on_two_ranks_with_sync_norm():
    for kept, recomputed in run_ranks(2, with_and_without):
        torch.testing.assert_close(recomputed, kept, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_compiled_and_recomputed_is_eager():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = trained(ALONE, "local", compile="on", checkpointing="stages")
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(compiled, trained(ALONE, "local", compile="off"), rtol=1e-8, atol=1e-10)
