"""Pillow's blur as M x M^T, M banded: a table of the band for each view that is blurred, then tiles (fastssl/augment/blur.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from fastssl.augment.fused.colour import VARYING, finish, load_mid
from fastssl.augment.fused.products import product


@triton.jit
def box_up_to(d, whole, edge):
    """Cumulative weight of the extended box up to distance d."""
    full = tl.minimum(tl.maximum(d + whole + 1.0, 0.0), 2.0 * whole + 1.0)
    ends = tl.where(d >= -whole - 1.0, edge, 0.0) + tl.where(d >= whole + 1.0, edge, 0.0)
    return (full + ends) / (2.0 * whole + 1.0 + 2.0 * edge)


@triton.jit
def box_weight(source, target, whole, edge, SIZE: tl.constexpr):
    """Weight of line `source` in line `target` of one box: what lies beyond the first and last line falls onto them."""
    d = (source - target).to(tl.float32)
    upper = tl.where(source == SIZE - 1, 1.0, box_up_to(d, whole, edge))
    lower = tl.where(source == 0, 0.0, box_up_to(d - 1.0, whole, edge))
    return tl.where((source >= 0) & (source < SIZE), upper - lower, 0.0)


@triton.jit(do_not_specialize=VARYING)
def weights_kernel(table, sigma, SIZE: tl.constexpr, TAPS: tl.constexpr, LINES: tl.constexpr):
    """table[n, y, t]: weight of line y - TAPS // 2 + t in line y of blur_matrix(sigma[n])."""
    PARTS: tl.constexpr = (SIZE + LINES - 1) // LINES
    n, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    s = tl.load(sigma + n)
    if s <= 0.0:
        return
    variance = s.to(tl.float64) * s / 3.0
    radius = tl.floor((tl.sqrt(12.0 * variance + 1.0) - 1.0) / 2.0)
    edge = (2.0 * radius + 1.0) * (radius * (radius + 1.0) - 3.0 * variance) / (6.0 * (variance - (radius + 1.0) * (radius + 1.0)))
    whole, edge = radius.to(tl.float32), edge.to(tl.float32)
    y, t = part * LINES + tl.arange(0, LINES), tl.arange(0, TAPS)
    line = y[:, None] - TAPS // 2 + t[None, :]
    row = box_weight(line, y[:, None], whole, edge, SIZE)
    for _ in tl.static_range(2):
        # row [LINES, TAPS] times the box's matrix: index 1 what row weighs, index 2 what it is made of
        step = box_weight(line[:, None, :], line[:, :, None], whole, edge, SIZE)
        row = tl.sum(row[:, :, None] * step, 1)
    at = (n.to(tl.int64) * SIZE + y[:, None]) * TAPS + t[None, :]
    tl.store(table + at, row, mask=(y < SIZE)[:, None])


@triton.jit
def band(table, n, to, source, SIZE: tl.constexpr, TAPS: tl.constexpr):
    """Entries (to, source) of the blur's matrix; shapes broadcast."""
    t = source - to + TAPS // 2
    ok = (t >= 0) & (t < TAPS) & (to < SIZE) & (source >= 0) & (source < SIZE)
    return tl.load(table + (n.to(tl.int64) * SIZE + to) * TAPS + t, mask=ok, other=0.0)


@triton.jit(do_not_specialize=VARYING)
def blur_kernel(
    out, mid, table, sigma, solarize, mean, std, batch,
    VIEWS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, TAPS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile [TILE x, TILE y] of a view that is blurred, to its end."""
    ACROSS: tl.constexpr = (SIZE + TILE - 1) // TILE
    tile = tl.program_id(0) % (ACROSS * ACROSS)
    view = tl.program_id(0) // (ACROSS * ACROSS)
    v, i = view % VIEWS, view // VIEWS
    n = v * batch + i
    if tl.load(sigma + n) <= 0.0:
        return
    x0, y0 = (tile % ACROSS) * TILE, (tile // ACROSS) * TILE
    k = tl.arange(0, CHUNK)
    xs, ys = (x0 + tl.arange(0, TILE))[:, None], (y0 + tl.arange(0, TILE))[None, :]
    REACH: tl.constexpr = TAPS // 2 - 1
    begin_x, end_x = tl.maximum(x0 - REACH, 0), tl.minimum(x0 + TILE + REACH, SIZE)
    begin_y, end_y = tl.maximum(y0 - REACH, 0), tl.minimum(y0 + TILE + REACH, SIZE)
    r = tl.zeros([TILE, TILE], tl.float32)
    g, b = r, r
    for y in range(begin_y, end_y, CHUNK):
        rows = y + k
        across_r = tl.zeros([TILE, CHUNK], tl.float32)
        across_g, across_b = across_r, across_r
        for x in range(begin_x, end_x, CHUNK):
            cols = x + k
            w = band(table, n, xs, cols[None, :], SIZE, TAPS)
            plane = rows[:, None] * SIZE + cols[None, :]
            inside = (rows < SIZE)[:, None] & (cols < SIZE)[None, :]
            across_r = product(w, tl.trans(load_mid(mid, n, plane, 0, inside, SIZE)), across_r, SPLIT)
            across_g = product(w, tl.trans(load_mid(mid, n, plane, 1, inside, SIZE)), across_g, SPLIT)
            across_b = product(w, tl.trans(load_mid(mid, n, plane, 2, inside, SIZE)), across_b, SPLIT)
        w = band(table, n, ys, rows[:, None], SIZE, TAPS)
        r = product(across_r, w, r, SPLIT)
        g = product(across_g, w, g, SPLIT)
        b = product(across_b, w, b, SPLIT)
    ok = (xs < SIZE) & (ys < SIZE)
    finish(out, n, v, ys * SIZE + xs, r, g, b, ok, solarize, mean, std, SIZE, CHANNELS_LAST)
