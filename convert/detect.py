"""From --source to the splits it holds, whatever form they are in."""

from __future__ import annotations

import os
from pathlib import Path

from convert.binaries import CIFAR, STL10, cifar, stl10
from convert.progress import note
from convert.sources import SPLITS, Source, from_class_folders, from_flat_folder, images_of
from convert.tars import TRAIN_TAR, VAL_TAR, imagenet_train, imagenet_val, webdataset
from loaders.class_folders import check_split
from loaders.errors import DataError

UNDERSTOOD = (
    "Understood are: train/ and val/ with one folder of images per class, or class folders alone; ImageNet's "
    f"{TRAIN_TAR} and {VAL_TAR} as downloaded; {STL10}/; {' or '.join(CIFAR)} (folder or .tar.gz); WebDataset shards (*.tar); "
    "and a flat folder of images, which has no labels."
)


def detect(path: Path) -> list[Source]:
    """The splits of `path`, in the order of SPLITS.  Raises DataError for what it does not understand or may not read, or what is
    incomplete."""
    try:
        return sorted(_found(path), key=lambda s: SPLITS.index(s.split))
    except OSError as e:
        raise DataError(
            f"{e.filename or path} cannot be read: {e.strerror or e}. Give yourself the right to read it, or another --source."
        ) from e


def _found(path: Path) -> list[Source]:
    if path.is_file():
        if path.suffix in (".gz", ".tgz"):
            return cifar(path)
        raise DataError(f"{path} is a file of unknown kind. {UNDERSTOOD} Give the folder that holds one of these.")
    if not path.is_dir():
        raise DataError(f"There is no folder {path}. Give the folder that holds the images. {UNDERSTOOD}")
    os.scandir(path).close()  # an error names it, not what is looked for in it
    return _imagenet(path) or _binaries(path) or _cifar(path) or _folder(path)


def _imagenet(path: Path) -> list[Source]:
    """train/ or the training tar, and val/ or the validation tar.  Folders win over tars, which are then what they came from."""
    train, val = path / "train", path / "val"
    train_tar, val_tar = (path / TRAIN_TAR).is_file(), (path / VAL_TAR).is_file()
    if not any((train.is_dir(), val.is_dir(), train_tar, val_tar)):
        return []
    for folder in filter(Path.is_dir, (train, val)):
        check_split(folder)
    if val.is_dir() and not (train.is_dir() or train_tar):
        raise DataError(f"{path} has val/ but no train/. Put the training images into {train}, one folder per class, and convert again.")
    sources = []
    if train.is_dir():
        sources.append(from_class_folders(train, "train"))
    elif train_tar:
        sources.append(imagenet_train(path))
    classes = sources[0].classes if sources else None
    if val.is_dir():
        sources.append(from_class_folders(val, "val", classes))
    elif val_tar:
        sources.append(imagenet_val(path, classes))
    for folder, tar in ((train, TRAIN_TAR), (val, VAL_TAR)):
        if folder.is_dir() and (path / tar).is_file():
            note(f"{path} has {folder.name}/ and {tar}: the folder is converted.")
    return sources


def _binaries(path: Path) -> list[Source]:
    for folder in (path, path / STL10):
        if any((folder / f"{part}_X.bin").is_file() for part in ("train", "test", "unlabeled")):
            return stl10(folder)
    return []


def _cifar(path: Path) -> list[Source]:
    if path.name in CIFAR:
        return cifar(path)
    # An archive next to the folder it was unpacked to is the same data set.
    candidates = [[p for p in (path / folder, path / archive) if p.exists()] for folder, archive in CIFAR.items()]
    found = [there[0] for there in candidates if there]
    if len(found) > 1:
        raise DataError(f"{path} holds both CIFAR-10 and CIFAR-100. Say which with --source {found[0]} or --source {found[1]}.")
    return cifar(found[0]) if found else []


def _folder(path: Path) -> list[Source]:
    """Class folders, shards or images, whichever lie in `path` itself."""
    entries = [e for e in os.scandir(path) if not e.name.startswith(".")]
    images = images_of(path)
    if any(e.is_dir() for e in entries):
        source = from_class_folders(path, "train")
        note(f"{path} has no train/ and val/: its {len(source.classes):,} folders are taken as the classes of a training set.")
        if images:
            note(f"{len(images):,} images that lie next to the class folders of {path} have no class and are left out.")
        return [source]
    if any(e.name.endswith(".tar") for e in entries):
        return webdataset(path)
    if images:
        note(f"{path} has no class folders: its {len(images):,} images are taken as a training set without labels.")
        return [from_flat_folder(path)]
    raise DataError(f"{path} holds nothing that can be converted. {UNDERSTOOD} Give the folder that holds one of these.")
