"""From a path to a decoder: which file or folder holds a split, and which back end decodes it."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Literal

from loaders.decoder import Decoder
from loaders.errors import DataError

Split = Literal["train", "val"]
Backend = Literal["auto", "ffcv", "torchvision", "folder"]
_log = logging.getLogger(__name__)


def open_decoder(path: str, split: Split, *, backend: Backend, workers: int, say: bool = True) -> Decoder:
    """The decoder of one split; `say`: log what `auto` chose."""
    found = find(Path(path), split, prefer_folder=backend == "folder")
    if backend == "auto":
        backend, why = _choose(found)
        if say:
            _say_once(f"Decoding {found} with {backend}{why}.")
    elif found.is_dir() and backend != "folder":
        raise DataError(
            f"The loader {backend} reads .beton files, and {found} is a tree of class folders. Convert it with: python -m convert.imagenet "
            f"--source {path} --out DIR, or choose --efficiency.loader folder."
        )
    elif not found.is_dir() and backend == "folder":
        raise DataError(f"The loader folder reads class folders, and {found} is a file. Choose --efficiency.loader auto.")

    # Imported when chosen: each pulls in a library that the others do not need.
    if backend == "ffcv":
        from loaders.ffcv import FFCVDecoder

        return FFCVDecoder(found, workers)
    if backend == "torchvision":
        from loaders.torchvision import TorchvisionDecoder

        return TorchvisionDecoder(found, workers)
    from loaders.class_folders import scan
    from loaders.folder import FolderDecoder

    # A validation set without some class must not renumber the others.
    training = found.parent / "train"
    classes = scan(training)[2] if split == "val" and training.is_dir() else None
    return FolderDecoder(found, workers, classes)


def _choose(found: Path) -> tuple[str, str]:
    if found.is_dir():
        return "folder", f"; a .beton decodes several times as fast: python -m convert.imagenet --source {found.parent} --out DIR"
    from loaders import ffcv

    problem = ffcv.load()
    return ("torchvision", f", because ffcv cannot be used: {problem} (`make setup`)") if problem else ("ffcv", "")


@functools.cache
def _say_once(message: str) -> None:
    _log.info(message)


# ------------------------------------------------------------------------------------------------ paths


def find(path: Path, split: Split, prefer_folder: bool = False) -> Path:
    """The .beton or class-folder tree that holds `split`.  Raises DataError, which names the conversion command."""
    out = path.parent if path.suffix == ".beton" else path
    convert = (
        "Convert ImageNet with `make convert-imagenet IMAGENET=DIR`, any class folders with: "
        f"python -m convert.imagenet --source DIR --out {out}"
    )
    if not path.exists():
        raise DataError(f"There is no data at {path}. {convert} (or pass another --data.path)")
    layout = [(path / f"{s}.beton", path / s) for s in ("train", "val")]
    beton, folder = layout[split == "val"]
    if path.is_dir():
        candidates = [p for p, there in ((beton, beton.is_file()), (folder, folder.is_dir())) if there]
        if candidates:
            return candidates[-1 if prefer_folder else 0]
        if any(p.exists() for pair in layout for p in pair):
            raise DataError(f"{path} has neither {beton.name} nor {folder.name}/. {convert}")
        if not any(entry.is_dir() for entry in os.scandir(path)):
            raise DataError(f"{path} holds no {beton.name} and no class folders. {convert}")
    if split == "val":
        raise DataError(
            f"{path} is one data set, which is taken for training; it has no validation part. Pass a folder that holds train.beton and "
            f"val.beton, or train/ and val/ class folders. {convert}"
        )
    return path


def has_split(path: str, split: Split) -> bool:
    """Whether `path` holds that split, for whoever can do without it."""
    try:
        find(Path(path), split)
    except DataError:
        return False
    return True
