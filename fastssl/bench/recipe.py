"""The views that the loader bench counts with: DINO's 2 x 224 + 6 x 96 per source image (Caron et al., ICCV 2021)."""

from __future__ import annotations

from fastssl.views import Crop, View, ViewSpec

GLOBALS, LOCALS = 2, 6
GLOBAL, LOCAL = 224, 96
"""Pixels."""
GLOBAL_SCALE, LOCAL_SCALE = (0.25, 1.0), (0.05, 0.25)
"""Area of a box as a fraction of the image's."""
VIEWS = f"{GLOBALS}x{GLOBAL} + {LOCALS}x{LOCAL}"


def crops() -> list[tuple[int, tuple[float, float]]]:
    """Size and scale of each view, in order."""
    return [(GLOBAL, GLOBAL_SCALE)] * GLOBALS + [(LOCAL, LOCAL_SCALE)] * LOCALS


def spec() -> ViewSpec:
    """What the loader draws boxes for; colours are no business of a loader."""
    return tuple(View(crop=Crop(size=size, scale=scale, interpolation="bicubic")) for size, scale in crops())
