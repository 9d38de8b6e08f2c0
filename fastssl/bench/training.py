"""One rank of a preset, ready to train on images that stay on its device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from fastssl.augment import Augmenter
from fastssl.batch import ImageBatch, Views, masked_patches
from fastssl.bench.augment_work import material
from fastssl.config import RunConfig
from fastssl.distributed import Dist
from fastssl.engine import State, prepare
from fastssl.hooks import GarbageCollection
from fastssl.methods import build_method
from fastssl.presets import PRESETS
from loaders.errors import DataError
from loaders.geometry import Geometry

STEPS_PER_EPOCH = 1000
"""All that is measured happens in the first epoch."""
ON_CPU = 8
"""Images of a step on a CPU, unless told otherwise: it takes a hundred times as long."""
DRAWS = 4
"""Of masks, where a method has some."""
RANKS = 8
"""Of a published run that does not say how many it had."""


@dataclass
class Rank:
    state: State
    images: ImageBatch
    augment: Augmenter
    views: Views
    """Of the images, with boxes, flips and masks: what a training step takes."""
    turns: tuple[Views, ...]
    """The same with other draws of the masks, for the steps in turn: how many patches are hidden changes as in training."""

    @property
    def batch(self) -> int:
        return len(self.images)

    @property
    def views_per_image(self) -> int:
        """Crops that an image gives; a `PatchCrop` gives several."""
        return sum(len(group.views) for group in self.views.groups)


def named(preset: str) -> RunConfig:
    """DataError for a name that is no preset."""
    if preset not in PRESETS:
        raise DataError(f"There is no preset '{preset}'. Known: {', '.join(PRESETS)}.")
    return PRESETS[preset]()


def per_rank(cfg: RunConfig, device: torch.device) -> int:
    """Images of a rank when nothing is said: as published, else the global batch over 8 ranks; a CPU takes fewer."""
    t = cfg.train
    published = t.published_rank_batch or (t.global_batch_size if t.global_batch_size <= 64 else t.global_batch_size // RANKS)
    return published if device.type == "cuda" else min(published, ON_CPU)


def one_rank(cfg: RunConfig, dist: Dist, batch: int, images: ImageBatch | None = None) -> Rank:
    """This rank's network, optimizer and schedules as training has them, and a batch of `batch` images; random ones unless given."""
    cfg = replace(cfg, train=replace(cfg.train, global_batch_size=batch * dist.world, accumulation_steps=1))
    torch.manual_seed(cfg.train.seed)
    state = prepare(build_method(cfg), cfg, dist, STEPS_PER_EPOCH)
    images = material(cfg.views, batch, dist.device).batch if images is None else images
    augment = Augmenter(
        cfg.views,
        device=dist.device,
        dtype=state.dtype,
        seed=cfg.train.seed,
        channels_last=cfg.efficiency.channels_last,
        compile=state.compiled and dist.device.type == "cuda",
    )
    views = augment(images)
    return Rank(state, images, augment, views, (views, *masked_anew(views, cfg)))


def masked_anew(views: Views, cfg: RunConfig) -> list[Views]:
    """The views with the masks of some later epochs; none where nothing is masked."""
    if views.masked is None:
        return []
    geometry, ids = Geometry(cfg.views, cfg.train.seed), views.index.cpu().numpy()
    found = []
    for epoch in range(1, DRAWS):
        masks = geometry.draw_masks(ids, epoch)
        on_device = (torch.from_numpy(a).to(views.masked.device) for a in (masks, masked_patches(masks)))
        found.append(replace(views, **dict(zip(("masks", "masked"), on_device, strict=True))))
    return found


@contextmanager
def collector_resting(state: State) -> Iterator[GarbageCollection]:
    """Python's collector as train.py has it while it trains; yields the hook that `fit` takes."""
    hook = GarbageCollection()
    hook.start(state)
    try:
        yield hook
    finally:
        hook.close()
