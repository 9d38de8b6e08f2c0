"""Images with a class for every pixel: PASCAL VOC, ADE20K and ImageNet-S as they are distributed (methods/transfer.md, 7)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from loaders.errors import DataError
from loaders.images import open_image, to_rgb

Format = Literal["voc", "ade20k", "imagenets"]

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse"),
    *("motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
ADE20K_CLASSES = 150
VOID, OTHER_VOID = 255, 1000
"""Labels that count nowhere: of VOC and ADE20K, of ImageNet-S."""


class Pair(NamedTuple):
    image: Path
    label: Path


@dataclass(frozen=True)
class Annotated:
    """A data set for segmentation, its files known to be there."""

    train: Sequence[Pair]
    val: Sequence[Pair]
    classes: int
    ignore: int
    labels: Callable[[Image.Image], np.ndarray]
    """A label file's image -> int16 [h, w]; ValueError where it is of another kind."""
    names: tuple[str, ...] | None = None
    """Of the classes."""

    def read(self, pair: Pair) -> tuple[Image.Image, np.ndarray]:
        """RGB image and int16 [h, w], 0 .. classes - 1 and `ignore`.  DataError naming the file that is broken or does not fit."""
        image = _opened(pair.image, to_rgb)
        label = _opened(pair.label, self.labels)
        if label.shape != (image.height, image.width):
            raise DataError(
                f"{pair.label} is {label.shape[1]} x {label.shape[0]} pixels and {pair.image} is {image.width} x {image.height}: "
                f"they do not belong together. Replace one of them."
            )
        wrong = label[(label != self.ignore) & ((label < 0) | (label >= self.classes))]
        if wrong.size:
            raise DataError(
                f"{pair.label} has the label {wrong[0]}. Classes are 0 to {self.classes - 1}, and {self.ignore} where pixels do not "
                f"count. Replace the file, or leave it out."
            )
        return image, label


def open_annotated(path: str, form: Format) -> Annotated:
    """The data set at `path`.  DataError for what is missing, before anything is decoded but the first pairs of each split, up to one
    with a pixel that counts."""
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"There is no folder {root}. Give the data set's folder with --data.")
    data = {"voc": _voc, "ade20k": _ade20k, "imagenets": _imagenets}[form](root)
    for what, split in (("training", data.train), ("validation", data.val)):
        if not any((data.read(pair)[1] != data.ignore).any() for pair in split):
            raise DataError(f"No pixel of the labels for {what} in {root} counts: all are {data.ignore}. Complete the data set.")
    return data


def _opened(path: Path, as_: Callable):
    try:
        with open_image(path) as image:
            return as_(image)
    except Exception as error:
        raise DataError(f"{path} cannot be used ({error}). Replace the file, or leave it out.") from error


def _present(pairs: Sequence[Pair], what: str) -> Sequence[Pair]:
    """DataError unless there are pairs, and all files of them."""
    if not pairs:
        raise DataError(f"There are no images for {what}. Complete the data set, or give another folder with --data.")
    listed = {folder: set(os.listdir(folder)) if folder.is_dir() else set() for folder in {p.parent for pair in pairs for p in pair}}
    missing = [p for pair in pairs for p in pair if p.name not in listed[p.parent]]
    if missing:
        raise DataError(f"{len(missing)} files for {what} are missing, {missing[0]} first. Complete the data set.")
    return pairs


# ------------------------------------------------------------------------------------------------ PASCAL VOC


def _voc(root: Path) -> Annotated:
    """VOC2012, with SBD's annotations (SegmentationClassAug, aug.txt) where they are."""
    root = next((r for r in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012") if (r / "ImageSets").is_dir()), root)
    lists = root / "ImageSets" / "Segmentation"
    train = _voc_pairs(root, lists / "train.txt", "SegmentationClass")
    if (lists / "aug.txt").exists():
        known = {pair.image for pair in train}
        train += [pair for pair in _voc_pairs(root, lists / "aug.txt", "SegmentationClassAug") if pair.image not in known]
    val = _voc_pairs(root, lists / "val.txt", "SegmentationClass")
    return Annotated(_present(train, "training"), _present(val, "validation"), len(VOC_CLASSES), VOID, _indices, VOC_CLASSES)


def _voc_pairs(root: Path, names: Path, labels: str) -> list[Pair]:
    if not names.is_file():
        raise DataError(f"There is no {names}. Give VOCdevkit/VOC2012, with JPEGImages, SegmentationClass and ImageSets, with --data.")
    ids = names.read_text().split()
    return [Pair(root / "JPEGImages" / f"{i}.jpg", root / labels / f"{i}.png") for i in ids]


def _indices(image: Image.Image) -> np.ndarray:
    if image.mode not in ("P", "L"):
        raise ValueError(f"its pixels are {image.mode}, and labels are the numbers of a palette or grey levels")
    return np.asarray(image).astype(np.int16)


# ------------------------------------------------------------------------------------------------ ADE20K


def _ade20k(root: Path) -> Annotated:
    """ADEChallengeData2016: images and annotations, each with training and validation."""
    parts = {}
    for split in ("training", "validation"):
        images, labels = root / "images" / split, root / "annotations" / split
        if not images.is_dir():
            raise DataError(f"There is no {images}. Give ADEChallengeData2016, with images and annotations, with --data.")
        pairs = [Pair(p, labels / f"{p.stem}.png") for p in sorted(images.glob("*.jpg"))]
        parts[split] = _present(pairs, split)
    return Annotated(parts["training"], parts["validation"], ADE20K_CLASSES, VOID, _without_zero)


def _without_zero(image: Image.Image) -> np.ndarray:
    """0, which stands for none of the classes 1 .. 150, counts nowhere."""
    label = _indices(image)
    return np.where(label == 0, VOID, label - 1).astype(np.int16)


# ------------------------------------------------------------------------------------------------ ImageNet-S


def _imagenets(root: Path) -> Annotated:
    """train-semi and validation with a folder of images per class, and their labels in train-semi-segmentation, validation-segmentation.

    Class 0 is what is none of the others; the others are the folders in their order.
    """
    parts = {}
    for split in ("train-semi", "validation"):
        images, labels = root / split, root / f"{split}-segmentation"
        if not images.is_dir():
            raise DataError(f"There is no {images}. Give ImageNetS919 (or 300, or 50), with {split} and {labels.name}, with --data.")
        pairs = [Pair(p, labels / p.parent.name / f"{p.stem}.png") for p in sorted(images.glob("*/*"))]
        parts[split] = _present(pairs, split)
    names = ("other", *sorted(p.name for p in (root / "train-semi").iterdir() if p.is_dir()))
    return Annotated(parts["train-semi"], parts["validation"], len(names), OTHER_VOID, class_numbers, names)


def class_numbers(image: Image.Image) -> np.ndarray:
    """ImageNet-S's labels: red + 256 green."""
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError(f"its pixels are {image.mode}, and labels are coded in red and green")
    red, green = np.asarray(image)[..., 0].astype(np.int16), np.asarray(image)[..., 1].astype(np.int16)
    return red + 256 * green
