"""What the augmentation bench measures: operations and recipes, as tasks, on random images.

A task is a `ViewSpec` and the stages of it that other libraries are asked for: an operation alone works on crops that are ready,
a recipe on decoded images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastssl.augment.draws import ColourDraws, ColourParams
from fastssl.batch import ImageBatch, masked_patches
from fastssl.recipes import BYOL_JITTER, RECIPES
from fastssl.views import Crop, PatchCrop, Photometric, View, ViewSpec
from loaders.errors import DataError
from loaders.geometry import Geometry

PER = 512
"""Views that milliseconds are given for."""
SOURCE = 375, 500
"""Height and width of every image: ImageNet's most frequent size."""
SIZE, SCALE = 224, (0.25, 1.0)
"""Pixels of the crops of the single operations, and the share of the image that their boxes have."""
SEED = 0

Stage = Literal["cut", "colour", "finish"]
"""Crop, resize and flip; colours and blur; uint8 -> normalised floats."""
Run = Callable[[], object]
"""One batch of work; on CUDA it may return before the device is done."""


@dataclass(frozen=True)
class Task:
    """One row of the table.  Operations have the names that `parity` gives them."""

    name: str
    spec: ViewSpec
    stages: tuple[Stage, ...]

    @property
    def is_recipe(self) -> bool:
        """Everything, from decoded images on; otherwise two views of one operation."""
        return len(self.stages) == 3

    @property
    def base(self) -> ViewSpec:
        """The same views without colours."""
        return tuple(replace(view, photometric=Photometric(mean=view.photometric.mean, std=view.photometric.std)) for view in self.spec)


def operations(size: int = SIZE) -> list[Task]:
    """Each operation on two views per image, always applied, its parameters drawn per image and view; strengths of BYOL's recipe."""
    crop = Crop(size=size, scale=SCALE)
    b = BYOL_JITTER
    colours = {
        "brightness": Photometric(jitter=1.0, brightness=b.brightness),
        "contrast": Photometric(jitter=1.0, contrast=b.contrast),
        "saturation": Photometric(jitter=1.0, saturation=b.saturation),
        "hue": Photometric(jitter=1.0, hue=b.hue),
        "jitter": replace(b, jitter=1.0, grey=0.0),
        "grey": Photometric(grey=1.0),
        "blur": Photometric(blur=1.0),
        "solarise": Photometric(solarize=1.0),
    }
    return [
        *(Task(f"crop {i}", (View(crop=replace(crop, interpolation=i)),) * 2, ("cut",)) for i in ("bilinear", "bicubic")),
        *(Task(name, (View(crop=crop, photometric=photo),) * 2, ("colour",)) for name, photo in colours.items()),
        Task("normalise", (View(crop=crop),) * 2, ("finish",)),
    ]


def recipes(names: tuple[str, ...]) -> list[Task]:
    """DataError for a name that is no recipe."""
    for name in names:
        if name not in RECIPES:
            raise DataError(f"There is no recipe '{name}'. Known: {', '.join(RECIPES)}.")
    return [Task(name, RECIPES[name](), ("cut", "colour", "finish")) for name in names]


@dataclass(frozen=True)
class Material:
    """Random images and one draw of everything for a spec; equal for all who are measured."""

    spec: ViewSpec
    batch: ImageBatch
    params: ColourParams
    """Where the batch is."""

    @property
    def device(self) -> torch.device:
        return self.batch.pixels.device

    def sources(self) -> Tensor:
        """uint8 [B, 3, H, W]: the images, planar as other libraries want them."""
        return self.batch.pixels.view(len(self.batch), *SOURCE, 3).permute(0, 3, 1, 2).contiguous()

    def crops(self) -> Tensor:
        """uint8 [V, B, 3, s, s]: crops that are ready, for operations alone (views of one size)."""
        size = self.spec[0].crop.size
        generator = torch.Generator(self.device).manual_seed(SEED + 1)
        shape = (len(self.spec), len(self.batch), 3, size, size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device, generator=generator)

    def source_bytes(self) -> int:
        return self.batch.pixels.numel()

    def first(self, images: int) -> Material:
        """The first so many images."""
        b, n = self.batch, min(images, len(self.batch))
        rows = {name: getattr(b, name)[:n] for name in ("offset", "height", "width", "pitch", "index", "boxes", "flips")}
        params = ColourParams(**{name: value[:, :n] for name, value in vars(self.params).items()})
        return Material(self.spec, replace(b, pixels=b.pixels[: n * 3 * SOURCE[0] * SOURCE[1]], **rows), params)


def material(spec: ViewSpec, images: int, device: torch.device) -> Material:
    """`images` random images with boxes, flips and masks drawn as the loaders draw them."""
    height, width = SOURCE
    generator = torch.Generator(device).manual_seed(SEED)
    pixels = torch.randint(0, 256, (images * height * width * 3,), dtype=torch.uint8, device=device, generator=generator)
    sides = [np.full(images, side, np.int32) for side in SOURCE]
    geometry = Geometry(spec, SEED)
    boxes, flips = geometry.draw(np.arange(images), 0, *sides)
    masks = geometry.draw_masks(np.arange(images), 0)

    def same(value: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full((images,), value, dtype=dtype, device=device)

    index = torch.arange(images, device=device)
    batch = ImageBatch(
        pixels=pixels,
        offset=index * (height * width * 3),
        height=same(height),
        width=same(width),
        pitch=same(3 * width),
        index=index,
        key=index,
        label=None,
        boxes=torch.from_numpy(boxes).to(device),
        flips=torch.from_numpy(flips).to(device),
        epoch=0,
        step=0,
        masks=None if masks is None else torch.from_numpy(masks).to(device),
        masked=None if masks is None else torch.from_numpy(masked_patches(masks)).to(device),
        max_hw=SOURCE,
    )
    return Material(spec, batch, ColourDraws(spec, device=device, seed=SEED)(0, index))


def has_patches(spec: ViewSpec) -> bool:
    return any(isinstance(view.crop, PatchCrop) for view in spec)
