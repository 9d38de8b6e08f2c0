"""The images of a tree of class folders: files, labels and classes in the order of torchvision's ImageFolder.  No torch here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loaders.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Lower-case endings of the files that count as images; the case in a file's name does not matter."""


def scan(root: Path, classes: Sequence[str] | None = None) -> tuple[list[str], np.ndarray, list[str]]:
    """Image files below the class folders of `root` (paths relative to it), labels int64 [N], class names; in ImageFolder's
    order, without hidden files.  `classes`: names whose positions are the labels (those of the training set); default: its own.

    Raises DataError without class folders, for a class folder without images, or for one that is not among `classes`.
    """
    try:
        own = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{root} cannot be read ({error.strerror}). Give a folder that holds one folder of images per class.") from error
    if not own:
        raise DataError(f"{root} holds no class folders. Give a folder that holds one folder of images per class.")
    classes = list(own if classes is None else classes)
    if strange := sorted(set(own) - set(classes)):
        raise DataError(
            f"{root} has class folders that the training set has not ({', '.join(strange[:5])}). Give both splits the same class folders."
        )
    index = {name: label for label, name in enumerate(classes)}
    files: list[str] = []
    labels: list[int] = []
    for name in own:
        before = len(files)
        for folder, _, found in sorted(os.walk(root / name, followlinks=True)):
            images = [f for f in sorted(found) if f.lower().endswith(EXTENSIONS) and not f.startswith(".")]
            files += [os.path.relpath(os.path.join(folder, f), root) for f in images]
        if len(files) == before:
            raise DataError(
                f"The class folder {root / name} holds no images ({' '.join(EXTENSIONS)}). Remove the folder, or put the images of the "
                "class there."
            )
        labels += [index[name]] * (len(files) - before)
    return files, np.array(labels, np.int64), classes
