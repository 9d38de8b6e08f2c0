"""The same view on a Pillow image, by torchvision's functions: what tests, benchmark and contact sheet compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import InterpolationMode

from fastssl.augment.draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, ColourParams
from fastssl.views import CenterCrop, Crop

ADJUST = {
    BRIGHTNESS: (TF.adjust_brightness, "brightness"),
    CONTRAST: (TF.adjust_contrast, "contrast"),
    SATURATION: (TF.adjust_saturation, "saturation"),
    HUE: (TF.adjust_hue, "hue"),
}
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def cut(image: Image.Image, crop: Crop | CenterCrop, box: Sequence[float], flip: bool) -> Image.Image:
    """Crop, resize and flip.  box: top, left, height, width in source pixels, whole numbers; a `CenterCrop` finds its own."""
    mode = MODES[crop.interpolation]
    if isinstance(crop, CenterCrop):
        out = TF.center_crop(TF.resize(image, crop.resize, mode), [crop.size, crop.size])
    else:
        out = TF.resized_crop(image, *(int(t) for t in box), [crop.size, crop.size], mode)
    return TF.hflip(out) if flip else out


def colour(image: Image.Image, params: ColourParams, v: int, i: int) -> Image.Image:
    """The colour operations of row v, image i of `params` (jitter in its order, grey, blur, solarise)."""
    if params.jitter[v, i]:
        for op in params.order[v, i].tolist():
            adjust, amount = ADJUST[op]
            image = adjust(image, float(getattr(params, amount)[v, i]))
    if params.grey[v, i]:
        image = TF.to_grayscale(image, 3)
    if params.sigma[v, i] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(params.sigma[v, i])))
    return ImageOps.solarize(image) if params.solarize[v, i] else image
