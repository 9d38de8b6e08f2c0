"""Which patches of a view are hidden: masks drawn from the sample's own random stream (methods/ibot.md section 6).

Keyed by (seed, epoch, the image's key, view) as boxes are, and drawn beside them: the two masks of an image in 2 microseconds
(iBOT's recipe, 14 x 14 patches, on one CPU core), where decoding it takes some hundred.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from fastssl.rng import MASK, fill_uniform, uniform
from fastssl.views import ViewSpec
from loaders.errors import DataError

kernel = njit(nogil=True)  # not cached: numba would not notice a change in rng.py

_SLOTS = 64
"""Numbers drawn at once: three masks of four need no more."""
_ATTEMPTS = 10
_LOG_ASPECT = math.log(0.3), math.log(1 / 0.3)
"""Logarithm of height / width of a rectangle, lowest and highest."""


# What follows takes its numbers from a stream: u, the uniform numbers of its first slots, and key: int64 seed, epoch, the
# image's key, view, and the next slot.  How many a mask needs is not known before.


@kernel
def _next(low, high, u, key):
    """The next number of U(low, high)."""
    slot = key[4]
    key[4] += 1
    x = u[slot] if slot < len(u) else uniform(key[0], MASK, key[1], key[2], key[3], slot)
    return low + (high - low) * x


@kernel
def draw_ratio(ratios, spreads, u, key):
    """One of `ratios`, each varied within its spread."""
    values = ratios.copy()
    for i in range(len(ratios)):
        if spreads[i] > 0:
            values[i] = _next(ratios[i] - spreads[i], ratios[i] + spreads[i], u, key)
    return values[int(_next(0.0, len(values), u, key))] if len(values) > 1 else values[0]


@kernel
def fill_blocks(mask, most, log_aspect, u, key):
    """Hide rectangles of `mask` [h, w], bool and all False, as BEiT does: until `most` patches (not rounded) are hidden, or ten
    rectangles in a row would leave the mask, hide nothing new or too much."""
    rows, columns = mask.shape
    low, count, attempts = (min(rows, columns) // 3) ** 2, 0, 0
    while count < most and attempts < _ATTEMPTS:
        attempts += 1
        left = most - count
        area = _next(low, left, u, key)  # also when left < low
        aspect = math.exp(_next(log_aspect[0], log_aspect[1], u, key))
        h, w = int(np.rint(math.sqrt(area * aspect))), int(np.rint(math.sqrt(area / aspect)))
        if h >= rows or w >= columns:
            continue
        top, edge = int(_next(0.0, rows - h + 1, u, key)), int(_next(0.0, columns - w + 1, u, key))
        block = mask[top : top + h, edge : edge + w]
        new = h * w - block.sum()
        if 0 < new <= left:
            block[:] = True
            count += new
            attempts = 0


@kernel
def fill_random(mask, count, u, key):
    """Hide `count` patches of `mask` [h, w], bool and all False, any of them as likely as any other."""
    flat = mask.reshape(-1)
    order = np.arange(len(flat))
    for i in range(count):
        j = i + int(_next(0.0, len(flat) - i, u, key))
        order[i], order[j] = order[j], order[i]
        flat[order[i]] = True


@kernel
def _draw(masks, keys, views, blocks, ratios, spreads, counts, seed, epoch):
    u, key = np.empty(_SLOTS), np.zeros(5, np.int64)
    for b in range(len(keys)):
        for m in range(len(views)):
            key[:] = seed, epoch, keys[b], views[m], 0
            fill_uniform(u, seed, MASK, epoch, keys[b], views[m])
            n = counts[m]
            most = draw_ratio(ratios[m, :n], spreads[m, :n], u, key) * masks[b, m].size
            if blocks[m]:
                fill_blocks(masks[b, m], most, _LOG_ASPECT, u, key)
            else:
                fill_random(masks[b, m], int(most), u, key)


class Masks:
    """The masks of a ViewSpec; `views` are the ids of those that have one.  DataError unless their grids are equal."""

    def __init__(self, spec: ViewSpec, seed: int = 0) -> None:
        self.seed = np.uint64(seed % 2**64).view(np.int64)
        self.views = np.array([v for v, view in enumerate(spec) if view.mask is not None], np.int64)
        masked = [(spec[v].mask, spec[v].crop.size) for v in self.views]
        grids = {(size // mask.patch_size, size % mask.patch_size) for mask, size in masked}
        if len(grids) > 1 or any(rest or not side for side, rest in grids):
            about = ", ".join(f"view {v}: {size} pixels by {mask.patch_size}" for v, (mask, size) in zip(self.views, masked, strict=True))
            raise DataError(
                f"Masks must divide their views into equally many patches ({about}). Set the mask's patch_size to a divisor of the crop's "
                "size, and both alike in all views with a mask."
            )
        self.side = grids.pop()[0] if grids else 0
        """Patches a side."""
        longest = max((len(mask.pred_ratio) for mask, _ in masked), default=0)
        self._blocks = np.array([mask.shape == "block" for mask, _ in masked], np.bool_)
        self._counts = np.array([len(mask.pred_ratio) for mask, _ in masked], np.int64)
        self._ratios, self._spreads = np.zeros((2, len(masked), longest))
        for m, (mask, _) in enumerate(masked):
            n = len(mask.pred_ratio)
            self._ratios[m, :n], self._spreads[m, :n] = mask.pred_ratio, mask.pred_ratio_var

    def draw(self, keys: np.ndarray, epoch: int) -> np.ndarray:
        """int64 [B] keys -> bool [B, M, side, side], True where a patch is hidden."""
        masks = np.zeros((len(keys), len(self.views), self.side, self.side), np.bool_)
        _draw(masks, keys, self.views, self._blocks, self._ratios, self._spreads, self._counts, self.seed, epoch)
        return masks
