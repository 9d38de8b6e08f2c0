"""The colour chain, cut at the contrast mean, which needs the whole view, and at the blur, which needs the neighbours.

Between the passes a value waits as 16-bit fixed point, 1/257 grey level.  The formulas are those of fastssl/augment/colour.py.
One program works on one view, so the order of its jitter and what was not drawn are branches that all its threads take alike.
"""

from __future__ import annotations

import triton
import triton.language as tl

# As in fastssl.augment.draws and .colour: a kernel takes nothing from the outside but constexprs.
BRIGHTNESS, CONTRAST, SATURATION = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
RED, GREEN, BLUE = tl.constexpr(0.299), tl.constexpr(0.587), tl.constexpr(0.114)
SOLARIZE_FROM = tl.constexpr(128.0)
STEPS = tl.constexpr(257.0)
"""Of the fixed point per grey level: 255 becomes 65535."""
VARYING = ["jitter", "order", "brightness", "contrast", "saturation", "hue", "grey", "sigma", "solarize", "batch"]
"""Arguments of which no kernel makes a variant: the parameters of a group begin anywhere in those of all views, and the length of a
batch may change.  A variant would be compiled in mid-run."""


@triton.jit
def luma(r, g, b):
    return RED * r + GREEN * g + BLUE * b


@triton.jit
def clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def hue_channel(sixths, top, chroma):
    k = sixths - 6.0 * tl.floor(sixths * (1.0 / 6.0))
    return top - chroma * tl.minimum(tl.maximum(tl.minimum(k, 4.0 - k), 0.0), 1.0)


@triton.jit
def adjust(r, g, b, op, brightness, contrast, saturation, hue, mean):
    """One operation of the jitter.  mean: of the grey view, for contrast."""
    if op == BRIGHTNESS:
        r, g, b = clip(brightness * r), clip(brightness * g), clip(brightness * b)
    elif op == CONTRAST:
        rest = (1.0 - contrast) * mean
        r, g, b = clip(contrast * r + rest), clip(contrast * g + rest), clip(contrast * b + rest)
    elif op == SATURATION:
        rest = (1.0 - saturation) * luma(r, g, b)
        r, g, b = clip(saturation * r + rest), clip(saturation * g + rest), clip(saturation * b + rest)
    else:
        top, bottom = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
        chroma = top - bottom
        scale = 1.0 / tl.where(chroma > 0.0, chroma, 1.0)
        at_green, at_blue = 2.0 + (b - r) * scale, 4.0 + (r - g) * scale
        sixths = tl.where(top == r, (g - b) * scale, tl.where(top == g, at_green, at_blue)) + 6.0 / 255.0 * (255.0 * hue).to(tl.int32).to(
            tl.float32
        )
        r, g, b = hue_channel(sixths + 5.0, top, chroma), hue_channel(sixths + 3.0, top, chroma), hue_channel(sixths + 1.0, top, chroma)
    return r, g, b


@triton.jit
def jitter_part(r, g, b, n, jitter, order, brightness, contrast, saturation, hue, mean, AFTER: tl.constexpr):
    """The operations before contrast, or contrast and those after it, of view n."""
    drawn = tl.load(jitter + n) != 0
    by_brightness, by_contrast, by_saturation, by_hue = (
        tl.load(brightness + n),
        tl.load(contrast + n),
        tl.load(saturation + n),
        tl.load(hue + n),
    )
    cut = 0
    for place in tl.static_range(4):
        cut += tl.where(tl.load(order + 4 * n + place) == CONTRAST, place, 0)
    for place in tl.static_range(4):
        here = place >= cut if AFTER else place < cut
        if drawn & here:
            op = tl.load(order + 4 * n + place)
            r, g, b = adjust(r, g, b, op, by_brightness, by_contrast, by_saturation, by_hue, mean)
    return r, g, b


