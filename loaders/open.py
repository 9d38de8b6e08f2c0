"""From a path to a decoder: which files hold a split, and which back end decodes them."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from loaders.beton import Beton
from loaders.class_folders import EXTENSIONS, check_split, scan
from loaders.decoder import Decoder, Samples
from loaders.errors import DataError
from loaders.shards import Shards, is_shards, sidecar_path

Split = Literal["train", "val"]
Backend = Literal["auto", "ffcv", "dali", "torchvision", "torchvision_cuda", "folder"]
_log = logging.getLogger(__name__)


def open_decoder(path: str, split: Split, *, backend: Backend, workers: int, device: torch.device, say: bool = True) -> Decoder:
    """The decoder of one split.  `device`: where the batches go, and for `dali` and `torchvision_cuda` where they are decoded;
    `say`: log what `auto` chose.  Raises DataError when the data or the back end cannot be used."""
    found = find(Path(path), split, prefer_folder=backend == "folder")
    if backend == "auto":
        backend, why = _choose(found)
        if say:
            _say_once(f"Decoding {found.path} with {backend}{why}.")
    elif found.kind == "folder" and backend != "folder":
        raise DataError(
            f"The loader {backend} reads .beton files and shards, and {found.path} is a folder of images. Convert it with: "
            f"python -m convert.imagenet --source {path} --out DIR, or choose --efficiency.loader folder."
        )
    elif found.kind != "folder" and backend == "folder":
        raise DataError(
            f"The loader folder reads folders of images, and {found.path} is a converted data set. Choose --efficiency.loader auto."
        )

    # Imported when chosen: each pulls in a library that the others do not need.
    if backend == "ffcv":
        from loaders.ffcv import FFCVDecoder

        return FFCVDecoder(_samples(found), workers)
    if backend == "dali":
        from loaders.dali import DALIDecoder

        return DALIDecoder(_samples(found), workers, device)
    if backend == "torchvision":
        from loaders.torchvision import TorchvisionDecoder

        return TorchvisionDecoder(_samples(found), workers)
    if backend == "torchvision_cuda":
        from loaders.torchvision_cuda import TorchvisionCUDADecoder

        return TorchvisionCUDADecoder(_samples(found), device)
    from loaders.folder import FolderDecoder, flat

    # A validation set without some class must not renumber the others.
    training = found.path.parent / "train"
    classes = scan(training)[2] if split == "val" and training.is_dir() and not flat(training) else None
    return FolderDecoder(found.path, workers, classes)


def _choose(found: Found) -> tuple[Backend, str]:
    """The back end for `auto`, and why it is not a better one."""
    if found.kind == "folder":
        source = found.path.parent if found.path.name in ("train", "val") else found.path
        return "folder", f"; a .beton decodes several times as fast: python -m convert.imagenet --source {source} --out DIR"
    from loaders import dali, ffcv

    missing = ""
    for name, module in (("ffcv", ffcv), ("dali", dali)):
        problem = module.load()
        if not problem:
            return name, missing
        missing += f"{', and' if missing else ', because'} {name} cannot be used: {problem} (`make setup`)"
    return "torchvision", missing


def _samples(found: Found) -> Samples:
    return Beton.open(found.path) if found.kind == "beton" else Shards.open(found.path.parent, found.path.stem)


@functools.cache
def _say_once(message: str) -> None:
    _log.info(message)


# ------------------------------------------------------------------------------------------------ paths


@dataclass(frozen=True)
class Found:
    """Where a split lies."""

    kind: Literal["beton", "shards", "folder"]
    path: Path
    """The .beton, the NAME.json of shards, or the folder: a tree of class folders, or images without labels."""


def find(path: Path, split: Split, prefer_folder: bool = False) -> Found:
    """Where `split` of the data at `path` lies.

    `path` is a folder with SPLIT.beton, SPLIT-000000.tar ... or SPLIT/, or one data set, which is taken for training: a
    .beton, the NAME.json of shards, a tree of class folders, or a folder of images.  Raises DataError, which names the
    conversion command.
    """
    alone = path.suffix in (".beton", ".json")
    convert = (
        "Convert ImageNet with `make convert-imagenet IMAGENET=DIR`, any class folders with: "
        f"python -m convert.imagenet --source DIR --out {path.parent if alone else path}"
    )
    if not path.exists():
        raise DataError(f"There is no data at {path}. {convert}, or pass another path.")
    if path.is_dir():
        if candidates := _splits(path, split):
            found = candidates[-1 if prefer_folder else 0]
            if found.kind == "folder":
                check_split(found.path)
            return found
        if others := _splits(path, "train") + _splits(path, "val"):
            if others[-1].kind == "folder":
                check_split(others[-1].path)
            raise DataError(f"{path} has neither {split}.beton nor {split}-000000.tar nor {split}/. {convert}")
        entries = list(os.scandir(path))
        if not any(entry.is_dir() or entry.name.lower().endswith(EXTENSIONS) for entry in entries):
            others = sorted(e.name.replace("-000000.tar", ".json") for e in entries if e.name.endswith((".beton", "-000000.tar")))
            hint = f" It holds {', '.join(others)}: pass such a file itself." if others else ""
            raise DataError(f"{path} holds no {split}.beton, no {split}-000000.tar, no class folders and no images.{hint} {convert}")
    elif not alone:
        raise DataError(f"{path} is neither a folder nor a .beton nor the .json of shards. {convert}")
    if split == "val":
        raise DataError(
            f"{path} is one data set, which is taken for training; it has no validation part. Pass a folder that holds train.beton and "
            f"val.beton, or train/ and val/ class folders. {convert}"
        )
    return Found("folder" if path.is_dir() else "beton" if path.suffix == ".beton" else "shards", path)


def _splits(path: Path, split: Split) -> list[Found]:
    """The forms in which the folder `path` holds `split`, the fastest first."""
    return [
        *([Found("beton", path / f"{split}.beton")] if (path / f"{split}.beton").is_file() else []),
        *([Found("shards", sidecar_path(path, split))] if is_shards(path, split) else []),
        *([Found("folder", path / split)] if (path / split).is_dir() else []),
    ]


def has_split(path: str, split: Split) -> bool:
    """Whether `path` holds that split, for whoever can do without it."""
    try:
        find(Path(path), split)
    except DataError:
        return False
    return True
