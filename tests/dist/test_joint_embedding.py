"""World 2 x B is world 1 x 2B for SFRIK, SimCLR, AUH and VICReg, multi-crops and a smaller last batch too.  float64."""

from __future__ import annotations

import dataclasses

import torch

from fastssl.config import EfficiencyConfig, TrainConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.methods import METHODS
from fastssl.presets import PRESETS
from tests.golden.dino_family import TinyConv, grouped
from tests.ranks import run_ranks

MULTI_CROP = (16, 16, 8, 8, 8)
RUNS = {
    "sfrik": ("sfrik_mini", {}, (16, 16)),
    "swav": ("sfrik_mini", {"general_indices": (0, 1), "reg_small": False}, MULTI_CROP),
    "obow": ("sfrik_mini", {"general_indices": (0,)}, MULTI_CROP),
    "simclr": ("simclr_mini", {}, (16, 16)),
    "auh": ("auh_mini", {}, (16, 16)),
    "vicreg": ("vicreg_mini", {}, (16, 16)),
}
"""Preset, changed values of the method, sizes of the views."""


def train(rank: int, world: int, run: str) -> dict[str, torch.Tensor]:
    """Losses and final weights of two whole steps and a smaller one."""
    preset, changed, sizes = RUNS[run]
    cfg = PRESETS[preset]()
    cfg = dataclasses.replace(
        cfg,
        method=dataclasses.replace(cfg.method, mlp="24-20", **changed),
        train=TrainConfig(epochs=4, global_batch_size=8),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
    )
    torch.manual_seed(0)
    method = METHODS[cfg.method.name](cfg.method, lambda: TinyConv((6, 8, 8, 16)), cfg.model.norm)
    state = prepare(method, cfg, Dist(rank, world, rank, world, torch.device("cpu")), steps_per_epoch=1)
    generator, losses = torch.Generator().manual_seed(1), []
    for size in (8, 8, 6):
        crops = [torch.randn(size, 3, s, s, generator=generator, dtype=torch.float64).numpy() for s in sizes]
        mine = slice(rank * size // world, (rank + 1) * size // world)
        losses.append(train_step(state, [grouped([x[mine] for x in crops])]).loss)
    return {"losses": torch.stack(losses), **method.state_dict()}


def train_all(rank: int, world: int) -> dict[str, dict[str, torch.Tensor]]:
    return {run: train(rank, world, run) for run in RUNS}


def test_two_ranks_are_one():
    two = run_ranks(2, train_all)
    for run, one in train_all(0, 1).items():
        losses = [rank[run].pop("losses") for rank in two]
        torch.testing.assert_close(sum(losses) / 2, one.pop("losses"), rtol=1e-10, atol=0, msg=lambda m, run=run: f"{run}: {m}")
        for name, expected in one.items():
            where = f"{run} {name}"
            for rank in two:
                torch.testing.assert_close(rank[run][name], expected, rtol=1e-8, atol=1e-10, msg=lambda m, where=where: f"{where}: {m}")
