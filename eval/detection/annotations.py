"""Annotated photographs, whatever format their annotations came in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from eval.detection.config import ObjectMask
from loaders.errors import DataError


@dataclass(frozen=True)
class Object:
    """One annotated object."""

    box: np.ndarray
    """float64 [4]: x0, y0, x1, y1 in continuous pixels, as annotated: it may be empty, or stick out of the image."""
    label: int
    """0..K-1."""
    mask: ObjectMask | None = None
    """Polygons with at least three corners, perhaps none, or compressed RLE; None where the format has no masks."""
    difficult: bool = False


@dataclass(frozen=True)
class Photo:
    name: str | int
    """COCO's image id, VOC's name."""
    path: Path
    height: int
    width: int
    """As EXIF turns it: annotations are of the upright image."""
    objects: list[Object]


@dataclass(frozen=True)
class DetectionSet:
    """One part of a data set."""

    photos: list[Photo]
    classes: list[str]
    category_ids: list[int]
    """COCO's id of each class."""
    dataset: dict | None = field(default=None, repr=False)
    """The content of COCO's annotation file, for its evaluator."""

    def learnable(self, *, masks: bool) -> list[Photo]:
        """The images with objects to learn from, without other objects: those whose box has an area, and with `masks` a mask."""
        photos = [replace(p, objects=[o for o in p.objects if _has_area(o.box, p) and (o.mask or not masks)]) for p in self.photos]
        return [p for p in photos if p.objects]


def _has_area(box: np.ndarray, photo: Photo) -> bool:
    """Inside the image."""
    low, high = box.reshape(2, 2).clip(0, (photo.width, photo.height))
    return bool((high > low).all())


def checked_box(box: Iterable[float], height: int, width: int, where: str) -> np.ndarray:
    """x0, y0, x1, y1 as float64 [4].  DataError for what cannot be a box of the image; an empty one passes, also on its border."""
    box = np.array(list(box), np.float64)
    if box.shape != (4,) or not np.isfinite(box).all() or (box[2:] < box[:2]).any():
        raise DataError(f"{where} has the box {box.tolist()}, which is not four finite numbers of a box. Correct the annotation.")
    if (box[:2] > (width, height)).any() or (box[2:] < 0).any():
        raise DataError(
            f"{where} has the box {box.tolist()} (x0, y0, x1, y1), which is outside its image of {width} x {height} pixels. Correct the "
            f"annotation, or the image's size."
        )
    return box


def check_images(photos: Iterable[Photo], annotations: Path) -> None:
    """DataError when image files are missing."""
    photos = list(photos)
    folders = {p.path.parent for p in photos}
    there = {folder: {f.name for f in folder.iterdir()} if folder.is_dir() else set() for folder in folders}
    missing = [p.path for p in photos if p.path.name not in there[p.path.parent]]
    if missing:
        raise DataError(
            f"{len(missing)} of the {len(photos)} images that {annotations} lists are missing, {missing[0]} first. Complete the images, or "
            f"take the annotations that belong to them."
        )
