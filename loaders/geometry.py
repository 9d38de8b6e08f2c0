"""Where every view is cut: boxes and flips drawn from the sample's own random stream, before anything is decoded; and its masks.

`Crop` follows torchvision's RandomResizedCrop.get_params inside the view's region; `CenterCrop` is the box that torchvision's
Resize + CenterCrop would show; either may be flipped.  Draws are keyed by (seed, epoch, the image's key, view), so they are the
same for any back end, worker count, rank count or resume point.  The key is the sample id, but see `Order.keys`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from fastssl.rng import CROP, fill_uniform
from fastssl.views import CenterCrop, ViewSpec
from loaders.errors import DataError
from loaders.masks import Masks

_TRIES = 10
# Slots of a (sample, view) in the CROP stream: flip, top, left, then area and ratio of each try.
FLIP, TOP, LEFT, FIRST_TRY = 0, 1, 2, 3
SLOTS = FIRST_TRY + 2 * _TRIES


@njit(nogil=True)
def _edge(fraction, middle, side):
    return max(0, min(side, int(np.rint(middle * (side // 2) + fraction * side))))


@njit(nogil=True)
def region_box(edges, middle, height, width):
    """Top, left, height, width in pixels, at least one, of a region of an image.

    edges: top, left, bottom, right as fractions of its sides, from the top left corner (middle = 0.0) or from the pixel
    height // 2, width // 2 (middle = 1.0).  Rounded to even as Pillow's crop does.
    """
    top, left = min(_edge(edges[0], middle, height), height - 1), min(_edge(edges[1], middle, width), width - 1)
    return top, left, max(1, _edge(edges[2], middle, height) - top), max(1, _edge(edges[3], middle, width) - left)


@njit(nogil=True)
def random_box(u, height, width, limits):
    """Top, left, height, width of a box in height x width pixels, by the uniform numbers u [SLOTS] in [0, 1).

    limits: lowest and highest area as a fraction, lowest and highest width / height.
    """
    scale_lo, scale_hi, ratio_lo, ratio_hi = limits[0], limits[1], limits[2], limits[3]
    log_lo, log_hi = math.log(ratio_lo), math.log(ratio_hi)
    for t in range(_TRIES):
        area = height * width * (scale_lo + (scale_hi - scale_lo) * u[FIRST_TRY + 2 * t])
        ratio = math.exp(log_lo + (log_hi - log_lo) * u[FIRST_TRY + 2 * t + 1])
        w, h = int(np.rint(math.sqrt(area * ratio))), int(np.rint(math.sqrt(area / ratio)))
        if 0 < w <= width and 0 < h <= height:
            return int(u[TOP] * (height - h + 1)), int(u[LEFT] * (width - w + 1)), h, w
    h, w = height, width
    if width / height < ratio_lo:
        h = int(np.rint(width / ratio_lo))
    elif width / height > ratio_hi:
        w = int(np.rint(height * ratio_hi))
    return (height - h) // 2, (width - w) // 2, h, w


@njit(nogil=True)
def _draw(boxes, flips, keys, heights, widths, random, centre, seed, epoch):
    u = np.empty(SLOTS)
    for b in range(keys.shape[0]):
        full_h, full_w = heights[b], widths[b]
        for v in range(random.shape[0]):
            fill_uniform(u, seed, CROP, epoch, keys[b], v)
            flips[b, v] = u[FLIP] < random[v, 8]
            size, resize = centre[v, 0], centre[v, 1]
            if size > 0:
                short, long = min(full_h, full_w), max(full_h, full_w)
                new_long = int(resize * long / short)
                new_h, new_w = (new_long, resize) if full_h > full_w else (resize, new_long)
                down, across = full_h / new_h, full_w / new_w
                boxes[b, v, 0] = np.rint((new_h - size) / 2.0) * down
                boxes[b, v, 1] = np.rint((new_w - size) / 2.0) * across
                boxes[b, v, 2] = size * down
                boxes[b, v, 3] = size * across
                continue
            top0, left0, height, width = region_box(random[v, 0:4], random[v, 9], full_h, full_w)
            top, left, h, w = random_box(u, height, width, random[v, 4:8])
            boxes[b, v, 0] = top0 + top
            boxes[b, v, 1] = left0 + left
            boxes[b, v, 2] = h
            boxes[b, v, 3] = w


class Geometry:
    """The boxes, flips and masks of a ViewSpec."""

    def __init__(self, spec: ViewSpec, seed: int = 0) -> None:
        self.seed = seed
        self._masks = Masks(spec, seed)
        # Columns: region (top, left, bottom, right), scale, ratio, flip, whether the region counts from the middle.
        self._random = np.zeros((len(spec), 10))
        self._centre = np.zeros((len(spec), 2), np.int64)
        for v, view in enumerate(spec):
            crop = view.crop
            if isinstance(crop, CenterCrop):
                if crop.resize < crop.size:
                    raise DataError(
                        f"View {v} cuts {crop.size} pixels from an image whose shorter side was resized to {crop.resize}: the crop "
                        f"would leave the image. Set the view's resize to at least {crop.size} (ImageNet: 256 for a crop of 224)."
                    )
                self._centre[v] = crop.size, crop.resize
                self._random[v, 8] = crop.flip
            else:
                self._random[v] = *crop.region, *crop.scale, *crop.ratio, crop.flip, crop.region_from == "middle"

    def draw(self, keys: np.ndarray, epoch: int, heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [B] keys, int32 [B] sizes -> boxes float32 [B, V, 4] (top, left, height, width in source pixels; whole
        numbers for a `Crop`) and flips bool [B, V]."""
        boxes = np.empty((len(keys), len(self._random), 4), np.float32)
        flips = np.empty((len(keys), len(self._random)), np.bool_)
        _draw(boxes, flips, keys, heights, widths, self._random, self._centre, np.uint64(self.seed % 2**64), epoch)
        return boxes, flips

    def draw_masks(self, keys: np.ndarray, epoch: int) -> np.ndarray | None:
        """bool [B, M, h, w] of the M views that have a mask, True where a patch is hidden; None when no view has one."""
        return self._masks.draw(keys, epoch) if len(self._masks.views) else None
