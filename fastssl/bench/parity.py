"""How far a renderer is from Pillow and torchvision, operation by operation, on random images: `parity(render, device)`.

An operation is a view spec with all others switched off, so it goes through the loader's boxes, the augmentation's draws and
the whole renderer; it is compared after normalisation, scaled back to grey levels of 0..255.  Images, boxes and parameters
follow from a seed: any two renderers are given the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import PIL
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor

from fastssl.augment import pillow
from fastssl.augment.augmenter import GroupPlan
from fastssl.augment.draws import ColourDraws, ColourParams
from fastssl.augment.resample import rows_first
from fastssl.batch import ImageBatch
from fastssl.recipes import BYOL_JITTER, byol_asymmetric, dino
from fastssl.views import CenterCrop, Crop, Interpolation, Photometric, View, ViewSpec, groups
from loaders.geometry import Geometry

Render = Callable[[ImageBatch, GroupPlan, ColourParams], Tensor]
"""(batch, plan, params) -> [V * B, 3, s, s], normalised, view-major."""

PILLOW = int(PIL.__version__.split(".")[0])
LARGEST = 400
"""Side of the largest image, pixels."""
SIDES = (1, 31, 48, 64, 96)
"""Of the square images that colours are changed on, pixels."""
ANY = (1 / LARGEST, float(LARGEST))


def _crops(interpolation: Interpolation) -> ViewSpec:
    """The whole image, up to 20 times smaller; what training cuts; boxes down to one pixel, up to 224 times larger."""
    kinds = ((20, (1.0, 1.0), ANY), (64, (0.08, 1.0), (3 / 4, 4 / 3)), (224, (1e-5, 0.01), ANY))
    return tuple(View(crop=Crop(size=n, scale=s, ratio=r, interpolation=interpolation)) for n, s, r in kinds)


def _centre(interpolation: Interpolation) -> ViewSpec:
    return (View(crop=CenterCrop(size=56, resize=64, interpolation=interpolation)),)


GEOMETRY: dict[str, ViewSpec] = {
    "crop bilinear": _crops("bilinear"),
    "crop bicubic": _crops("bicubic"),
    "resize + centre crop bilinear": _centre("bilinear"),
    "resize + centre crop bicubic": _centre("bicubic"),
}
COLOURS: dict[str, Photometric] = {
    "flip": Photometric(),
    "brightness": Photometric(jitter=1.0, brightness=1.0),
    "contrast": Photometric(jitter=1.0, contrast=1.0),
    "saturation": Photometric(jitter=1.0, saturation=1.0),
    "hue": Photometric(jitter=1.0, hue=0.5),
    "jitter": replace(BYOL_JITTER, jitter=1.0, grey=0.0),
    "grey": Photometric(grey=1.0),
    "blur": Photometric(blur=1.0),
    "solarise": Photometric(solarize=1.0),
    "normalise": Photometric(),
}
"""On whole square images, always applied; the four parts of the jitter in their whole range, together as in BYOL."""
RECIPES: dict[str, ViewSpec] = {
    "lewel": byol_asymmetric(size=96),
    "dino": dino(size=96, local_size=48, local_crops=2),
}
"""Smaller and fewer views than in training."""


@dataclass(frozen=True)
class Error:
    """Absolute difference of grey levels (0..255)."""

    mean: float
    """Over the pixels of a view, then over the views."""
    max: float
    views: int
    """How many were compared."""

    @classmethod
    def of(cls, found: np.ndarray) -> Error:
        """found: [views, 2 or more], mean and largest difference of each."""
        return cls(float(found[:, 0].mean()), float(found[:, 1].max()), len(found))


def parity(render: Render, device: torch.device | str, count: int = 200, seed: int = 0) -> dict[str, Error]:
    """The error of each operation, and of two recipes with everything, on `count` random images of 1 to 400 pixels a side.

    With a Pillow older than 13 bicubic resizing has two entries: where its order of the passes is not ours is told apart.
    """
    rng = np.random.default_rng(seed)
    images = sorted((random_image(rng, *random_size(rng)) for _ in range(count)), key=lambda im: im.width * im.height)
    each = math.ceil(count / len(SIDES))
    squares = [random_image(rng, side, side) for side in SIDES for _ in range(each)]
    # images of similar size at a time: the torch operations take as long for every image as for the largest
    images, squares = _batches(images, math.ceil(count / 8)), _batches(squares, each)
    measure = partial(differences, render, torch.device(device), seed)
    errors = {}
    for name, spec in GEOMETRY.items():
        found = np.concatenate([measure(spec, some, first) for first, some in images])
        errors |= _by_order(name, spec, found)
    for name, photometric in COLOURS.items():
        crop = Crop(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=float(name == "flip"))
        specs = [(View(crop=replace(crop, size=side), photometric=photometric),) for side in SIDES]
        found = [measure(spec, some, first, only=name) for spec, (first, some) in zip(specs, squares, strict=True)]
        errors[name] = Error.of(np.concatenate(found))
    for name, spec in RECIPES.items():
        errors |= _by_order(name, spec, np.concatenate([measure(spec, some, first) for first, some in images]))
    return errors


def _by_order(name: str, spec: ViewSpec, found: np.ndarray) -> dict[str, Error]:
    """The errors of views whose bicubic passes this Pillow runs in our order, and apart from them those of the others."""
    late = found[:, 2].astype(bool) & any(view.crop.interpolation == "bicubic" for view in spec)
    return {name: Error.of(found[~late]), **({f"{name}, other order": Error.of(found[late])} if late.any() else {})}


def differences(
    render: Render, device: torch.device, seed: int, spec: ViewSpec, images: Sequence[Image.Image], first: int, only: str = ""
) -> np.ndarray:
    """Every view of samples first, first + 1, ... -> [views * images, 3]: mean and largest difference from Pillow in grey levels,
    and whether it was resized in another order.

    only: name of the jitter's one operation that Pillow runs. It has no neutral hue: even a shift by 0 goes through 8-bit HSV.
    """
    index, (width, height) = np.arange(first, first + len(images)), np.array([im.size for im in images], np.int32).T
    boxes, flips = Geometry(spec, seed).draw(index, 0, height, width)
    batch = ImageBatch.of([np.asarray(image) for image in images], boxes, flips, index=index, device=device)
    params = ColourDraws(spec, device=device, seed=seed)(0, batch.index)
    drawn = ColourParams(*(t.cpu() for t in params.tensors()))
    adjust = {amount: function for function, amount in pillow.ADJUST.values()}.get(only)
    out = []
    for views in groups(spec):
        pixels = render(batch, GroupPlan.of(spec, views, device), params.of(views)).float().cpu().unflatten(0, (len(views), -1))
        for v, ours in zip(views, pixels, strict=True):
            photometric = spec[v].photometric
            levels = 255 * torch.tensor(photometric.std)[:, None, None]
            for i, image in enumerate(images):
                theirs = pillow.cut(image, spec[v].crop, boxes[i, v], flips[i, v])
                theirs = adjust(theirs, float(getattr(drawn, only)[v, i])) if adjust else pillow.colour(theirs, drawn, v, i)
                difference = (ours[i] - TF.normalize(TF.to_tensor(theirs), photometric.mean, photometric.std)).abs() * levels
                out.append((difference.mean(), difference.max(), other_order(spec[v].crop, boxes[i, v], *image.size)))
    return np.array(out)


def other_order(crop: Crop | CenterCrop, box: np.ndarray, width: int, height: int) -> bool:
    """Whether we resize along y first and this Pillow, being older than 13, does not (resample.rows_first)."""
    if isinstance(crop, CenterCrop):
        short = min(width, height)
        new_width, new_height = (int(crop.resize * side / short) for side in (width, height))
    else:
        (height, width), new_width, new_height = box[2:], crop.size, crop.size
    return PILLOW < 13 and bool(rows_first(*(torch.tensor(n) for n in (height, width, new_height, new_width))))


def _batches(images: list[Image.Image], size: int) -> list[tuple[int, list[Image.Image]]]:
    """Consecutive images, with the sample id of the first."""
    return [(k, images[k : k + size]) for k in range(0, len(images), size)]


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width of 1 to LARGEST pixels; every other one is likely to be small."""
    if rng.random() < 0.5:
        return tuple(np.exp(rng.uniform(0, np.log(LARGEST + 1), 2)).astype(int).tolist())
    return tuple(rng.integers(1, LARGEST + 1, 2).tolist())


def random_image(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """One of: coarse to fine texture, shapes on a gradient, noise, a grey texture, two tones."""
    kind = rng.integers(5)
    if kind == 2:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if kind == 4:
        tones = rng.integers(0, 256, (2, 3), dtype=np.uint8)
        return Image.fromarray(tones[(rng.random((height, width)) < 0.5).astype(int)])
    field = np.zeros((height, width, 3))
    for octave in range(1 if kind == 1 else 7):
        coarse = rng.integers(0, 256, (2**octave + 1, 2**octave + 1, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        field += (np.asarray(smooth) - 127.5) / (1 if kind == 1 else 1.6**octave)
    if kind == 1:
        for _ in range(12):
            (top, bottom), (left, right) = np.sort(rng.integers(0, (height + 1, width + 1), (2, 2)), 0).T
            field[top:bottom, left:right] = rng.uniform(-127, 128, 3)
    if kind == 3:
        field[:] = field[..., :1]
    return Image.fromarray((field + 127.5).clip(0, 255).astype(np.uint8))
