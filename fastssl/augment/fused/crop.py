"""Resized crops: W_y x W_x^T for the small window of source pixels under a tile of the output (formulas: fastssl/augment/resample.py).

Weights are made in registers, the products run on tensor cores, every source byte is read about once per tile.  Programs of one
image are neighbours, so that its views find its bytes in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastssl.augment.fused.colour import VARYING, clip, hand_on, jitter_part, luma, store_mid
from fastssl.augment.fused.products import product


@triton.jit
def axis(start, length, low, high, first, bicubic, SIZE: tl.constexpr, TILE: tl.constexpr):
    """The source pixels under outputs first .. first + TILE - 1 of one axis, counted from `low`: begin, end; then in float32 the
    centre of output `first` counted from begin, the distance of two centres, and 1 / stretch."""
    scale = length.to(tl.float64) / SIZE
    stretch = tl.maximum(scale, 1.0)
    support = tl.where(bicubic, 2.0 * stretch, stretch)
    centre = start.to(tl.float64) - low + (first + 0.5) * scale
    lowest = centre + tl.maximum(-first, 0) * scale
    highest = centre + (tl.minimum(TILE, SIZE - first) - 1) * scale
    begin = tl.maximum(tl.floor(lowest - support).to(tl.int32), 0)
    end = tl.minimum(tl.ceil(highest + support).to(tl.int32), high - low)
    return begin, end, (centre - begin).to(tl.float32), scale.to(tl.float32), (1.0 / stretch).to(tl.float32)


@triton.jit
def filter_weight(distance, bicubic):
    """resample.filter_weight; what lies beyond the support is 0, which is where Pillow stops."""
    x = tl.abs(distance)
    if bicubic:
        near = (1.5 * x - 2.5) * x * x + 1.0
        far = -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0)
        w = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    else:
        w = tl.maximum(1.0 - x, 0.0)
    return w


@triton.jit(do_not_specialize=[*VARYING, "pixels", "offset", "pitch", "height", "width", "boxes", "flips", "first_view"])
def crop_kernel(
    out, mid, sums, pixels, offset, pitch, height, width, boxes, flips, bicubic, whole,
    jitter, order, brightness, contrast, saturation, hue, grey, sigma, solarize, mean, std,
    batch, all_views, first_view,
    VIEWS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, JITTER: tl.constexpr, BLUR: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Source bytes -> one tile [TILE x, TILE y] of a view; then the jitter up to the contrast, and this tile's sum of grey."""
    ACROSS: tl.constexpr = (SIZE + TILE - 1) // TILE
    tile = tl.program_id(0) % (ACROSS * ACROSS)
    view = tl.program_id(0) // (ACROSS * ACROSS)
    v, i = view % VIEWS, view // VIEWS
    n = v * batch + i
    x0, y0 = (tile % ACROSS) * TILE, (tile // ACROSS) * TILE
    lane, k = tl.arange(0, TILE), tl.arange(0, CHUNK)

    at = i * all_views + first_view + v
    top, left = tl.load(boxes + 4 * at), tl.load(boxes + 4 * at + 1)
    box_h, box_w = tl.load(boxes + 4 * at + 2), tl.load(boxes + 4 * at + 3)
    flip, cubic, uncut = tl.load(flips + at) != 0, tl.load(bicubic + v) != 0, tl.load(whole + v) != 0
    low_y, low_x = tl.where(uncut, 0, top.to(tl.int32)), tl.where(uncut, 0, left.to(tl.int32))
    high_y = tl.where(uncut, tl.load(height + i), (top + box_h).to(tl.int32))
    high_x = tl.where(uncut, tl.load(width + i), (left + box_w).to(tl.int32))
    # mirrored: output x shows what output SIZE - 1 - x would
    first_x = tl.where(flip, SIZE - TILE - x0, x0)
    begin_x, end_x, centre_x, scale_x, narrow_x = axis(left, box_w, low_x, high_x, first_x, cubic, SIZE, TILE)
    begin_y, end_y, centre_y, scale_y, narrow_y = axis(top, box_h, low_y, high_y, y0, cubic, SIZE, TILE)
    centres_x = centre_x + tl.where(flip, TILE - 1 - lane, lane) * scale_x
    centres_y = centre_y + lane * scale_y
    line = tl.load(pitch + i)
    base = pixels + tl.load(offset + i) + low_y.to(tl.int64) * line + 3 * low_x

    r = tl.zeros([TILE, TILE], tl.float32)
    g, b = r, r
    total_y = tl.zeros([TILE], tl.float32)
    for y in range(begin_y, end_y, CHUNK):
        rows = y + k
        across_r = tl.zeros([TILE, CHUNK], tl.float32)
        across_g, across_b = across_r, across_r
        total_x = tl.zeros([TILE], tl.float32)
        for x in range(begin_x, end_x, CHUNK):
            cols = x + k
            w = filter_weight(((cols - begin_x)[None, :] + 0.5 - centres_x[:, None]) * narrow_x, cubic)
            w = tl.where((cols < end_x)[None, :], w, 0.0)
            total_x += tl.sum(w, 1)
            source = base + rows[:, None] * line + 3 * cols[None, :]
            inside = (rows < end_y)[:, None] & (cols < end_x)[None, :]
            across_r = product(w, tl.trans(tl.load(source, mask=inside, other=0).to(tl.float32)), across_r, SPLIT, True)
            across_g = product(w, tl.trans(tl.load(source + 1, mask=inside, other=0).to(tl.float32)), across_g, SPLIT, True)
            across_b = product(w, tl.trans(tl.load(source + 2, mask=inside, other=0).to(tl.float32)), across_b, SPLIT, True)
        w = filter_weight(((rows - begin_y)[:, None] + 0.5 - centres_y[None, :]) * narrow_y, cubic)
        w = tl.where((rows < end_y)[:, None], w, 0.0)
        total_y += tl.sum(w, 0)
        # horizontal first and clipped in between, as Pillow's 8-bit passes; outputs beyond the border have no weight at all
        gain = (1.0 / tl.maximum(total_x, 1e-6))[:, None]
        r = product(clip(across_r * gain), w, r, SPLIT)
        g = product(clip(across_g * gain), w, g, SPLIT)
        b = product(clip(across_b * gain), w, b, SPLIT)
    gain = (1.0 / tl.maximum(total_y, 1e-6))[None, :]
    r, g, b = clip(r * gain), clip(g * gain), clip(b * gain)

    xs, ys = (x0 + lane)[:, None], (y0 + lane)[None, :]
    ok = (xs < SIZE) & (ys < SIZE)
    plane = ys * SIZE + xs
    if JITTER:
        r, g, b = jitter_part(r, g, b, n, jitter, order, brightness, contrast, saturation, hue, 0.0, False)
        tl.store(sums + view.to(tl.int64) * (ACROSS * ACROSS) + tile, tl.sum(tl.sum(tl.where(ok, luma(r, g, b), 0.0), 1), 0))
        store_mid(mid, n, plane, r, g, b, ok, SIZE)
    else:
        hand_on(out, mid, n, v, plane, r, g, b, ok, grey, sigma, solarize, mean, std, SIZE, CHANNELS_LAST, BLUR)
