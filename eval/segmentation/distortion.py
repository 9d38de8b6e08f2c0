"""mmsegmentation's photometric distortion on 8-bit pixels (methods/transfer.md 5.3), with OpenCV's HSV conversions of 8-bit images.

Every operation clips and truncates to 8 bits, saturation and hue on the way to HSV and back each.  One pass of a kernel applies all.
Of OpenCV's ways back from HSV it is the one that rounds; its vector instructions truncate, a level less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit

kernel = njit(nogil=True, cache=True)

_SHIFT = 12  # fixed point of OpenCV's conversion to HSV
_S_TABLE = np.array([0, *(round((255 << _SHIFT) / i) for i in range(1, 256))])
_H_TABLE = np.array([0, *(round((180 << _SHIFT) / (6 * i)) for i in range(1, 256))])


@dataclass(frozen=True, kw_only=True)
class Distortion:
    """What is done to an image, in this order, contrast after brightness or at the end.  The defaults change nothing."""

    brightness: float = 0.0
    """Added; grey levels."""
    contrast: float = 1.0
    contrast_last: bool = False
    saturation: float = 1.0
    hue: int = 0
    """Added; half degrees."""

    @classmethod
    def drawn(cls, rng: np.random.Generator) -> Distortion:
        """Brightness +-32, contrast and saturation x 0.5-1.5, hue -18 to 17, each with probability 1/2."""
        given = {
            "brightness": rng.uniform(-32, 32),
            "contrast": rng.uniform(0.5, 1.5),
            "saturation": rng.uniform(0.5, 1.5),
            "hue": int(rng.integers(-18, 18)),
        }
        last = bool(rng.integers(2))
        return cls(contrast_last=last, **{name: value for name, value in given.items() if rng.integers(2)})


def distorted(image: np.ndarray, how: Distortion) -> np.ndarray:
    """RGB uint8 [h, w, 3] -> the same after `how`."""
    out = np.empty(image.shape, np.uint8)
    factors = (np.float32(v) for v in (how.brightness, how.contrast, how.saturation))
    _distort(np.ascontiguousarray(image), out, *factors, how.hue, how.contrast_last)
    return out


@kernel
def _levels(x):
    return np.int64(min(max(x, np.float32(0)), np.float32(255)))


@kernel
def _to_hsv(r, g, b):
    """Hue 0..179, saturation and value 0..255."""
    v, low = max(r, g, b), min(r, g, b)
    diff = v - low
    half = 1 << (_SHIFT - 1)
    s = (diff * _S_TABLE[v] + half) >> _SHIFT
    if v == r:
        h = g - b
    elif v == g:
        h = b - r + 2 * diff
    else:
        h = r - g + 4 * diff
    h = (h * _H_TABLE[diff] + half) >> _SHIFT
    return (h + 180 if h < 0 else h), s, v


@kernel
def _to_rgb(h, s, v):
    value, saturation = np.float32(v) * np.float32(1 / 255), np.float32(s) * np.float32(1 / 255)
    place = np.float32(h) * np.float32(6 / 180)
    sector = np.int64(np.floor(place))
    f = place - np.float32(sector)
    one = np.float32(1)
    p, q, t = value * (one - saturation), value * (one - saturation * f), value * (one - saturation * (one - f))
    sector %= 6
    if sector == 0:
        r, g, b = value, t, p
    elif sector == 1:
        r, g, b = q, value, p
    elif sector == 2:
        r, g, b = p, value, t
    elif sector == 3:
        r, g, b = p, q, value
    elif sector == 4:
        r, g, b = t, p, value
    else:
        r, g, b = value, p, q
    scale = np.float32(255)
    return np.int64(np.rint(r * scale)), np.int64(np.rint(g * scale)), np.int64(np.rint(b * scale))


@kernel
def _distort(image, out, brightness, contrast, saturation, hue, contrast_last):
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            r, g, b = np.int64(image[y, x, 0]), np.int64(image[y, x, 1]), np.int64(image[y, x, 2])
            if brightness != 0:
                r, g, b = _levels(np.float32(r) + brightness), _levels(np.float32(g) + brightness), _levels(np.float32(b) + brightness)
            if contrast != 1 and not contrast_last:
                r, g, b = _levels(np.float32(r) * contrast), _levels(np.float32(g) * contrast), _levels(np.float32(b) * contrast)
            if saturation != 1:
                h, s, v = _to_hsv(r, g, b)
                r, g, b = _to_rgb(h, _levels(np.float32(s) * saturation), v)
            if hue != 0:
                h, s, v = _to_hsv(r, g, b)
                r, g, b = _to_rgb((h + hue) % 180, s, v)
            if contrast != 1 and contrast_last:
                r, g, b = _levels(np.float32(r) * contrast), _levels(np.float32(g) * contrast), _levels(np.float32(b) * contrast)
            out[y, x, 0], out[y, x, 1], out[y, x, 2] = r, g, b
