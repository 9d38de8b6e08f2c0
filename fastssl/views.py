"""What the crops of one image are: plain data, no torch.

A `ViewSpec` is the declared order of a method's views.  `groups` tells which consecutive views share one tensor (and one
resampling call, one compiled graph).  The ones that the papers name are in `fastssl/recipes.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
STL10_MEAN = (0.441, 0.428, 0.387)
STL10_STD = (0.268, 0.261, 0.269)

Dataset = Literal["imagenet", "stl10"]
Interpolation = Literal["bilinear", "bicubic"]


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
    interpolation: Interpolation = "bilinear"
    """Antialiased as Pillow does it; bicubic with a = -0.5."""


@dataclass(frozen=True, kw_only=True)
class CenterCrop:
    """torchvision's Resize(resize) of the shorter side, then CenterCrop(size): the transform of evaluations."""

    size: int = 224
    """Side of the square output, pixels."""
    resize: int = 256
    """Shorter side after the resize, pixels."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    interpolation: Interpolation = "bilinear"


@dataclass(frozen=True, kw_only=True)
class PatchCrop(Crop):
    """A `Crop` that is handed out as patches cut from it after flip and colours (OBoW): one colour draw, one contrast mean.

    Corners lie on a jittered 3 x 3 grid.  ValueError unless patch_size + patch_jitter <= size.
    """

    patch_size: int = 96
    """Side of the square patches, pixels."""
    patches: int = 5
    """Patches per image, 1..9: of a random permutation of the grid's cells the first so many; 9 keeps the grid's order."""
    patch_jitter: int = 24
    """A patch's corner is moved from its grid point by 0 to so many pixels, down and right."""

    def __post_init__(self) -> None:
        if self.patch_size < 1 or not 0 <= self.patch_jitter <= self.size - self.patch_size:
            raise ValueError(
                f"patches of {self.patch_size} pixels that move by up to {self.patch_jitter} do not fit into a crop of {self.size}: "
                "size must be at least patch_size + patch_jitter."
            )
        if not 1 <= self.patches <= 9:
            raise ValueError(f"patches must be 1 to 9, the cells of the 3 x 3 grid they are cut from, got {self.patches}.")


@dataclass(frozen=True, kw_only=True)
class WindowCrop(PatchCrop):
    """A `PatchCrop` whose patches are an upper and a lower window with a common left side (W2SSL's older view 2), 0 to `patch_jitter`
    pixels below the highest place and above the lowest."""

    patches: Literal[2] = 2


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
class Mask:
    """Patches of a view that the student does not see (iBOT; methods/ibot.md section 6); drawn for every image.

    ValueError unless the ratios lie in [0, 1] and each has its spread.
    """

    shape: Literal["block", "rand"] = "block"
    """block: BEiT's rectangles, of at most the drawn share of the patches; rand: as many single patches as fit into it."""
    pred_ratio: tuple[float, ...] = (0.0, 0.3)
    """Shares of the patches to hide, of which each image takes one."""
    pred_ratio_var: tuple[float, ...] = (0.0, 0.2)
    """Spread of each share: it is drawn from U(ratio - spread, ratio + spread)."""
    patch_size: int = 16
    """Side of what one element of the mask hides, pixels: the patch of a ViT, 32 for a Swin transformer."""

    def __post_init__(self) -> None:
        if not self.pred_ratio or len(self.pred_ratio) != len(self.pred_ratio_var):
            raise ValueError(f"pred_ratio {self.pred_ratio} and pred_ratio_var {self.pred_ratio_var} must be equally many, at least one.")
        if any(ratio - spread < 0 or ratio + spread > 1 for ratio, spread in zip(self.pred_ratio, self.pred_ratio_var, strict=True)):
            raise ValueError(f"pred_ratio {self.pred_ratio} -+ pred_ratio_var {self.pred_ratio_var} must stay within 0 and 1.")
        if self.patch_size < 1:
            raise ValueError(f"patch_size must be at least 1 pixel, got {self.patch_size}.")


@dataclass(frozen=True, kw_only=True)
class View:
    """One view of every image."""

    crop: Crop | CenterCrop | PatchCrop | WindowCrop = Crop()
    photometric: Photometric = Photometric()
    mask: Mask | None = None
    """Patches to hide from the student; None: the view has no mask."""
    separate: bool = False
    """Start a new group here although the size is the one of the view before."""


ViewSpec = tuple[View, ...]


def groups(spec: ViewSpec) -> tuple[tuple[int, ...], ...]:
    """View ids of each group: consecutive views of equal size, unless a view says `separate`; a `PatchCrop` is a group of its own."""
    out: list[list[int]] = []
    for v, view in enumerate(spec):
        if out and _same_group(spec[v - 1], view):
            out[-1].append(v)
        else:
            out.append([v])
    return tuple(tuple(g) for g in out)


def _same_group(before: View, view: View) -> bool:
    patched = isinstance(before.crop, PatchCrop) or isinstance(view.crop, PatchCrop)
    return before.crop.size == view.crop.size and not view.separate and not patched
