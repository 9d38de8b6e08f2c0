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
    # Pillow's order of the passes (resample.rows_first) matters for bicubic only; here are the two axes in that order
    full_h, full_w = tl.where(uncut, high_y.to(tl.float32), box_h), tl.where(uncut, high_x.to(tl.float32), box_w)
    less_h, less_w = full_h - tl.floor(full_h * SIZE / box_h + 0.5), full_w - tl.floor(full_w * SIZE / box_w + 0.5)
    rows_first = cubic & (less_h > 0.0) & (less_h > 2.0 * less_w)
    line = tl.load(pitch + i)
    step_1, step_2 = tl.where(rows_first, line, 3), tl.where(rows_first, 3, line)
    start_1, start_2 = tl.where(rows_first, top, left), tl.where(rows_first, left, top)
    length_1, length_2 = tl.where(rows_first, box_h, box_w), tl.where(rows_first, box_w, box_h)
    low_1, low_2 = tl.where(rows_first, low_y, low_x), tl.where(rows_first, low_x, low_y)
    high_1, high_2 = tl.where(rows_first, high_y, high_x), tl.where(rows_first, high_x, high_y)
    to_1, to_2 = tl.where(rows_first, y0, x0), tl.where(rows_first, x0, y0)
    # mirrored: output x shows what output SIZE - 1 - x would
    flip_1, flip_2 = flip & (rows_first == 0), flip & rows_first
    to_1, to_2 = tl.where(flip_1, SIZE - TILE - to_1, to_1), tl.where(flip_2, SIZE - TILE - to_2, to_2)
    begin_1, end_1, centre_1, scale_1, narrow_1 = axis(start_1, length_1, low_1, high_1, to_1, cubic, SIZE, TILE)
    begin_2, end_2, centre_2, scale_2, narrow_2 = axis(start_2, length_2, low_2, high_2, to_2, cubic, SIZE, TILE)
    centres_1 = centre_1 + tl.where(flip_1, TILE - 1 - lane, lane) * scale_1
    centres_2 = centre_2 + tl.where(flip_2, TILE - 1 - lane, lane) * scale_2
    base = pixels + tl.load(offset + i) + low_y.to(tl.int64) * line + 3 * low_x

    r = tl.zeros([TILE, TILE], tl.float32)
    g, b = r, r
    weights_2 = tl.zeros([CHUNK, TILE], tl.float32)
    for second in range(begin_2, end_2, CHUNK):
        k_2 = second + k
        half_r = tl.zeros([TILE, CHUNK], tl.float32)
        half_g, half_b = half_r, half_r
        weights_1 = tl.zeros([TILE, CHUNK], tl.float32)
        for first in range(begin_1, end_1, CHUNK):
            k_1 = first + k
            w = filter_weight(((k_1 - begin_1)[None, :] + 0.5 - centres_1[:, None]) * narrow_1, cubic)
            w = tl.where((k_1 < end_1)[None, :], w, 0.0)
            weights_1 += w
            source = base + k_2[:, None] * step_2 + k_1[None, :] * step_1
            inside = (k_2 < end_2)[:, None] & (k_1 < end_1)[None, :]
            half_r = product(w, tl.trans(tl.load(source, mask=inside, other=0)), half_r, SPLIT, True)
            half_g = product(w, tl.trans(tl.load(source + 1, mask=inside, other=0)), half_g, SPLIT, True)
            half_b = product(w, tl.trans(tl.load(source + 2, mask=inside, other=0)), half_b, SPLIT, True)
        w = filter_weight(((k_2 - begin_2)[:, None] + 0.5 - centres_2[None, :]) * narrow_2, cubic)
        w = tl.where((k_2 < end_2)[:, None], w, 0.0)
        weights_2 += w
        # clipped in between, as Pillow's 8-bit passes; outputs beyond the border have no weight at all
        gain = (1.0 / tl.maximum(tl.sum(weights_1, 1), 1e-6))[:, None]
        r = product(clip(half_r * gain), w, r, SPLIT)
        g = product(clip(half_g * gain), w, g, SPLIT)
        b = product(clip(half_b * gain), w, b, SPLIT)
    gain = (1.0 / tl.maximum(tl.sum(weights_2, 0), 1e-6))[None, :]
    r, g, b = clip(r * gain), clip(g * gain), clip(b * gain)
    if rows_first:
        r, g, b = tl.trans(r), tl.trans(g), tl.trans(b)

    xs, ys = (x0 + lane)[:, None], (y0 + lane)[None, :]
    ok = (xs < SIZE) & (ys < SIZE)
    plane = ys * SIZE + xs
    if JITTER:
        r, g, b = jitter_part(r, g, b, n, jitter, order, brightness, contrast, saturation, hue, 0.0, False)
        tl.store(sums + view.to(tl.int64) * (ACROSS * ACROSS) + tile, tl.sum(tl.sum(tl.where(ok, luma(r, g, b), 0.0), 1), 0))
        store_mid(mid, n, plane, r, g, b, ok, SIZE)
    else:
        hand_on(out, mid, n, v, plane, r, g, b, ok, grey, sigma, solarize, mean, std, SIZE, CHANNELS_LAST, BLUR)
