"""What end-to-end training sees: crops, RandAugment, random erasing, mixup and cutmix, by timm where timm has them.

Crops are rendered on the device, as all crops.  RandAugment is Pillow's work: its draws are made here, for each view of each image
from (seed, epoch, sample id, view), and threads apply them to the next step's crops while the network trains on this one's.
Erasing and mixing run on the device's tensors, with timm's code.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from eval.tuning_protocols import TuningProtocol
from fastssl.augment.augmenter import Augmenter
from fastssl.batch import ImageBatch
from fastssl.distributed import Dist
from fastssl.rng import STEP, TUNING, random_u32
from fastssl.views import Crop, Photometric, View, ViewSpec

Plan = list[Callable[[Image.Image], Image.Image]]
"""What to do with an image, in order."""


class RandAugment:
    """timm's, its draws apart from its work on pixels."""

    def __init__(self, name: str, *, crop: int, mean: tuple[float, ...], interpolation: str, seed: int):
        from timm.data.auto_augment import (
            rand_augment_transform,
        )  # timm takes seconds to load, and semi-supervised training needs none of it

        how = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
        fill = tuple(min(255, round(255 * x)) for x in mean)
        self.seed = seed
        self.transform = rand_augment_transform(name, {"translate_const": int(crop * 0.45), "img_mean": fill, "interpolation": how})
        for operation in self.transform.ops:
            operation.aug_fn = partial(_noted, _posterized if operation.name.startswith("Posterize") else operation.aug_fn)

    def plan(self, epoch: int, sample: int, view: int) -> Plan:
        key = int(random_u32(self.seed, TUNING, epoch, sample, view))
        random.seed(key)
        np.random.seed(key)  # noqa: NPY002  timm draws from the global generators
        return self.transform([])


def _posterized(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """timm's.  At its largest strength no bits are left, which is black; Pillow 13 refuses to."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


def _noted(function: Callable, plan: Plan, *level, **options) -> Plan:
    """Stands for timm's `function` of an image: adds it, with the strength drawn, to a plan instead."""
    return [*plan, lambda image: function(image, *level, **options)]


def applied(levels: np.ndarray, plan: Plan) -> np.ndarray:
    """uint8 [h, w, 3] -> the same after the plan."""
    image = Image.fromarray(levels)
    for step in plan:
        image = step(image)
    return np.asarray(image)


class TrainingImages:
    """ImageBatches -> images of a forward pass and what the network should say of them.  n = views of the batch's images."""

    def __init__(self, protocol: TuningProtocol, normalisation: Photometric, num_classes: int, *, dist: Dist, seed: int, threads: int):
        self.dist, self.seed, self.protocol = dist, seed, protocol
        self.mean, self.std = (torch.tensor(t, device=dist.device).view(3, 1, 1) for t in (normalisation.mean, normalisation.std))
        self.randomly: RandAugment | None = None
        if protocol.rand_augment:
            options = {"crop": protocol.crop, "mean": normalisation.mean, "interpolation": protocol.train_interpolation, "seed": seed}
            self.randomly = RandAugment(protocol.rand_augment, **options)
        self.crops = Augmenter(self.spec(protocol, normalisation), device=dist.device, dtype=torch.float32, seed=seed)
        self.threads = threads
        self.erase = self.mix = None
        if protocol.erase:
            from timm.data.random_erasing import RandomErasing

            self.erase = RandomErasing(protocol.erase, mode="pixel", device=dist.device)
        if protocol.mixes:
            from timm.data import Mixup

            alphas = {"mixup_alpha": protocol.mixup, "cutmix_alpha": protocol.cutmix}
            self.mix = Mixup(**alphas, switch_prob=0.5, label_smoothing=protocol.smoothing, num_classes=num_classes)

    @staticmethod
    def spec(protocol: TuningProtocol, normalisation: Photometric) -> ViewSpec:
        """The crops.  RandAugment takes grey levels: then they are normalised after it."""
        mean, std = (normalisation.mean, normalisation.std) if not protocol.rand_augment else ((0.0,) * 3, (1.0,) * 3)
        crop = Crop(size=protocol.crop, scale=(protocol.min_scale, 1.0), interpolation=protocol.train_interpolation)
        return (View(crop=crop, photometric=Photometric(mean=mean, std=std)),) * protocol.repeats

    def of(self, batches: Iterable[ImageBatch]) -> Iterator[tuple[Tensor, Tensor]]:
        """float32 [n, 3, s, s] normalised, and labels [n]."""
        if self.randomly is None:
            yield from (self._cropped(batch) for batch in batches)
            return
        with ThreadPoolExecutor(self.threads) as pool:
            begun: deque[tuple[list[Future], Tensor]] = deque()
            for batch in batches:
                begun.append(self._begin(batch, pool))
                if len(begun) > 1:
                    yield self._finish(*begun.popleft())
            while begun:
                yield self._finish(*begun.popleft())

    def _cropped(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        (group,) = self.crops(batch).groups
        return group.pixels, batch.label.long().repeat(self.protocol.repeats)

    def _begin(self, batch: ImageBatch, pool: ThreadPoolExecutor) -> tuple[list[Future], Tensor]:
        x, labels = self._cropped(batch)
        levels = x.mul(255).round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        samples = batch.index.tolist()
        keys = [(batch.epoch, sample, view) for view in range(self.protocol.repeats) for sample in samples]
        plans = [self.randomly.plan(*key) for key in keys]
        return [pool.submit(applied, *each) for each in zip(levels, plans, strict=True)], labels

    def _finish(self, futures: list[Future], labels: Tensor) -> tuple[Tensor, Tensor]:
        levels = torch.from_numpy(np.stack([future.result() for future in futures])).to(self.dist.device)
        return levels.permute(0, 3, 1, 2).float().div_(255).sub_(self.mean).div_(self.std), labels

    def mixed(self, x: Tensor, labels: Tensor, step: int, part: int) -> tuple[Tensor, Tensor]:
        """Erased and mixed in place; labels int64 [n], or mixed and smoothed ones [n, C].

        Seeds all generators from (seed, step, rank, part of the step): drop path draws after it.
        """
        key = int(random_u32(self.seed, STEP, step, self.dist.rank, part))
        random.seed(key)
        np.random.seed(key)  # noqa: NPY002
        torch.manual_seed(key)
        x = self.erase(x) if self.erase else x
        return self.mix(x, labels) if self.mix else (x, labels)
