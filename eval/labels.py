"""Whether a training and a validation set can train and measure a classifier: their labels, and that they are apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from loaders.errors import DataError


class Labelled(Protocol):
    ids: np.ndarray
    """int [n]: sample ids."""
    labels: np.ndarray | None
    """int [n]."""
    classes: Sequence[str] | None


def checked_classes(train: Labelled, val: Labelled, path: str) -> int:
    """The number of classes of both.  DataError for unlabelled sets, labels out of range, classes that differ or are empty."""
    for split, loader in (("training", train), ("validation", val)):
        if loader.labels is None:
            raise DataError(f"The {split} images of {path} have no labels, and classifiers need them. Give labelled data with --data.")
    count = int(np.max(train.labels)) + 1 if train.classes is None else len(train.classes)
    names = train.classes or [str(c) for c in range(count)]
    check_labels(train, count, f"The training labels of {path}")
    empty = np.flatnonzero(np.bincount(train.labels, minlength=count) == 0)
    if len(empty):
        raise DataError(
            f"{len(empty)} of the {count} classes of {path} have no training image, {names[empty[0]]} first: a classifier cannot learn "
            f"them. Choose another --subset, or take the class out of the data."
        )
    check_same_classes(train.classes, val.classes, path)
    check_labels(val, count, f"The validation labels of {path}")
    return count


def check_labels(loader: Labelled, count: int, what: str) -> None:
    lowest, highest = int(np.min(loader.labels)), int(np.max(loader.labels))
    if lowest < 0 or highest >= count:
        raise DataError(f"{what} run from {lowest} to {highest}, and the classes are 0 to {count - 1}. Convert the data again.")


def check_same_classes(ours: Sequence[str] | None, theirs: Sequence[str] | None, path: str) -> None:
    """DataError where both are named and the names differ."""
    if ours is None or theirs is None or list(ours) == list(theirs):
        return
    different = next((f"number {c} is {a} and {b}" for c, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), "one has more")
    raise DataError(
        f"The classes to learn and the classes to measure in {path} differ ({len(ours)} and {len(theirs)} names; {different}), so equal "
        f"labels do not mean the same. Make both from class folders of the same names."
    )


def check_apart(train: Labelled, queries: Labelled) -> None:
    """DataError for images that are in two parts of one split, what is learned from and what is classified."""
    if common := len(np.intersect1d(train.ids, queries.ids)):
        raise DataError(
            f"{common} of the images to classify (--queries) are also among those to learn from (--subset): they would find themselves. "
            f"Take parts that have none in common, such as first:260 and after:260."
        )
