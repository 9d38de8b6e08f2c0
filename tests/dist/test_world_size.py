"""World 2 x B is world 1 x 2B: losses, gradients and weights of every method whose statistics are global, in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from fastssl.batch import Views, masked_patches
from fastssl.config import EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.methods import METHODS
from fastssl.models.vit import ViT
from fastssl.models.vit_mocov3 import MoCoV3ViT
from fastssl.presets import PRESETS
from tests.golden.dino_family import TinyConv, grouped
from tests.ranks import run_ranks

BATCH, STEPS = 8, 3
SIZES = {"dino_mini": (16, 16, 8, 8, 8), **dict.fromkeys(("scfs_mini", "ibot_mini", "sere_mini"), (32, 32, 16, 16, 16))}
"""Of the views, pixels; two of 16 for the other presets."""


def convolutional() -> nn.Module:
    return TinyConv((6, 8, 8, 16))


BACKBONES = {
    "mocov3_vit_mini": lambda: MoCoV3ViT(16, 1, 4, 8, image_size=16),
    **dict.fromkeys(("ibot_mini", "sere_mini"), lambda: ViT(16, 2, 2, 8, image_size=32)),
}
"""Toy backbones of the presets that `convolutional` is none for."""


def batch(generator: torch.Generator, sizes: Sequence[int], *, masked: bool) -> Callable[[slice], Views]:
    """Random crops of BATCH images, with masks on the first two also boxes and flips -> the views of some of the images."""
    crops = [torch.randn(BATCH, 3, s, s, generator=generator, dtype=torch.float64).numpy() for s in sizes]
    if not masked:
        return lambda images: grouped([x[images] for x in crops])
    tokens = sizes[0] // 8
    masks = torch.rand(BATCH, 2, tokens, tokens, generator=generator) < 0.3
    boxes = torch.rand(BATCH, len(sizes), 4, generator=generator) * 32 + torch.tensor([0.0, 0.0, 16.0, 16.0])
    flips = torch.rand(BATCH, len(sizes), generator=generator) < 0.5

    def views(images: slice) -> Views:
        masked = torch.from_numpy(masked_patches(masks[images].numpy()))
        of_images = {"masks": masks[images], "masked": masked, "boxes": boxes[images], "flips": flips[images]}
        return dataclasses.replace(grouped([x[images] for x in crops]), **of_images)

    return views


def train(rank: int, world: int, preset: str, accumulation: int = 1) -> dict[str, torch.Tensor]:
    cfg = PRESETS[preset]()
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, norm="sync"),
        train=dataclasses.replace(cfg.train, global_batch_size=BATCH, accumulation_steps=accumulation),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
    )
    torch.manual_seed(0)
    method = METHODS[cfg.method.name](cfg.method, BACKBONES.get(preset, convolutional), cfg.model.norm)
    state = prepare(method, cfg, Dist(rank, world, rank, world, torch.device("cpu")), steps_per_epoch=4)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        views = batch(generator, SIZES.get(preset, (16, 16)), masked=any(view.mask for view in cfg.views))
        share = BATCH // (world * accumulation)
        starts = [(rank * accumulation + k) * share for k in range(accumulation)]
        out = train_step(state, [views(slice(a, a + share)) for a in starts])
        losses.append(out.loss)
    return {"losses": torch.stack(losses), **method.state_dict()}


TESTED = (
    *("byol_mini", "lewel_mini", "dino_mini", "scfs_mini", "ibot_mini", "sere_mini"),
    *("mocov2_mini", "lewel_m_mini", "mocov3_mini", "mocov3_vit_mini"),
)


def train_each(rank: int, world: int) -> dict[str, dict[str, torch.Tensor]]:
    return {preset: train(rank, world, preset) for preset in TESTED}


@pytest.fixture(scope="module")
def two() -> list[dict[str, dict[str, torch.Tensor]]]:
    """Both ranks' results of every preset: starting two processes takes longer than all the steps."""
    return run_ranks(2, train_each)


@pytest.mark.parametrize("preset", TESTED)
def test_two_ranks_are_one(preset: str, two: list[dict[str, dict[str, torch.Tensor]]]):
    one, ranks = train(0, 1, preset), [rank[preset] for rank in two]
    losses = torch.stack([rank["losses"] for rank in ranks]).mean(0)
    torch.testing.assert_close(losses, one.pop("losses"), rtol=1e-10, atol=0)
    for name, expected in one.items():
        for rank in ranks:
            torch.testing.assert_close(rank[name], expected, rtol=1e-7, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
