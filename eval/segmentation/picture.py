"""Predictions beside their images and labels, for people.  White: pixels that do not count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from eval.segmentation.training import Segmentation
from fastssl.files import whole
from fastssl.pictures import CAPTION, GAP, MARGIN

HEIGHT = 160
"""Pixels of a picture."""
OPACITY = 0.75
"""Of the colours over the image."""
CHARACTER = 7.0
"""Pixels that a character of a caption takes at most on average."""


def colours(count: int = 256) -> np.ndarray:
    """uint8 [count, 3]: PASCAL VOC's colour of each class number, its bits dealt out to red, green and blue in turn."""
    numbers = np.arange(count)[:, None]
    out = np.zeros((count, 3), np.int64)
    for bit in range(8):
        out |= ((numbers >> (3 * bit + np.arange(3))) & 1) << (7 - bit)
    return out.astype(np.uint8)


def draw(path: Path, run: Segmentation, count: int = 6) -> None:
    """The first validation images: as they are, annotated, and as the model sees them.  The model is in eval mode."""
    numbers, rows = range(min(count, len(run.data.val))), []
    for number, (image, label, found) in zip(numbers, run.predicted(numbers), strict=True):
        void = label == run.data.ignore
        maps = [np.where(void, 0, m) for m in (label, found.cpu().numpy())]
        size = round(image.width * HEIGHT / image.height), HEIGHT
        pictures = [p.resize(size, Image.Resampling.BILINEAR) for p in (image, *(_coloured(image, m, void) for m in maps))]
        rows.append((run.data.val[number].image.name, [_named(m, run.data.names) for m in maps], pictures))
    page_width = 2 * MARGIN + max(3 * pictures[0].width + 2 * GAP for *_, pictures in rows)
    page = Image.new("RGB", (page_width, 2 * MARGIN + len(rows) * (HEIGHT + CAPTION + GAP) - GAP), "white")
    drawing, font = ImageDraw.Draw(page), ImageFont.load_default(size=12)
    for i, (name, classes, pictures) in enumerate(rows):
        top = MARGIN + i * (HEIGHT + CAPTION + GAP)
        captions = (name, f"label: {classes[0]}", f"found: {classes[1]}")
        for column, (caption, picture) in enumerate(zip(captions, pictures, strict=True)):
            left = MARGIN + column * (picture.width + GAP)
            drawing.text((left, top), caption[: round(picture.width / CHARACTER)], fill="black", font=font)
            page.paste(picture, (left, top + CAPTION))
    whole(path, lambda partial: page.save(partial, format="PNG"))


def _named(label: np.ndarray, names: tuple[str, ...] | None) -> str:
    """The classes of a map, largest first, without class 0."""
    numbers, pixels = np.unique(label[label > 0], return_counts=True)
    return ", ".join(names[n] if names else str(n) for n in numbers[np.argsort(-pixels)]) or "-"


def _coloured(image: Image.Image, label: np.ndarray, void: np.ndarray) -> Image.Image:
    """The image under the colours of its classes; class 0 keeps the image, void becomes white."""
    pixels = np.asarray(image).astype(np.float64)
    weight = OPACITY * (label > 0)[..., None]
    out = (1 - weight) * pixels + weight * colours(1024)[label]
    return Image.fromarray(np.where(void[..., None], 255, out).astype(np.uint8))
