"""Training steps on CUDA: no host synchronisation between log steps, nothing compiled after the first step."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fastssl import batch
from fastssl.batch import Views, masked_patches
from fastssl.config import EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.methods import METHODS
from fastssl.models.backbones import build_backbone
from fastssl.presets import PRESETS
from fastssl.views import ViewSpec
from loaders.geometry import Geometry
from tests.golden.dino_family import grouped

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

CUDA = Dist(0, 1, 0, 1, torch.device("cuda", 0))


def with_geometry(views: Views, spec: ViewSpec, ids: np.ndarray) -> Views:
    """Boxes and flips in images of 80 pixels, and masks where the spec has some, as the loader draws them."""
    geometry, sides = Geometry(spec), np.full((2, len(ids)), 80, np.int32)
    boxes, flips = (torch.from_numpy(a).cuda() for a in geometry.draw(ids, 0, *sides))
    if (masks := geometry.draw_masks(ids, 0)) is None:
        return dataclasses.replace(views, boxes=boxes, flips=flips)
    masked = {"masks": torch.from_numpy(masks).cuda(), "masked": torch.from_numpy(masked_patches(masks)).cuda()}
    return dataclasses.replace(views, boxes=boxes, flips=flips, **masked)


MINI = ("byol_mini", "lewel_mini", "dino_mini", "dino_vit_mini", "scfs_mini", "ibot_mini", "sere_mini")
CASES = [(preset, compile, "off") for preset in MINI for compile in ("off", "on")]
CASES += [(preset, compile, "stages") for preset in ("lewel_mini", "dino_vit_mini") for compile in ("off", "on")]


@pytest.mark.parametrize(("preset", "compile", "checkpointing"), CASES)
def test_steps_neither_synchronise_nor_compile_again(preset: str, compile: str, checkpointing: str, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(batch, "MASKED_CHUNK", 32)  # so that the number of listed patches changes from step to step
    cfg = dataclasses.replace(PRESETS[preset](), efficiency=EfficiencyConfig(compile=compile, checkpointing=checkpointing))
    m = cfg.model
    torch.manual_seed(0)
    method = METHODS[cfg.method.name](
        cfg.method, lambda: build_backbone(m.arch, image_size=m.image_size, drop_path=m.drop_path), cfg.model.norm
    )
    state = prepare(method, cfg, CUDA, steps_per_epoch=2)
    batches = []
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        views = grouped([torch.randn(16, 3, v.crop.size, v.crop.size, generator=generator).numpy() for v in cfg.views])
        for group in views.groups:
            group.pixels = group.pixels.to("cuda", state.dtype, memory_format=torch.channels_last)
        batches.append(with_geometry(views, cfg.views, 16 * seed + np.arange(16)))
    losses = [train_step(state, [views]).loss for views in batches[:2]]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            losses += [train_step(state, [views]).loss for views in batches[2:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.stack(losses).isfinite().all()
