"""Kinds of the augmentation files: each operation at fixed parameters, crop statistics, OBoW's patches.

Pictures are compared in grey levels, normalised ones as they are.  A reproduced array has one more axis in front: the CPU
kernels and the torch operations, or only the latter for a whole image that is not square (views are).
"""

from __future__ import annotations

import re
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache

import numpy as np
import torch
from scipy.stats import beta

from fastssl.augment import augmenter, blur, colour, cpu
from fastssl.augment.augmenter import GroupPlan
from fastssl.augment.draws import ColourDraws
from fastssl.augment.patches import corners
from fastssl.batch import ImageBatch
from fastssl.views import IMAGENET_MEAN, IMAGENET_STD, STL10_MEAN, STL10_STD, CenterCrop, Crop, PatchCrop, Photometric, View
from loaders.geometry import Geometry
from tests.golden.kind import Arrays, Kind

CPU = torch.device("cpu")
LEVELS = Photometric(jitter=1.0, grey=1.0, blur=1.0, solarize=1.0, mean=(0, 0, 0), std=(1 / 255,) * 3)
"""Every operation may be asked for; pixels come back on the 0..255 scale."""

# Mean of a picture and largest difference allowed; largest measured on the three files in the comments. What is ours is as in
# fastssl/augment/README.md: nothing is rounded. The blends: less than 1 truncated, half of |1 - factor| for a rounded grey.
TOLERANCE = {
    "*normalized*": (1e-6, 2e-6),  # 1e-7, 5e-7: float32
    "*flip*": (1e-4, 1e-4),  # 0
    "*solariz*": (1e-4, 1e-4),  # 0
    "*gray*": (0.27, 0.51),  # 0.252, 0.500
    "*brightness*": (0.55, 1.01),  # 0.505, 0.993
    "*contrast*": (0.65, 1.41),  # 0.626, 1.130
    "*saturation*": (0.55, 1.41),  # 0.494, 1.200
    "*hue*": (1.2, 14.1),  # 0.737, 11.00
    "*blur*": (1.0, 3.0),  # 0.806, 2.620
    "*jittered": (1.6, 7.0),  # 1.404, 5.322
    "*": (0.35, 1.3),  # 0.321, 1.064: crops and resizes
}


