"""World 2 x B is world 1 x 2B: losses, gradients and weights of every method whose statistics are global, in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastssl.config import EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.methods import METHODS
from fastssl.presets import PRESETS
from tests.golden.dino_family import TinyConv, grouped
from tests.ranks import run_ranks

BATCH, STEPS = 8, 3
SIZES = {"dino_mini": (16, 16, 8, 8, 8), "scfs_mini": (32, 32, 16, 16, 16)}
"""Of the views, pixels; two of 16 for the other presets."""


def train(rank: int, world: int, preset: str, accumulation: int = 1) -> dict[str, torch.Tensor]:
    cfg = PRESETS[preset]()
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, norm="sync"),
        train=dataclasses.replace(cfg.train, global_batch_size=BATCH, accumulation_steps=accumulation),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
    )
    torch.manual_seed(0)
    method = METHODS[cfg.method.name](cfg.method, lambda: TinyConv((6, 8, 8, 16)), cfg.model.norm)
    state = prepare(method, cfg, Dist(rank, world, rank, world, torch.device("cpu")), steps_per_epoch=4)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        crops = [torch.randn(BATCH, 3, s, s, generator=generator, dtype=torch.float64).numpy() for s in SIZES.get(preset, (16, 16))]
        share = BATCH // (world * accumulation)
        starts = [(rank * accumulation + k) * share for k in range(accumulation)]
        out = train_step(state, [grouped([x[a : a + share] for x in crops]) for a in starts])
        losses.append(out.loss)
    return {"losses": torch.stack(losses), **method.state_dict()}


@pytest.mark.parametrize("preset", ["byol_mini", "lewel_mini", "dino_mini", "scfs_mini"])
def test_two_ranks_are_one(preset: str):
    one = train(0, 1, preset)
    two = run_ranks(2, train, preset)
    torch.testing.assert_close((two[0].pop("losses") + two[1].pop("losses")) / 2, one.pop("losses"), rtol=1e-10, atol=0)
    for name, expected in one.items():
        for rank in two:
            torch.testing.assert_close(rank[name], expected, rtol=1e-7, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
