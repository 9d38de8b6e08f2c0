"""Small data sets for segmentation: blobs of one colour per class on grey."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array([(90, 90, 90), (220, 40, 40), (40, 220, 40), (40, 40, 220)], np.uint8)
"""Of classes 0 to 3."""


def picture(rng: np.random.Generator, height: int = 44, width: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [h, w, 3] and classes [h, w]: two rectangles, and a border that does not count."""
    label = np.zeros((height, width), np.uint8)
    for number in rng.permutation(3)[:2] + 1:
        top, left = rng.integers(height // 2), rng.integers(width // 2)
        label[top : top + height // 2, left : left + width // 2] = number
    image = COLOURS[label]
    label[:2] = 255
    return image, label


def write_voc(root: Path, train: int = 6, val: int = 3) -> Path:
    """A folder like VOC2012."""
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        names = [f"{split}{i}" for i in range(count)]
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            image, label = picture(rng)
            Image.fromarray(image).save(root / f"JPEGImages/{name}.jpg", quality=95)
            palette = Image.fromarray(label).convert("P")
            palette.putdata(label.flatten())
            palette.save(root / f"SegmentationClass/{name}.png")
    return root


def write_imagenets(root: Path, classes: int = 3) -> Path:
    """A folder like ImageNetS919: two training images and one validation image per class."""
    rng = np.random.default_rng(0)
    for split, count in (("train-semi", 2), ("validation", 1)):
        for c in range(classes):
            for folder in (split, f"{split}-segmentation"):
                (root / folder / f"n{c}").mkdir(parents=True)
            for i in range(count):
                image, label = picture(rng)
                ids = np.where(label == 255, 1000, label.astype(np.int64))
                coded = np.stack([ids % 256, ids // 256, 0 * ids], axis=-1).astype(np.uint8)
                Image.fromarray(image).save(root / split / f"n{c}" / f"{i}.JPEG", quality=95)
                Image.fromarray(coded).save(root / f"{split}-segmentation" / f"n{c}" / f"{i}.png")
    return root
