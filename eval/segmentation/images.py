"""What a segmenter trains on: random crops of images and their labels, and batches of them.

Every crop is drawn from (seed, epoch, image) alone: batches do not depend on the number of processes, of threads, or on where a run
was continued.  Threads cut the next steps' crops while the network trains on this one's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
import torchvision.transforms.functional as TF
from numba import njit
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from eval.resize import inside_box
from eval.segmentation.datasets import Annotated
from eval.segmentation.distortion import Distortion, distorted
from eval.segmentation.protocols import SegmentationProtocol
from fastssl.augment import pillow
from fastssl.augment.draws import ColourDraws
from fastssl.distributed import Dist
from fastssl.views import Crop, Photometric, View
from loaders.geometry import Geometry

TRIES = 10
"""Of crops after the first."""
AHEAD = 2
"""Steps whose crops are being cut while one is trained on."""
JITTER = Photometric(jitter=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grey=0.2, blur=0.5, sigma=(0.1, 2.0))
"""ImageNetSegModel's colours."""

Window = tuple[slice, slice]


def bilinear(image: np.ndarray, size: tuple[int, int], window: Window | None = None) -> np.ndarray:
    """uint8 [h, w, 3] -> the window of the image resized to `size`: OpenCV's way, which does not average where it shrinks."""
    rows, columns = window or (slice(0, size[0]), slice(0, size[1]))
    out = np.empty((rows.stop - rows.start, columns.stop - columns.start, 3), np.uint8)
    _bilinear(np.ascontiguousarray(image), out, rows.start, columns.start, image.shape[0] / size[0], image.shape[1] / size[1])
    return out


@njit(nogil=True, cache=True)
def _bilinear(image, out, top, left, down, across):
    height, width = image.shape[0], image.shape[1]
    for i in range(out.shape[0]):
        y = min(max((i + top + 0.5) * down - 0.5, 0.0), height - 1.0)
        y0 = int(y)
        y1, fy = min(y0 + 1, height - 1), y - y0
        for j in range(out.shape[1]):
            x = min(max((j + left + 0.5) * across - 0.5, 0.0), width - 1.0)
            x0 = int(x)
            x1, fx = min(x0 + 1, width - 1), x - x0
            for c in range(3):
                above = image[y0, x0, c] * (1 - fx) + image[y0, x1, c] * fx
                below = image[y1, x0, c] * (1 - fx) + image[y1, x1, c] * fx
                out[i, j, c] = int(above * (1 - fy) + below * fy + 0.5)


def nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[h, w] -> [*size]: the pixel at or above and left of each place."""
    rows, columns = (np.minimum(np.arange(new) * old // new, old - 1) for new, old in zip(size, label.shape, strict=True))
    return label[rows[:, None], columns]


def random_window(label: np.ndarray, crop: int, largest_share: float, ignore: int, rng: np.random.Generator) -> Window:
    """A crop of the label, smaller where that is; drawn again while one class has `largest_share` of its labelled pixels or more."""

    def draw() -> Window:
        starts = [int(rng.integers(max(side - crop, 0) + 1)) for side in label.shape]
        return tuple(slice(start, min(start + crop, side)) for start, side in zip(starts, label.shape, strict=True))

    window = draw()
    for _ in range(TRIES if largest_share < 1 else 0):
        inside = label[window]
        counts = np.unique(inside[inside != ignore], return_counts=True)[1]
        if len(counts) > 1 and counts.max() / counts.sum() < largest_share:
            break
        window = draw()
    return window


class Crops:
    """(epoch, number of a training image) -> float32 [3, s, s] normalised, int64 [s, s]."""

    def __init__(self, data: Annotated, protocol: SegmentationProtocol, normalisation: Photometric, *, seed: int):
        self.data, self.protocol, self.seed = data, protocol, seed
        self.mean, self.std = (np.array(t, np.float32) for t in (normalisation.mean, normalisation.std))
        self.view = View(crop=Crop(size=protocol.crop, scale=protocol.scale), photometric=JITTER)
        self.geometry = Geometry((self.view,), seed)
        self.draws = ColourDraws((self.view,), device=torch.device("cpu"), seed=seed)

    def __call__(self, epoch: int, number: int) -> tuple[Tensor, Tensor]:
        image, label = self.data.read(self.data.train[number])
        cut = self._in_box if self.protocol.box is not None else self._resized_crop
        pixels, label = cut(image, label, epoch, number)
        size = self.protocol.crop
        x = np.zeros((size, size, 3), np.float32)
        y = np.full((size, size), self.data.ignore, np.int64)
        height, width = label.shape
        x[:height, :width] = (pixels / np.float32(255) - self.mean) / self.std
        y[:height, :width] = label
        return torch.from_numpy(x).permute(2, 0, 1), torch.from_numpy(y)

    def _in_box(self, image: Image.Image, label: np.ndarray, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """mmsegmentation's: random size, crop, flip, colours."""
        rng = np.random.default_rng((self.seed, epoch, number))
        low, high = self.protocol.scale
        ratio = rng.uniform(low, high)
        size = inside_box(*label.shape, tuple(int(side * ratio) for side in self.protocol.box))
        label = nearest(label, size)
        window = random_window(label, self.protocol.crop, self.protocol.largest_share, self.data.ignore, rng)
        pixels, label = bilinear(np.asarray(image), size, window), label[window]
        if rng.integers(2):
            pixels, label = pixels[:, ::-1], label[:, ::-1]
        if self.protocol.colours == "photometric":
            pixels = distorted(pixels, Distortion.drawn(rng))
        return pixels, label

    def _resized_crop(self, image: Image.Image, label: np.ndarray, epoch: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """ImageNetSegModel's: RandomResizedCrop, flip, colours."""
        ids, sides = np.array([number]), (np.array([side], np.int32) for side in label.shape)
        boxes, flips = self.geometry.draw(ids, epoch, *sides)
        box, flip, size = boxes[0, 0].astype(int).tolist(), bool(flips[0, 0]), [self.protocol.crop] * 2
        image = pillow.cut(image, self.view.crop, box, flip)
        if self.protocol.colours == "jitter":
            image = pillow.colour(image, self.draws(epoch, torch.from_numpy(ids)), 0, 0)
        top, left, height, width = box
        cut = Image.fromarray(label[top : top + height, left : left + width].astype(np.int32))
        cut = np.asarray(TF.resize(cut, size, InterpolationMode.NEAREST))
        return np.asarray(image), cut[:, ::-1] if flip else cut


class Batches:
    """The batches of a run: `from_step(s)` gives this rank's part of batch s and of those after it, up to the last.

    Each epoch has an order of its own; batches reach from one into the next, or the rest of an epoch is left out where the protocol
    counts epochs.
    """

    def __init__(self, crops: Crops, images: int, protocol: SegmentationProtocol, *, dist: Dist, seed: int, threads: int):
        self.crops, self.images, self.protocol, self.dist, self.seed, self.threads = crops, images, protocol, dist, seed, threads
        self.in_epoch = images if protocol.steps is not None else protocol.epoch_steps(images) * protocol.batch
        self.order: Callable[[int], np.ndarray] = lru_cache(2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(images))

    def numbers(self, step: int) -> list[tuple[int, int]]:
        """Epoch and image of each of this rank's crops of a step."""
        first = step * self.protocol.batch
        places = range(first + self.dist.rank, first + self.protocol.batch, self.dist.world)
        return [(epoch, int(self.order(epoch)[place])) for epoch, place in (divmod(p, self.in_epoch) for p in places)]

    def from_step(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """float32 [b, 3, s, s] and int64 [b, s, s] on the rank's device."""
        begun: deque[list[Future]] = deque()
        pool = ThreadPoolExecutor(self.threads)
        try:
            for ahead in range(step, self.protocol.total_steps(self.images)):
                begun.append([pool.submit(self.crops, *each) for each in self.numbers(ahead)])
                if len(begun) > AHEAD:
                    yield self._stacked(begun.popleft())
            while begun:
                yield self._stacked(begun.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _stacked(self, futures: list[Future]) -> tuple[Tensor, Tensor]:
        x, y = (torch.stack(parts) for parts in zip(*(f.result() for f in futures), strict=True))
        if self.dist.device.type == "cuda":
            x, y = x.pin_memory(), y.pin_memory()
        x = x.to(self.dist.device, non_blocking=True, memory_format=torch.channels_last)
        return x, y.to(self.dist.device, non_blocking=True)


def normaliser(normalisation: Photometric, device: torch.device) -> Callable[[np.ndarray], Tensor]:
    """uint8 [h, w, 3] -> float32 [3, h, w] on the device."""
    mean, std = (torch.tensor(t, device=device).view(3, 1, 1) for t in (normalisation.mean, normalisation.std))

    def normalised(levels: np.ndarray) -> Tensor:
        return (torch.tensor(levels, device=device).permute(2, 0, 1).float() / 255 - mean) / std

    return normalised
