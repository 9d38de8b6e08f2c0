"""The images of a tree of class folders: files, labels and classes in the order of torchvision's ImageFolder.  No torch here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np

from loaders.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Lower-case endings of the files that count as images, torchvision's list; the case in a file's name does not matter."""

SPLITS = ("train", "val", "test")
"""Folders beside each other that are no classes."""


def scan(root: Path, classes: Sequence[str] | None = None) -> tuple[list[str], np.ndarray, list[str]]:
    """Image files below the class folders of `root` (paths relative to it), labels int64 [N], class names; in ImageFolder's
    order, without hidden files.  `classes`: names whose positions are the labels (those of the training set); default: its own.

    Raises DataError without class folders, for a class folder without images, for one that is not among `classes`, or for a folder
    that cannot be read.
    """
    if not root.is_dir():
        raise DataError(f"There is no folder {root}. Give the folder that holds train/ and val/ with one folder of images per class.")
    try:
        entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
        own = sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        _unreadable(error)
    if not own:
        stray = sum(_is_image(entry.name) for entry in entries)
        raise DataError(
            f"{root} holds {f'{stray:,} images but ' if stray else ''}no class folders. Move each image into a folder named after its "
            "class (ImageNet: unpack the training tars into one folder each, and sort val/ into class folders), then try again."
        )
    classes = list(own if classes is None else classes)
    if strange := sorted(set(own) - set(classes)):
        raise DataError(
            f"{root} has {len(strange)} class folders that the training set has not: {listed(strange)}. Give both splits the same class "
            "folders, then try again."
        )
    walked = (walk for name in own for walk in os.walk(root / name, onerror=_unreadable, followlinks=True))
    folders = [(os.path.relpath(folder, root), names) for folder, _, names in walked]
    files, labels = listing(folders, classes)
    filled = {classes[label] for label in np.unique(labels)}
    if empty := [name for name in own if name not in filled]:
        raise DataError(
            f"{len(empty)} class folders of {root} hold no images ({', '.join(e[1:] for e in EXTENSIONS)}): {listed(empty)}. "
            "Fill or remove them, then try again."
        )
    return files, labels, classes


def check_split(folder: Path) -> None:
    """Raise DataError where DIR/train or DIR/val may be a split without labels or one class of DIR among others: it holds images
    itself, and so do folders beside it."""
    if not any(_is_image(entry.name) for entry in os.scandir(folder)):
        return
    beside = sorted(e.name for e in os.scandir(folder.parent) if e.is_dir() and not e.name.startswith(".") and e.name not in SPLITS)
    if classes := [
        name for name in beside if any(_is_image(f) for walk in os.walk(folder.parent / name, followlinks=True) for f in walk[2])
    ]:
        raise DataError(
            f"{folder} may be a split without labels, or a class like {listed(classes)} beside it: all of them hold images. If it is a "
            f"split, move the others out of {folder.parent}, or pass {folder} itself; if it is a class, move all class folders into one "
            f"folder, {folder.parent / 'train'} ({folder.parent / 'train' / folder.name}, ...), then try again."
        )


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _unreadable(error: OSError) -> NoReturn:
    """os.walk would leave such a folder out without a word."""
    raise DataError(
        f"{error.filename} cannot be read: {error.strerror}. Its images would be missing: correct its permissions or check the disk, or "
        "remove it, then try again."
    ) from error


def listing(folders: Iterable[tuple[str, Sequence[str]]], classes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Images of a tree in ImageFolder's order, and their labels int64 [N].

    folders: path below the root and names of its files, in any order; the first part of the path is the class.  Classes by
    name; in a class its own files before those of its subfolders; everything by code points, so that 10.jpg precedes 9.jpg.
    """
    index = {name: label for label, name in enumerate(classes)}
    files: list[str] = []
    labels: list[int] = []
    for folder, names in sorted(folders, key=lambda f: (f[0].partition("/")[0], f[0])):
        images = [f for f in sorted(names) if _is_image(f)]
        files += [f"{folder}/{f}" for f in images]
        labels += [index[folder.partition("/")[0]]] * len(images)
    return files, np.array(labels, np.int64)


def listed(items: Sequence[str], at_most: int = 5) -> str:
    return ", ".join(items[:at_most]) + (f" and {len(items) - at_most} more" if len(items) > at_most else "")
