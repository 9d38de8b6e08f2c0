"""PASCAL VOC's annotation files (methods/transfer.md sections 4.2 and 7): DIR/VOC2007, DIR/VOC2012 or both in DIR/VOCdevkit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from eval.detection.annotations import DetectionSet, Object, Photo, check_images, checked_box
from loaders.errors import DataError

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike"),
    *("person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def read_voc(folder: Path, parts: Sequence[str]) -> DetectionSet:
    """parts: YEAR/LIST, as 2007/trainval.  Difficult objects are among the others.  DataError for annotations that cannot be used."""
    photos: list[Photo] = []
    for part in parts:
        year, _, name = part.partition("/")
        root = folder / "VOCdevkit" / f"VOC{year}" if (folder / "VOCdevkit").is_dir() else folder / f"VOC{year}"
        listed = root / "ImageSets" / "Main" / f"{name}.txt"
        if not listed.is_file():
            raise DataError(f"There is no {listed}. --data is the folder with VOCdevkit or with VOC{year} itself.")
        names = listed.read_text().split()
        if not names:
            raise DataError(f"{listed} names no image. Unpack VOC{year} again.")
        found = [_photo(root, image) for image in names]
        check_images(found, listed)
        photos += found
    return DetectionSet(photos, list(CLASSES), list(range(1, len(CLASSES) + 1)))


def _photo(root: Path, name: str) -> Photo:
    path = root / "Annotations" / f"{name}.xml"
    try:
        tree = ElementTree.parse(path)
        width, height = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))
        objects = [_object(o, height, width, path) for o in tree.iterfind("object")]
    except FileNotFoundError:
        raise DataError(f"There is no {path}, and its list names it. Unpack the annotations again.") from None
    except (ElementTree.ParseError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no annotation file of VOC's ({error}). Correct it, or unpack the annotations again.") from error
    return Photo(name, root / "JPEGImages" / f"{name}.jpg", height, width, objects)


def _object(node: ElementTree.Element, height: int, width: int, path: Path) -> Object:
    name = node.findtext("name")
    if name not in CLASSES:
        raise DataError(f"{path} has an object of the class '{name}', which VOC does not have. Its classes are {', '.join(CLASSES)}.")
    x0, y0, x1, y1 = (float(node.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    box = checked_box((x0 - 1, y0 - 1, x1, y1), height, width, f"An object of {path}")  # VOC counts pixels from 1, both ends inside
    return Object(box, CLASSES.index(name), difficult=node.findtext("difficult", "0") == "1")
