"""What the crops of one image are: plain data, no torch.

A `ViewSpec` is the declared order of a method's views.  `groups` tells which consecutive views share one tensor (and one
resampling call, one compiled graph).  The recipes at the end are the ones the papers name; each cites its table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Crop:
    """torchvision's RandomResizedCrop(size, scale, ratio) inside `region`, then a horizontal flip."""

    size: int = 224
    """Side of the square output, pixels."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of the box as a fraction of the region's area."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width / height of the box."""
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    """top, left, bottom, right of the part of the image boxes are drawn in, as fractions of its height and width."""
    region_from: Literal["corner", "middle"] = "corner"
    """What the region's fractions count from: the top left corner, or the pixel at half the height and width, rounded down; what
    is beyond the image ends at its border."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Antialiased as Pillow does it; bicubic with a = -0.5."""


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """torchvision's Resize(resize) of the shorter side, then CenterCrop(size): the transform of evaluations."""

    size: int = 224
    """Side of the square output, pixels."""
    resize: int = 256
    """Shorter side after the resize, pixels."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


@dataclass(frozen=True, kw_only=True)
class Photometric:
    """Colour operations in torchvision's order: jitter, grey, blur, solarise, normalise.  0 switches one off."""

    jitter: float = 0.0
    """Probability of the colour jitter; its four operations run in a random order."""
    brightness: float = 0.0
    """Factor drawn from U(1 - x, 1 + x); contrast and saturation alike."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Shift drawn from U(-x, x), in turns of the hue circle."""
    grey: float = 0.0
    """Probability of becoming grey (ITU-R 601 luma)."""
    blur: float = 0.0
    """Probability of Pillow's GaussianBlur, radius drawn from U(*sigma)."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, pixels of the crop."""
    solarize: float = 0.0
    """Probability that values >= 128 become 255 - value."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


@dataclass(frozen=True, kw_only=True)
class View:
    """One view of every image."""

    crop: Crop | CenterCrop = Crop()
    photometric: Photometric = Photometric()
    separate: bool = False
    """Start a new group here although the size is the one of the view before."""


ViewSpec = tuple[View, ...]


def groups(spec: ViewSpec) -> tuple[tuple[int, ...], ...]:
    """View ids of each group: consecutive views of equal size, unless a view says `separate`."""
    out: list[list[int]] = []
    for v, view in enumerate(spec):
        if out and spec[v - 1].crop.size == view.crop.size and not view.separate:
            out[-1].append(v)
        else:
            out.append([v])
    return tuple(tuple(g) for g in out)


# ------------------------------------------------------------------------------------------------ recipes

BYOL_JITTER = Photometric(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grey=0.2)


# W2SSL's overlapping strips, to be counted from the middle (its code cuts at w // 2 + 0.3 w): left, right.
W2SSL_HALVES = ((-1.0, -1.0, 1.0, 0.3), (-1.0, -0.3, 1.0, 1.0))
# Of its four quadrants: top left, bottom left, top right, bottom right.
W2SSL_QUADRANTS = ((-1.0, -1.0, 0.3, 0.3), (-0.3, -1.0, 1.0, 0.3), (-1.0, -0.3, 0.3, 1.0), (-0.3, -0.3, 1.0, 1.0))


def byol_asymmetric(*, size: int = 224, min_scale: float = 0.2) -> ViewSpec:
    """BYOL / EMAN / LEWEL: view 1 by recipe A (always blurred), view 2 by recipe B (blur .1, solarise .2).

    LEWEL's table of operations; the smallest crop is MoCo's 0.2 (not BYOL's 0.08) and bilinear.
    """
    crop = Crop(size=size, scale=(min_scale, 1.0))
    return (
        View(crop=crop, photometric=replace(BYOL_JITTER, blur=1.0)),
        View(crop=crop, photometric=replace(BYOL_JITTER, blur=0.1, solarize=0.2)),
    )


def center_crop(*, size: int = 224, resize: int = 256) -> ViewSpec:
    """One undistorted view: what evaluations see."""
    return (View(crop=CenterCrop(size=size, resize=resize)),)