class Pictures(Kind):
    def compare(self, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        if name.endswith("_quantiles"):
            compare_quantiles(name, actual, expected)
            return
        assert actual.shape[1:] == expected.shape, f"{name}: shape {actual.shape[1:]}, expected {expected.shape}"
        assert np.isfinite(actual).all(), f"{name}: not finite"
        difference = np.abs(actual.astype(np.float64) - expected)
        mean, largest = difference.mean((-3, -2, -1)).max(), difference.max()
        allowed = next(bounds for pattern, bounds in TOLERANCE.items() if fnmatchcase(name, pattern))
        assert mean <= allowed[0] and largest <= allowed[1], f"{name}: mean {mean:.3g}, largest {largest:.3g}, allowed {allowed}"


# ------------------------------------------------------------------------------------------------ one operation at a time


def view(
    image: np.ndarray, crop: Crop | CenterCrop, box: np.ndarray, *, flip: bool = False, photometric: Photometric = LEVELS, **given
) -> np.ndarray:
    """One view of uint8 [h, w, 3] -> float32 [2, 3, s, s].  given: what is not neutral in the `ColourParams`."""
    spec = (View(crop=crop, photometric=photometric),)
    batch = ImageBatch.of([image], np.float32([[box]]), [[flip]])
    neutral = ColourDraws((View(),), device=CPU, seed=0)(0, batch.index)
    params = replace(neutral, **{name: torch.tensor(value)[None, None] for name, value in given.items()})
    return np.stack([render(batch, GroupPlan.of(spec, (0,), CPU), params)[0].numpy() for render in (cpu.render, augmenter.render)])


def everywhere(image: np.ndarray, *, flip: bool = False, **given) -> np.ndarray:
    """An operation on single pixels of a whole image -> [2, 3, h, w], from views that are its squares."""
    height, width = image.shape[:2]
    side = min(height, width)
    out = np.empty((2, 3, height, width), np.float32)
    for top, left in ((t, s) for t in steps(height, side) for s in steps(width, side)):
        at = width - side - left if flip else left
        out[..., top : top + side, at : at + side] = view(image, Crop(size=side), (top, left, side, side), flip=flip, **given)
    return out


def steps(length: int, side: int) -> list[int]:
    """Where squares of `side` begin that cover `length`."""
    return [*range(0, length - side, side), length - side]


def operation(name: str, image: np.ndarray, amount: float = 0.0) -> np.ndarray:
    """brightness, contrast, saturation, hue, grey, blur, solarise or flip of a whole image -> [ways, h, w, 3] grey levels."""
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    square = image.shape[0] == image.shape[1]
    if name in ("contrast", "blur") and not square:
        factor, one, order = torch.tensor([amount]), torch.ones(1), torch.arange(4)[None]
        out = (blur.gaussian_blur(planes, factor) if name == "blur" else colour.jitter(planes, order, one, factor, one, 0 * one)).numpy()
    else:
        given = {
            "flip": {"flip": True},
            "grey": {"grey": True},
            "solarise": {"solarize": True},
            "blur": {"sigma": float(amount)},
        }.get(name, {"jitter": True, name: float(amount)})
        out = everywhere(image, **given)
    return out.transpose(0, 2, 3, 1)


def cut(image: np.ndarray, crop: Crop | CenterCrop, box: np.ndarray) -> np.ndarray:
    """[2, s, s, 3] grey levels."""
    return view(image, crop, box).transpose(0, 2, 3, 1)


def normalized(image: np.ndarray, mean: tuple, std: tuple) -> np.ndarray:
    return everywhere(image, photometric=Photometric(mean=mean, std=std))


# ------------------------------------------------------------------------------------------------ files


def dino_aug_ops(arrays: Arrays) -> Arrays:
    image = arrays["image"]
    out: Arrays = {
        "hflip": operation("flip", image),
        "grayscale": operation("grey", image),
        "solarize": operation("solarise", image),
        "tensor_normalized": normalized(image, IMAGENET_MEAN, IMAGENET_STD),
    }
    for name in arrays:
        what, _, amount = name.rpartition("_")
        if what in ("brightness", "contrast", "saturation", "hue"):
            out[name] = operation(what, image, float(amount))
        elif what == "gaussian_blur_radius":
            out[name] = operation("blur", image, float(amount))
        elif name.endswith("_top_left_h_w_outsize"):
            *box, size = arrays[name].tolist()
            out[f"{name.split('_')[0]}_bicubic"] = cut(image, Crop(size=size, interpolation="bicubic"), box)
        elif name.endswith("_quantiles"):
            out[name] = drawn(name)
    return out


def sfrik_augops(arrays: Arrays) -> Arrays:
    image = arrays["image"]
    out: Arrays = {
        "hflip": operation("flip", image),
        "gray3": operation("grey", image),
        "solarize128": operation("solarise", image),
        "normalized_imagenet": normalized(image, IMAGENET_MEAN, IMAGENET_STD),
        "normalized_stl10": normalized(image, STL10_MEAN, STL10_STD),
    }
    amounts = {"blur": "blur_sigma", "brightness": "factor", "contrast": "factor", "saturation": "factor", "hue": "hue_factor"}
    out |= {name: np.stack([operation(name, image, a) for a in arrays[which]], 1) for name, which in amounts.items() if name in arrays}
    for interpolation in ("bilinear", "bicubic"):
        if f"crop_{interpolation}" in arrays:
            crop = Crop(size=int(arrays["out_size"]), interpolation=interpolation)
            out[f"crop_{interpolation}"] = np.stack([cut(image, crop, box) for box in arrays["box_top_left_h_w"]], 1)
        if f"eval_{interpolation}" in arrays:
            middle = CenterCrop(size=int(arrays["eval_crop"]), resize=int(arrays["eval_resize"]), interpolation=interpolation)
            height, width = (np.array([side], np.int32) for side in image.shape[:2])
            boxes, _ = Geometry((View(crop=middle),)).draw(np.arange(1), 0, height, width)
            out[f"eval_{interpolation}"] = cut(image, middle, boxes[0, 0])
    return out


def w2ssl_aug(arrays: Arrays) -> Arrays:
    """The operations start from the file's own resized image, which is compared with ours too."""
    out: Arrays = {}
    for c in range(int(arrays["n_cases"])):
        case = f"case{c}."
        size, resized = int(arrays["out_size"]), arrays[f"{case}resized"]
        amounts = {name: float(arrays[case + name]) for name in ("brightness", "contrast", "saturation", "hue")}
        whole = (0, 0, *resized.shape[:2])
        jittered = view(resized, Crop(size=len(resized)), whole, jitter=True, order=arrays[f"{case}jitter_order"], **amounts)
        out[f"{case}resized"] = cut(arrays[f"{case}image"], Crop(size=size), arrays[f"{case}crop_top_left_h_w"])
        out |= {f"{case}resized_{name}": operation(name, resized, amount) for name, amount in amounts.items()}
        out |= {
            f"{case}resized_jittered": jittered.transpose(0, 2, 3, 1),
            f"{case}resized_gray": operation("grey", resized),
            f"{case}resized_blurred": operation("blur", resized, float(arrays[f"{case}blur_sigma"])),
            f"{case}resized_solarized": operation("solarise", resized),
            f"{case}resized_hflipped": operation("flip", resized),
            f"{case}resized_normalized": normalized(resized, IMAGENET_MEAN, IMAGENET_STD),
        }
    return out


def sfrik_patchgrid(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for c in range(int(arrays["n_cases"])):
        case = f"case{c}_"
        size, patch_size, jitter, patches = (
            int(arrays[case + name]) for name in ("image_size", "patch_size", "patch_jitter", "num_patches")
        )
        crop = PatchCrop(size=size, patch_size=patch_size, patches=patches, patch_jitter=jitter)
        moved, cells = (torch.from_numpy(arrays[case + name])[None] for name in ("jitter_yx", "selected_cells"))
        out[f"{case}top_left_yx"] = corners(crop, moved, cells)[:, 0].numpy()
    return out


# ------------------------------------------------------------------------------------------------ statistics of crops

HEIGHT, WIDTH, DRAWS = 375, 500, 4000
"""Of the image the files' boxes were drawn in, and how many were."""
OURS = 400_000
"""Boxes: so many that only the files' noise is left."""
RARE = 1e-6
"""Chance of a quantile by the same distribution that is called different."""
NEARLY = 1e-2
"""Relative, of the first and the last quantile: our own smallest and largest boxes are not the last possible ones either."""


def drawn(name: str) -> np.ndarray:
    """Ascending area fractions, or log(width / height), of boxes of the loaders' geometry, by the scale in the array's name."""
    low, high, what = re.search(r"_([\d.]+)_([\d.]+)_(area|logratio)_quantiles$", name).groups()
    return np.sort(measure(what, *sides(float(low), float(high))))


@cache
def sides(low: float, high: float) -> np.ndarray:
    """Heights and widths [2, OURS]."""
    image = (np.full(OURS, side, np.int32) for side in (HEIGHT, WIDTH))
    boxes, _ = Geometry((View(crop=Crop(scale=(low, high))),)).draw(np.arange(OURS), 0, *image)
    return boxes[:, 0, 2:].T.astype(np.float64)


def measure(what: str, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    return height * width / (HEIGHT * WIDTH) if what == "area" else np.log(width / height)


@cache
def whole_pixels(what: str) -> np.ndarray:
    """Ascending: what boxes of whole numbers of pixels can have."""
    return np.unique(measure(what, *np.indices((HEIGHT, WIDTH), np.float64) + 1))


def compare_quantiles(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Quantiles of DRAWS boxes, evenly spaced from 0 to 100 %, against our distribution.

    The k-th of n draws lies where the distribution function is Beta(k, n + 1 - k), which decides at any level.  That alone
    would let 1 % pass where the ends of the distribution are blurred by whole pixels; but then the first and the last, which
    are single draws, are no boxes of whole pixels any more.
    """
    k = 1 + np.linspace(0, 1, len(theirs)) * (DRAWS - 1)
    room = np.zeros(len(theirs))
    room[[0, -1]] = NEARLY * np.abs(theirs[[0, -1]])
    below, above = np.searchsorted(ours, theirs - room, "left") / len(ours), np.searchsorted(ours, theirs + room, "right") / len(ours)
    chance = np.minimum(beta.cdf(above, k, DRAWS + 1 - k), beta.sf(below, k, DRAWS + 1 - k))
    assert chance.min() > RARE, f"{name}: quantile {chance.argmin()} is not from our distribution (chance {chance.min():.1g})"
    possible = whole_pixels(name.split("_")[-2])
    for end in (theirs[0], theirs[-1]):
        assert np.abs(possible - end).min() < 1e-9, f"{name}: {end} is not of a box of whole pixels"


KINDS = {
    "dino/aug_ops": Pictures(dino_aug_ops, ("image", "crop*_top_left_h_w_outsize")),
    "sfrik/augops": Pictures(
        sfrik_augops, ("image", "out_size", "box_top_left_h_w", "blur_sigma", "factor", "hue_factor", "eval_resize", "eval_crop")
    ),
    "sfrik/patchgrid": Kind(
        sfrik_patchgrid,
        ("n_cases", "*_image_size", "*_patch_size", "*_patch_jitter", "*_num_patches", "*_jitter_yx", "*_selected_cells"),
    ),
    "w2ssl/aug": Pictures(
        w2ssl_aug,
        (
            *("n_cases", "out_size", "*.image", "*.crop_top_left_h_w", "*.jitter_order", "*.blur_sigma"),
            *("*.brightness", "*.contrast", "*.saturation", "*.hue"),
        ),
    ),
}
