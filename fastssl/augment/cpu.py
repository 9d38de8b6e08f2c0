"""The CPU form of the augmentation: one numba kernel that takes an image from source bytes to normalised pixels.

The formulas are those of resample.py, colour.py and blur.py, which are the reference; here a thread runs the whole chain
on one crop while it is in its cache, and skips what was not drawn.  A result depends on its own sample only, not on the
number of threads.  Constants are float32 so that no arithmetic is widened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from numba import njit, prange

from fastssl.augment.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION

if TYPE_CHECKING:
    from fastssl.augment.augmenter import GroupPlan
    from fastssl.augment.draws import ColourParams
    from fastssl.batch import ImageBatch

F = np.float32
ZERO, HALF, ONE, TWO, FOUR, SIX, TOP = F(0), F(0.5), F(1), F(2), F(4), F(6), F(255)
RED, GREEN, BLUE = F(0.299), F(0.587), F(0.114)
SOLARIZE_FROM = F(128)

# The cache on disk follows this file only: change something here too when a constant imported above changes.
kernel = njit(nogil=True, cache=True, fastmath=True, error_model="numpy")


@kernel
def _axis(start, length, high, size, bicubic, mirror):
    """Weights of one axis: first tap and number of taps [size], weights [size, taps]. Positions count from the window's start."""
    scale = length / size
    stretch = max(scale, 1.0)
    support = stretch * (2.0 if bicubic else 1.0)
    first = np.empty(size, np.int64)
    count = np.empty(size, np.int64)
    weights = np.zeros((size, int(np.ceil(support)) * 2 + 1), np.float32)
    for i in range(size):
        centre = start + (i + 0.5) * scale
        lo = max(int(np.floor(centre - support + 0.5)), 0)
        hi = min(int(np.floor(centre + support + 0.5)), high)
        at = size - 1 - i if mirror else i
        first[at], count[at] = lo, hi - lo
        total = 0.0
        for k in range(lo, hi):
            x = abs(k - centre + 0.5) / stretch
            if not bicubic:
                w = max(1.0 - x, 0.0)
            elif x < 1.0:
                w = (1.5 * x - 2.5) * x * x + 1.0
            elif x < 2.0:
                w = -0.5 * (((x - 5.0) * x + 8.0) * x - 4.0)
            else:
                w = 0.0
            weights[at, k - lo] = w
            total += w
        for k in range(hi - lo):
            weights[at, k] /= total
    return first, count, weights


@kernel
def _rows_first(box_h, box_w, height, width, size, bicubic, whole):
    """resample.rows_first; bilinear gives the same either way and takes what touches fewer lines."""
    if not bicubic:
        return box_h > size
    full_h, full_w = (height, width) if whole else (int(box_h), int(box_w))
    new_h, new_w = np.rint(full_h * size / box_h), np.rint(full_w * size / box_w)
    return full_h > new_h and full_h - new_h > 2 * (full_w - new_w)


@kernel
def _clip(row):
    for i in range(row.size):
        row[i] = min(max(row[i], ZERO), TOP)


@kernel
def _across(out, line, first, count, weight, begin):
    """One line of interleaved pixels from source column `begin` on -> out[c, x] of one output line."""
    for x in range(out.shape[1]):
        red, green, blue = ZERO, ZERO, ZERO
        at = 3 * (first[x] - begin)
        for t in range(count[x]):
            w = weight[x, t]
            red += w * F(line[at])
            green += w * F(line[at + 1])
            blue += w * F(line[at + 2])
            at += 3
        out[0, x] = min(max(red, ZERO), TOP)
        out[1, x] = min(max(green, ZERO), TOP)
        out[2, x] = min(max(blue, ZERO), TOP)


