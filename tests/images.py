"""Images, batches and recipes for the tests of the augmentation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fastssl.batch import ImageBatch
from fastssl.views import CenterCrop, PatchCrop, Photometric, ViewSpec
from loaders.geometry import Geometry

WILD_COLOURS = Photometric(
    jitter=0.9, brightness=1.2, contrast=1.0, saturation=1.0, hue=0.5, grey=0.2, blur=0.7, sigma=(0.1, 9.0), solarize=0.3
)


def images(count: int, seed: int = 0, low: int = 30, high: int = 160) -> list[np.ndarray]:
    """Noise, smooth and grey images of odd sizes."""
    rng, out = np.random.default_rng(seed), []
    for i in range(count):
        h, w = (int(n) for n in rng.integers(low, high, 2))
        coarse = rng.integers(0, 256, (h // 9 + 2, w // 9 + 2, 3)).repeat(9, 0).repeat(9, 1)[:h, :w]
        image = (coarse + rng.integers(0, 256, (h, w, 3))) // 2 if i % 3 else rng.integers(0, 256, (h, w, 3))
        out.append(np.ascontiguousarray(np.repeat(image[..., :1], 3, 2) if i % 4 == 3 else image, dtype=np.uint8))
    return out


def batch_of(spec: ViewSpec, sources: list[np.ndarray], *, pad: int = 5, epoch: int = 1, device="cpu") -> ImageBatch:
    """With boxes and flips as the loader draws them."""
    hw = (np.array([im.shape[axis] for im in sources], np.int32) for axis in (0, 1))
    boxes, flips = Geometry(spec, 3).draw(np.arange(len(sources)), epoch, *hw)
    return ImageBatch.of(sources, boxes, flips, pad=pad, epoch=epoch, device=device)


def small(spec: ViewSpec) -> ViewSpec:
    """The same recipe with an eighth of the pixels a side."""

    def shrink(crop):
        changed = {"size": max(crop.size // 8, 8)}
        if isinstance(crop, CenterCrop):
            changed["resize"] = crop.resize // 8
        if isinstance(crop, PatchCrop):
            changed |= {"patch_size": crop.patch_size // 8, "patch_jitter": crop.patch_jitter // 8}
        return replace(crop, **changed)

    return tuple(replace(view, crop=shrink(view.crop)) for view in spec)
