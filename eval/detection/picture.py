"""A sheet of validation images, each twice: what was annotated, and what the detector found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as rle

from eval.detection.annotations import DetectionSet, Object, Photo
from eval.detection.data import decode
from eval.detection.results import Found
from fastssl.files import whole
from fastssl.pictures import CAPTION, COLOURS, GAP, MARGIN

IMAGES, HEIGHT, WIDEST = 6, 280, 420
"""Photos on the sheet, and pixels of each."""
SHOWN, LOWEST = 15, 0.3
"""Of the detections in one image: at most so many, with at least this score."""
FONT, OPACITY = 11, 0.45

Mark = tuple[np.ndarray, int, str, "np.ndarray | None"]
"""Box in source pixels, class, caption, bool mask [H, W]."""


def draw(path: Path, data: DetectionSet, found: Sequence[Found], *, title: str) -> None:
    """Photos with objects, spread evenly over the set.  One colour for each class."""
    with_objects = [i for i, p in enumerate(data.photos) if p.objects] or range(len(data.photos))
    chosen = [with_objects[i] for i in np.unique(np.linspace(0, len(with_objects) - 1, IMAGES).round().astype(int))]
    row = CAPTION + HEIGHT + GAP
    page = Image.new("RGB", (2 * MARGIN + 2 * WIDEST + GAP, 2 * MARGIN + CAPTION + len(chosen) * row), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=FONT)
    pen.text((MARGIN, MARGIN), title, fill="black", font=font)
    for line, i in enumerate(chosen):
        photo, top = data.photos[i], MARGIN + CAPTION + line * row
        image, marks = decode(photo), list(_found(found[i], data))
        caption = f"found, score {LOWEST} and more: {len(marks)}" + (f", the best {SHOWN} are shown" if len(marks) > SHOWN else "")
        for column, (words, drawn) in enumerate(((f"{photo.name}: annotated", _annotated(photo, data)), (caption, marks[:SHOWN]))):
            left = MARGIN + column * (WIDEST + GAP)
            pen.text((left, top), words, fill="#555555", font=font)
            page.paste(_marked(image, drawn, font), (left, top + CAPTION))
    whole(path, lambda partial: page.save(partial, format="PNG"))


def _annotated(photo: Photo, data: DetectionSet) -> Iterable[Mark]:
    for o in photo.objects:
        yield o.box, o.label, data.classes[o.label], _bitmap(o, photo)


def _bitmap(o: Object, photo: Photo) -> np.ndarray | None:
    if not o.mask:
        return None
    if isinstance(o.mask, dict):
        return rle.decode(o.mask).astype(bool)
    polygons = rle.frPyObjects([p.tolist() for p in o.mask], photo.height, photo.width)
    return rle.decode(rle.merge(polygons)).astype(bool)


def _found(found: Found, data: DetectionSet) -> Iterable[Mark]:
    for i in np.flatnonzero(found.scores >= LOWEST):
        mask = None if found.masks is None else rle.decode(found.masks[i]).astype(bool)
        label = int(found.labels[i])
        yield found.boxes[i], label, f"{data.classes[label]} {found.scores[i]:.2f}", mask


def _marked(image: Image.Image, marks: Iterable[Mark], font: ImageFont.ImageFont) -> Image.Image:
    scale = min(HEIGHT / image.height, WIDEST / image.width)
    size = round(scale * image.width), round(scale * image.height)
    out, marks = image.resize(size, Image.Resampling.BICUBIC), list(marks)[::-1]  # the best on top
    for _, label, _, mask in marks:
        if mask is not None:
            colour = Image.new("RGB", size, COLOURS[label % len(COLOURS)])
            out.paste(colour, mask=Image.fromarray(mask).resize(size).convert("L").point(lambda level: level * OPACITY))
    pen = ImageDraw.Draw(out)
    for box, label, caption, _ in marks:
        colour = COLOURS[label % len(COLOURS)]
        x0, y0, x1, y1 = (float(v) for v in np.clip(scale * box, 0, (size[0] - 1, size[1] - 1) * 2))
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=2)
        behind = pen.textbbox((x0 + 2, y0), caption, font=font)
        pen.rectangle(behind, fill=colour)
        pen.text((x0 + 2, y0), caption, fill="white", font=font)
    return out