@kernel
def _resample(out, pixels, offset, pitch, height, width, box, flip, bicubic, whole):
    """Crop, resize and flip one image into out [3, s, s], 0..255."""
    size = out.shape[1]
    top, left, box_h, box_w = box[0], box[1], box[2], box[3]
    low_y, low_x = (0, 0) if whole else (int(top), int(left))
    high_y, high_x = (height, width) if whole else (int(top + box_h), int(left + box_w))
    first_x, count_x, weight_x = _axis(left - low_x, box_w, high_x - low_x, size, bicubic, flip)
    first_y, count_y, weight_y = _axis(top - low_y, box_h, high_y - low_y, size, bicubic, False)
    begin_x, end_x = first_x.min(), (first_x + count_x).max()
    corner = offset + low_y * pitch + 3 * (low_x + begin_x)
    if _rows_first(box_h, box_w, height, width, size, bicubic, whole):
        line = np.empty(3 * (end_x - begin_x), np.float32)
        for y in range(size):
            line[:] = ZERO
            for t in range(count_y[y]):
                w = weight_y[y, t]
                at = corner + (first_y[y] + t) * pitch
                for i in range(line.size):
                    line[i] += w * F(pixels[at + i])
            _clip(line)
            _across(out[:, y], line, first_x, count_x, weight_x, begin_x)
        return
    begin = first_y[0]
    rows = first_y[size - 1] + count_y[size - 1] - begin
    lines = np.empty((rows, 3, size), np.float32)
    for r in range(rows):
        at = corner + (begin + r) * pitch
        _across(lines[r], pixels[at : at + 3 * (end_x - begin_x)], first_x, count_x, weight_x, begin_x)
    for c in range(3):
        for y in range(size):
            row = out[c, y]
            row[:] = ZERO
            for t in range(count_y[y]):
                w = weight_y[y, t]
                src = lines[first_y[y] - begin + t, c]
                for x in range(size):
                    row[x] += w * src[x]
            _clip(row)


@kernel
def _scale(r, g, b, factor):
    """Brightness: blend with black."""
    for plane in (r, g, b):
        for i in range(plane.size):
            plane[i] = min(factor * plane[i], TOP)


@kernel
def _contrast(r, g, b, factor):
    red, green, blue = ZERO, ZERO, ZERO
    for i in range(r.size):
        red += r[i]
        green += g[i]
        blue += b[i]
    rest = (ONE - factor) * (RED * red + GREEN * green + BLUE * blue) / F(r.size)
    for plane in (r, g, b):
        for i in range(plane.size):
            plane[i] = min(max(factor * plane[i] + rest, ZERO), TOP)


@kernel
def _saturation(r, g, b, factor):
    """Blend with grey; factor 0 is the grey image itself."""
    for i in range(r.size):
        rest = (ONE - factor) * (RED * r[i] + GREEN * g[i] + BLUE * b[i])
        r[i] = min(max(factor * r[i] + rest, ZERO), TOP)
        g[i] = min(max(factor * g[i] + rest, ZERO), TOP)
        b[i] = min(max(factor * b[i] + rest, ZERO), TOP)


@kernel
def _channel(sixths, top, chroma):
    k = sixths - SIX * np.floor(sixths / SIX)
    return top - chroma * min(max(min(k, FOUR - k), ZERO), ONE)


@kernel
def _hue(r, g, b, shift):
    shift = np.trunc(TOP * shift) / TOP
    for i in range(r.size):
        red, green, blue = r[i], g[i], b[i]
        top = max(max(red, green), blue)
        chroma = top - min(min(red, green), blue)
        scale = ONE / (chroma if chroma > ZERO else ONE)
        at_red = (green - blue) * scale
        at_green = TWO + (blue - red) * scale
        at_blue = FOUR + (red - green) * scale
        sixths = at_red if top == red else (at_green if top == green else at_blue)
        sixths += SIX * shift
        r[i] = _channel(sixths + F(5), top, chroma)
        g[i] = _channel(sixths + F(3), top, chroma)
        b[i] = _channel(sixths + F(1), top, chroma)


@kernel
def _box_down(dst, src, whole, edge, norm):
    """One extended box along the first axis of [s, s], edges replicated."""
    last = src.shape[0] - 1
    for y in range(src.shape[0]):
        row = dst[y]
        near, far = src[max(y - whole - 1, 0)], src[min(y + whole + 1, last)]
        for x in range(row.size):
            row[x] = edge * (near[x] + far[x])
        for k in range(y - whole, y + whole + 1):
            line = src[min(max(k, 0), last)]
            for x in range(row.size):
                row[x] += norm * line[x]


