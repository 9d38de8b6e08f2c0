"""What is converted: a `Source` is one split, whatever its images lie in; class folders and flat folders are here.

Items say where an image's bytes are in a form that costs little to send to a worker process: a path, a range of bytes in a
tar, or, for data sets of bare pixels, the pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np

from loaders import class_folders
from loaders.errors import DataError

Split = Literal["train", "val", "unlabeled"]
SPLITS: tuple[Split, ...] = ("train", "val", "unlabeled")


class Span(NamedTuple):
    """Bytes of a file that holds many images."""

    path: str
    offset: int
    size: int


class Items(Protocol):
    """N images by position: a path, a Span, or pixels uint8 [H, W, 3]."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> str | Span | np.ndarray: ...

    def take(self, ids: np.ndarray) -> Items:
        """Those of the positions int64 [M], in that order."""


@dataclass(frozen=True)
class Files:
    """Image files below a folder."""

    folder: Path
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> str:
        return os.path.join(self.folder, self.names[i])

    def take(self, ids: np.ndarray) -> Files:
        return Files(self.folder, [self.names[i] for i in ids])


@dataclass(frozen=True, eq=False)
class Spans:
    """Image files inside of uncompressed tars."""

    paths: Sequence[Path]
    file: np.ndarray
    """int32 [N], which of `paths`."""
    offset: np.ndarray
    """int64 [N], first byte in that file."""
    size: np.ndarray
    """int64 [N], bytes."""

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, i: int) -> Span:
        return Span(str(self.paths[self.file[i]]), int(self.offset[i]), int(self.size[i]))

    def take(self, ids: np.ndarray) -> Spans:
        return Spans(self.paths, self.file[ids], self.offset[ids], self.size[ids])


@dataclass(frozen=True, eq=False)
class Pixels:
    """Bare pixels, in memory or in a mapped file."""

    images: np.ndarray
    """uint8 [M, H, W, 3]."""
    ids: np.ndarray
    """int64 [N], which of `images`."""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.ascontiguousarray(self.images[self.ids[i]])

    def take(self, ids: np.ndarray) -> Pixels:
        return Pixels(self.images, self.ids[ids])


@dataclass(frozen=True, eq=False)
class Source:
    """One split with its N images."""

    split: Split
    """What it becomes: SPLIT.beton."""
    origin: Path
    """What was given as --source, or its train/ or val/ class folders; the sidecar's `source`."""
    items: Items
    names: list[str]
    """Of each image, below `origin`."""
    labels: np.ndarray | None
    """int64 [N]."""
    classes: list[str] | None
    """Class names by label, where the source has names."""

    def __len__(self) -> int:
        return len(self.names)

    def __str__(self) -> str:
        kinds = "without labels" if self.labels is None else f"of {len(np.unique(self.labels)):,} classes"
        return f"{self.origin}: {len(self):,} images {kinds} for {self.split}"

    def class_name(self, label: int) -> str:
        return str(label) if self.classes is None else self.classes[label]


def from_class_folders(folder: Path, split: Split, classes: Sequence[str] | None = None) -> Source:
    """A tree of class folders.  `classes`: the classes whose positions are the labels (the training set's); default: its own.

    Raises DataError where there are no class folders, a class is empty, or a class is not among `classes`.
    """
    names, labels, classes = class_folders.scan(folder, classes)
    return Source(split, folder, Files(folder, names), names, labels, classes)


def images_of(folder: Path) -> list[str]:
    """Names of the image files that lie in `folder` itself, sorted."""
    return sorted(e.name for e in os.scandir(folder) if is_image(e.name) and e.is_file())


def is_image(name: str) -> bool:
    """Whether a file of that name counts as an image, as in class folders."""
    base = name.rpartition("/")[2]
    return base.lower().endswith(class_folders.EXTENSIONS) and not base.startswith(".")


def from_flat_folder(folder: Path) -> Source:
    """Images side by side, without labels."""
    names = images_of(folder)
    return Source("train", folder, Files(folder, names), names, None, None)


# ------------------------------------------------------------------------------------------------ subsets of the classes


def chosen_classes(sources: Sequence[Source], chosen: str) -> list[str]:
    """Sorted names of the classes that --classes means: a number N for the first N by sorted name, or the path of a text file
    with one name per line.  Raises DataError for what the sources do not have."""
    known = _known(sources)
    # Classes without names are numbered, and 10 comes after 9.
    order = int if all(s.classes is None for s in sources) else str
    return _first(int(chosen), sorted(known, key=order)) if chosen.isdecimal() else sorted(_listed_in(Path(chosen), known), key=order)


def only_classes(sources: Sequence[Source], names: Sequence[str]) -> list[Source]:
    """Only these classes of every labelled source; labels become positions in `names`, in all splits."""
    known = _known(sources)
    if strange := [name for name in names if name not in known]:
        raise DataError(f"{sources[0].origin} lacks {len(strange)} of the chosen classes: {class_folders.listed(strange)}. Choose others.")
    return [s if s.labels is None else _subset(s, names, [known[name] for name in names]) for s in sources]


def _known(sources: Sequence[Source]) -> dict[str, int]:
    """Labels by class name."""
    labelled = [s for s in sources if s.labels is not None]
    if not labelled:
        raise DataError(f"{sources[0].origin} has no labels, so --classes cannot choose among its classes. Leave the option out.")
    return {s.class_name(label): label for s in labelled for label in range(_num_classes(s))}


def _num_classes(source: Source) -> int:
    return int(source.labels.max()) + 1 if source.classes is None else len(source.classes)


def _first(count: int, known: list[str]) -> list[str]:
    if not 0 < count <= len(known):
        raise DataError(f"There are {len(known):,} classes, of which --classes {count} cannot be taken. Give 1 to {len(known)}.")
    return known[:count]


def _listed_in(path: Path, known: dict[str, int]) -> set[str]:
    try:
        names = {line.strip() for line in path.read_text().splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(
            f"The classes cannot be read from {path} ({e}). Give --classes a number or a text file with a name per line."
        ) from e
    if not names:
        raise DataError(f"{path} lists no classes. Write one class name per line.")
    if strange := sorted(names - set(known)):
        raise DataError(
            f"{path} lists {len(strange)} classes that the source does not have: {class_folders.listed(strange)}. "
            f"Its classes are {class_folders.listed(sorted(known))}; correct the list."
        )
    return names


def _subset(source: Source, names: Sequence[str], labels: Sequence[int]) -> Source:
    position = np.full(max(int(source.labels.max()), *labels) + 1, -1)
    position[labels] = np.arange(len(labels))
    ids = np.flatnonzero(position[source.labels] >= 0)
    if len(ids) == 0:
        raise DataError(f"None of the {len(names)} chosen classes has an image in {source.origin} ({source.split}). Choose others.")
    return replace(
        source,
        items=source.items.take(ids),
        names=[source.names[i] for i in ids],
        labels=position[source.labels[ids]],
        classes=list(names),
    )
