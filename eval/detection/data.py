"""Images for the detector: order, sizes, flips and targets (methods/transfer.md section 2)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as rle
from torch import Tensor

from eval.detection.annotations import Photo
from eval.detection.config import ObjectMask, Target
from eval.resize import shortest_side
from fastssl.rng import CROP, ORDER, permutations, uniform_torch
from loaders.errors import DataError
from loaders.images import open_image, to_rgb

MEAN, STD = (123.675, 116.280, 103.530), (58.395, 57.120, 57.375)
"""Of RGB levels 0..255."""
AHEAD = 2
"""Batches prepared while one is used."""

T, R = TypeVar("T"), TypeVar("R")


@dataclass(frozen=True)
class Sample:
    """An image as the network gets it, but for normalisation."""

    pixels: Tensor
    """uint8 [3, h, w], RGB."""
    target: Target
    """On the CPU; without masks where none were asked for."""


def decode(photo: Photo) -> Image.Image:
    """Upright RGB.  DataError for a file that is no image, or not of the annotated size."""
    try:
        image = to_rgb(ImageOps.exif_transpose(open_image(photo.path)))
    except Exception as error:  # Pillow's errors are of any type
        raise DataError(f"{photo.path} cannot be decoded ({type(error).__name__}: {error}). Copy it again.") from error
    if image.size != (photo.width, photo.height):
        raise DataError(
            f"{photo.path} has {image.width} x {image.height} pixels, and its annotation says {photo.width} x {photo.height}: they do not "
            f"belong together. Take both from one download."
        )
    return image


def sample(photo: Photo, *, side: int, longest: int, flip: bool = False, masks: bool = False) -> Sample:
    """The image with its shorter side resized to `side`, unless its longer one would pass `longest`, perhaps flipped."""
    height, width = shortest_side(photo.height, photo.width, side, longest)
    image = decode(photo).resize((width, height), Image.Resampling.BILINEAR)
    image = ImageOps.mirror(image) if flip else image
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    scale = np.array([width / photo.width, height / photo.height])
    boxes = np.array([o.box for o in photo.objects]).reshape(-1, 2, 2) * scale
    if flip:
        boxes[..., 0] = width - boxes[:, ::-1, 0]
    boxes = torch.from_numpy(boxes.clip(0, (width, height)).reshape(-1, 4)).float()
    labels = torch.tensor([o.label for o in photo.objects], dtype=torch.int64)
    move = partial(moved, scale=scale, height=height, width=width, flip=flip)
    return Sample(pixels, Target(boxes, labels, [move(o.mask) for o in photo.objects] if masks else None))


def moved(mask: ObjectMask, *, scale: np.ndarray, height: int, width: int, flip: bool) -> ObjectMask:
    """The object's mask in the resized image: polygons exactly, bitmaps by the nearest pixel."""
    if isinstance(mask, dict):
        bitmap = Image.fromarray(rle.decode(mask)).resize((width, height), Image.Resampling.NEAREST)
        return rle.encode(np.asfortranarray(ImageOps.mirror(bitmap) if flip else bitmap))
    polygons = [(polygon.reshape(-1, 2) * scale).ravel() for polygon in mask]
    if flip:
        for polygon in polygons:
            polygon[0::2] = width - polygon[0::2]
    return polygons


def normalised(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 [3, h, w] -> float32 on the device."""
    mean, std = (torch.tensor(t, device=device).view(3, 1, 1) for t in (MEAN, STD))
    return pixels.to(device, non_blocking=True).float().sub_(mean).div_(std)


def on_device(target: Target, device: torch.device) -> Target:
    return replace(target, boxes=target.boxes.to(device), classes=target.classes.to(device))


def order(wide: Sequence[bool], *, batch: int, rank: int, world: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    """Endless batches of (pass over the data, image) of one rank.

    Every pass is shuffled; the ranks take turns; a batch holds images that are all `wide` or all not, and is handed out when it is
    full.  A pure function of its arguments: the first batches can be left out without loading anything.
    """
    waiting: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    passes = ((epoch, int(i)) for epoch in count() for i in permutations(1, len(wide), seed, ORDER, epoch)[0])
    for epoch, i in islice(passes, rank, None, world):
        group = waiting[wide[i]]
        group.append((epoch, i))
        if len(group) == batch:
            yield list(group)
            group.clear()


def ahead(work: Callable[[T], R], items: Iterable[T], *, threads: int, depth: int) -> Iterator[R]:
    """map(work, items) in their order, by threads that are up to `depth` items ahead."""
    with ThreadPoolExecutor(threads) as pool:
        begun: deque[Future[R]] = deque()
        try:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) > depth:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class TrainingPhotos:
    """What one rank learns from."""

    photos: Sequence[Photo]
    """All ranks'."""
    sides: tuple[int, ...]
    """Shorter sides, one of which is drawn for each image."""
    longest: int
    masks: bool
    batch: int
    """Images of this rank in a step."""
    rank: int
    world: int
    seed: int
    threads: int

    def from_step(self, step: int) -> Iterator[list[Sample]]:
        """The batches of this step and all after it, without end."""
        wide = [p.width > p.height for p in self.photos]
        batches = islice(order(wide, batch=self.batch, rank=self.rank, world=self.world, seed=self.seed), step, None)
        samples = ahead(self._drawn, (i for batch in batches for i in batch), threads=self.threads, depth=AHEAD * self.batch)
        with closing(samples):
            while True:
                yield list(islice(samples, self.batch))

    def _drawn(self, which: tuple[int, int]) -> Sample:
        epoch, i = which
        side, flip = uniform_torch(self.seed, CROP, epoch, torch.tensor([i]), torch.tensor([0]), 2).flatten().tolist()
        options = {"longest": self.longest, "masks": self.masks}
        return sample(self.photos[i], side=self.sides[int(side * len(self.sides))], flip=flip < 0.5, **options)