@kernel
def _blur(planes, sigma, spare):
    """Three boxes down, transpose, three boxes down, transpose back: every pass runs along contiguous rows."""
    variance = sigma * sigma / 3.0
    whole = int((np.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3.0 * variance) / (6.0 * (variance - (whole + 1) ** 2))
    norm = 1.0 / (2 * whole + 1 + 2 * edge)
    edge, norm = F(edge * norm), F(norm)
    size = spare.shape[0]
    for c in range(3):
        plane = planes[c]
        for _ in range(2):
            _box_down(spare, plane, whole, edge, norm)
            _box_down(plane, spare, whole, edge, norm)
            _box_down(spare, plane, whole, edge, norm)
            for y in range(size):
                for x in range(size):
                    plane[x, y] = spare[y, x]


@kernel
def _colour(planes, spare, jitter, order, factors, hue, grey, sigma, solarize):
    r, g, b = planes[0].ravel(), planes[1].ravel(), planes[2].ravel()
    if jitter:
        for op in order:
            if op == BRIGHTNESS:
                _scale(r, g, b, factors[0])
            elif op == CONTRAST:
                _contrast(r, g, b, factors[1])
            elif op == SATURATION:
                _saturation(r, g, b, factors[2])
            elif op == HUE:
                _hue(r, g, b, hue)
    if grey:
        _saturation(r, g, b, ZERO)
    if sigma > ZERO:
        _blur(planes, sigma, spare)
    if solarize:
        for plane in (r, g, b):
            for i in range(plane.size):
                plane[i] = plane[i] if plane[i] < SOLARIZE_FROM else TOP - plane[i]


@njit(nogil=True, cache=True, parallel=True)
def _render(
    out, pixels, offset, pitch, height, width, boxes, flips, bicubic, whole, mean, std, jitter, order, factors, hue, grey, sigma, solarize
):
    """out float32 [V, B, s, s, 3]; pixels uint8; offset .. width [B]; boxes [B, V, 4], flips [B, V]; bicubic, whole [V];
    mean, std [V, 3]; jitter .. solarize [V, B], order [V, B, 4], factors [V, B, 3]."""
    views, batch, size = out.shape[0], out.shape[1], out.shape[2]
    for n in prange(views * batch):
        v, i = n // batch, n % batch
        planes = np.empty((3, size, size), np.float32)
        spare = np.empty((size, size), np.float32)
        _resample(planes, pixels, offset[i], pitch[i], height[i], width[i], boxes[i, v], flips[i, v], bicubic[v], whole[v])
        _colour(planes, spare, jitter[v, i], order[v, i], factors[v, i], hue[v, i], grey[v, i], sigma[v, i], solarize[v, i])
        for c in range(3):
            gain, shift = ONE / (TOP * std[v, c]), mean[v, c] / std[v, c]
            for y in range(size):
                for x in range(size):
                    out[v, i, y, x, c] = planes[c, y, x] * gain - shift


def render(batch: ImageBatch, plan: GroupPlan, params: ColourParams) -> torch.Tensor:
    """One group of views -> float32 [V * B, 3, s, s], normalised; memory is channels-last."""
    views, b, size = len(plan.views), len(batch), plan.size
    out = torch.empty(views, b, size, size, 3)
    columns = slice(plan.views[0], plan.views[-1] + 1)
    factors = torch.stack((params.brightness, params.contrast, params.saturation), -1)
    arrays = (
        *(out, batch.pixels, batch.offset, batch.pitch, batch.height, batch.width),
        *(batch.boxes[:, columns], batch.flips[:, columns], plan.bicubic, plan.whole, plan.mean, plan.std),
        *(params.jitter, params.order, factors, params.hue, params.grey, params.sigma, params.solarize),
    )
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    # another memory layout would be another type, and seconds of compilation
    _render(*(t.contiguous().numpy() for t in arrays))
    return out.flatten(0, 1).permute(0, 3, 1, 2)
