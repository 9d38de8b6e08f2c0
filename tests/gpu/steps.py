"""Batches on a GPU, and training steps with them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fastssl.batch import Views, masked_patches
from fastssl.config import EfficiencyConfig, RunConfig
from fastssl.distributed import Dist
from fastssl.engine import State, prepare
from fastssl.methods import METHODS
from fastssl.models.backbones import build_backbone
from fastssl.presets import PRESETS
from fastssl.views import ViewSpec
from loaders.geometry import Geometry
from tests.golden.dino_family import grouped

IMAGES = 16
"""Of a global batch."""


def configured(preset: str, norm: str | None = None, **efficiency) -> RunConfig:
    """`norm`: for comparing numbers of ranks, which draw drop path each for itself; it is off then."""
    cfg = dataclasses.replace(PRESETS[preset](), efficiency=EfficiencyConfig(**efficiency))
    return cfg if norm is None else dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, norm=norm, drop_path=0.0))


def prepared(cfg: RunConfig, dist: Dist) -> State:
    """Two steps an epoch, the same weights every time."""
    m = cfg.model
    torch.manual_seed(0)
    method = METHODS[cfg.method.name](
        cfg.method, lambda: build_backbone(m.arch, image_size=m.image_size, drop_path=m.drop_path), cfg.model.norm
    )
    return prepare(method, cfg, dist, steps_per_epoch=2)


def batch(state: State, seed: int, rows: slice = slice(None)) -> Views:
    """Random images, with boxes, flips and masks as the loader draws them; `rows` of the global batch."""
    views, generator = state.cfg.views, torch.Generator().manual_seed(seed)
    pixels = [torch.randn(IMAGES, 3, v.crop.size, v.crop.size, generator=generator)[rows].numpy() for v in views]
    out = grouped(pixels)
    for group in out.groups:
        group.pixels = group.pixels.to("cuda", state.dtype, memory_format=torch.channels_last)
    return _with_geometry(out, views, (IMAGES * seed + np.arange(IMAGES))[rows])


def _with_geometry(views: Views, spec: ViewSpec, ids: np.ndarray) -> Views:
    geometry, sides = Geometry(spec), np.full((2, len(ids)), 80, np.int32)
    boxes, flips = (torch.from_numpy(a).cuda() for a in geometry.draw(ids, 0, *sides))
    if (masks := geometry.draw_masks(ids, 0)) is None:
        return dataclasses.replace(views, boxes=boxes, flips=flips)
    masked = {"masks": torch.from_numpy(masks).cuda(), "masked": torch.from_numpy(masked_patches(masks)).cuda()}
    return dataclasses.replace(views, boxes=boxes, flips=flips, **masked)