@triton.jit
def store_mid(mid, n, plane, r, g, b, ok, SIZE: tl.constexpr):
    """plane: y * SIZE + x of each value, any shape."""
    at = mid + n.to(tl.int64) * (3 * SIZE * SIZE) + plane
    tl.store(at, (r * STEPS + 0.5).to(tl.uint16), mask=ok)
    tl.store(at + SIZE * SIZE, (g * STEPS + 0.5).to(tl.uint16), mask=ok)
    tl.store(at + 2 * SIZE * SIZE, (b * STEPS + 0.5).to(tl.uint16), mask=ok)


@triton.jit
def load_mid(mid, n, plane, channel, ok, SIZE: tl.constexpr):
    at = mid + n.to(tl.int64) * (3 * SIZE * SIZE) + plane + channel * (SIZE * SIZE)
    return tl.load(at, mask=ok, other=0).to(tl.float32) * (1.0 / STEPS)


@triton.jit
def solarized(x, on):
    return tl.where(on & (x >= SOLARIZE_FROM), 255.0 - x, x)


@triton.jit
def finish(out, n, v, plane, r, g, b, ok, solarize, mean, std, SIZE: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Solarise, normalise, cast and store."""
    on = tl.load(solarize + n) != 0
    at = out + n.to(tl.int64) * (3 * SIZE * SIZE) + (3 * plane if CHANNELS_LAST else plane)
    step: tl.constexpr = 1 if CHANNELS_LAST else SIZE * SIZE
    kind = out.dtype.element_ty
    m, s = mean + 3 * v, std + 3 * v
    tl.store(at, (solarized(r, on) * (1.0 / (255.0 * tl.load(s))) - tl.load(m) / tl.load(s)).to(kind), mask=ok)
    tl.store(at + step, (solarized(g, on) * (1.0 / (255.0 * tl.load(s + 1))) - tl.load(m + 1) / tl.load(s + 1)).to(kind), mask=ok)
    tl.store(at + 2 * step, (solarized(b, on) * (1.0 / (255.0 * tl.load(s + 2))) - tl.load(m + 2) / tl.load(s + 2)).to(kind), mask=ok)


@triton.jit
def hand_on(
    out,
    mid,
    n,
    v,
    plane,
    r,
    g,
    b,
    ok,
    grey,
    sigma,
    solarize,
    mean,
    std,
    SIZE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLUR: tl.constexpr,
):
    """Grey, then to the blur or to the end."""
    if tl.load(grey + n) != 0:
        r = luma(r, g, b)
        g, b = r, r
    if BLUR:
        if tl.load(sigma + n) > 0.0:
            store_mid(mid, n, plane, r, g, b, ok, SIZE)
        else:
            finish(out, n, v, plane, r, g, b, ok, solarize, mean, std, SIZE, CHANNELS_LAST)
    else:
        finish(out, n, v, plane, r, g, b, ok, solarize, mean, std, SIZE, CHANNELS_LAST)


@triton.jit(do_not_specialize=VARYING)
def colour_kernel(
    out, mid, sums,
    jitter, order, brightness, contrast, saturation, hue, grey, sigma, solarize, mean, std,
    batch,
    VIEWS: tl.constexpr, SIZE: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, BLUR: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """BLOCK pixels of a view: contrast and what follows it.  SUMS: TILES rounded up to a power of two."""
    PARTS: tl.constexpr = (SIZE * SIZE + BLOCK - 1) // BLOCK
    part, view = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    v, i = view % VIEWS, view // VIEWS
    n = v * batch + i
    plane = part * BLOCK + tl.arange(0, BLOCK)
    ok = plane < SIZE * SIZE
    r, g, b = load_mid(mid, n, plane, 0, ok, SIZE), load_mid(mid, n, plane, 1, ok, SIZE), load_mid(mid, n, plane, 2, ok, SIZE)
    tiles = tl.arange(0, SUMS)
    grey_sum = tl.sum(tl.load(sums + view.to(tl.int64) * TILES + tiles, mask=tiles < TILES, other=0.0), 0)
    r, g, b = jitter_part(r, g, b, n, jitter, order, brightness, contrast, saturation, hue, grey_sum / (SIZE * SIZE), True)
    hand_on(out, mid, n, v, plane, r, g, b, ok, grey, sigma, solarize, mean, std, SIZE, CHANNELS_LAST, BLUR)
