"""What the loader bench reads: one set of images stored in three ways, made once, and the same images for the yardsticks.

Without a file of the user's: the ImageNet sample below FASTSSL_DATA where it is, else the photograph tiles of the demo, which
need no data.  Both are small, so a stored file repeats its images until it is too large for the processor's caches and long
enough to be read cold; that changes no size and no byte of an image.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from convert.imagenet import convert_folder
from convert.tiles import write_tiles
from loaders.beton import JPEG, RAW, Beton, BetonWriter
from loaders.decoder import Samples
from loaders.errors import DataError

CACHE = Path("data/bench")
"""Below the working directory, as all data."""
QUALITY = 90
_SAMPLES, _BYTES = 2048, 256 << 20
"""A stored file repeats its images up to about the first, and never past the second."""
_MEASURED_BYTES, _MEASURED_SAMPLES = 1 << 30, 20_000
"""Of a file of the user's no more is read: that fits into memory and stays there."""
_STOCK_SAMPLES = 512
_FORMAT = "1"


@dataclass(frozen=True)
class Variant:
    """One stored form of the images."""

    name: str
    path: Path


@dataclass(frozen=True)
class Material:
    """What one run measures on."""

    origin: str
    variants: list[Variant]


def prepare(path: str = "") -> Material:
    """The stored files to measure on; those that are ours are made at the first call.

    path: a stored data set of the user's, taken as it is; empty: our own.  Raises DataError when there is nothing at `path`.
    """
    if path:
        if not Path(path).exists():
            raise DataError(
                f"There is no data at {path} to measure the loader on. Give a .beton or a folder with train.beton, or leave --path out: "
                "the bench then makes small files of its own."
            )
        return Material(str(path), [Variant("as stored", Path(path))])
    shared = os.environ.get("FASTSSL_DATA", "")
    sample = Path(shared) / "imagenet_sample.tar"
    if shared and sample.is_file():
        return _stored(CACHE / "imagenet_sample", "ImageNet sample", sample)
    return _stored(CACHE / "tiles", "demo tiles", None)


def _stored(folder: Path, title: str, archive: Path | None) -> Material:
    mark = folder / ".complete"
    if not mark.is_file() or mark.read_text() != _FORMAT:
        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            _build(partial, archive)
            (partial / ".complete").write_text(_FORMAT)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    names = {"jpeg500": f"JPEG max 500 q{QUALITY}", "jpeg400": f"JPEG max 400 q{QUALITY}", "raw500": "raw max 500"}
    return Material(title, [Variant(name, folder / f"{stem}.beton") for stem, name in names.items()])


def _build(folder: Path, archive: Path | None) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        if archive is None:
            source = write_tiles(scratch / "tiles") / "train"
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
            source = scratch / "images"
        for side in (500, 400):
            once = scratch / f"{side}.beton"
            convert_folder(source, once, max_side=side, quality=QUALITY, progress=False)
            repeat(Beton.open(once), folder / f"jpeg{side}.beton", JPEG)
        repeat(Beton.open(scratch / "500.beton"), folder / "raw500.beton", RAW)


def repeat(once: Beton, out: Path, mode: int) -> None:
    """The JPEGs of `once` again and again, as they are or, for mode RAW, decoded."""
    total = int(once.size.sum()) if mode == JPEG else int((3 * once.height.astype(np.int64) * once.width).sum())
    copies = max(1, min(-(-_SAMPLES // len(once)), _BYTES // total))
    with BetonWriter(out, copies * len(once)) as writer:
        for _ in range(copies):
            for i in range(len(once)):
                stored = once.sample(i).tobytes()
                if mode == RAW:
                    stored = np.asarray(Image.open(BytesIO(stored)).convert("RGB")).tobytes()
                writer.append(stored, mode, int(once.height[i]), int(once.width[i]), int(once.label[i]))
        names = once.names
        writer.finish([f"{c}/{name}" for c in range(copies) for name in names], once.classes, None, {"copies": copies})


def measured_ids(samples: Samples) -> np.ndarray:
    """int64 [M] ids spread evenly over the set: all of a small one, of a large one as many as stay in memory."""
    mean = float(samples.size.mean())
    count = max(1, min(len(samples), _MEASURED_SAMPLES, int(_MEASURED_BYTES / mean)))
    return np.unique(np.linspace(0, len(samples) - 1, count).astype(np.int64))


@contextmanager
def stock(samples: Samples) -> Iterator[Path | None]:
    """A folder with some of the JPEGs of `samples` for loaders of others: files/CLASS/N.jpg, and the same as stock.beton.

    None for a set without JPEGs.  The folder is gone afterwards.
    """
    jpegs = np.flatnonzero(samples.mode == JPEG)
    if len(jpegs) == 0:
        yield None
        return
    chosen = jpegs[np.unique(np.linspace(0, len(jpegs) - 1, _STOCK_SAMPLES).astype(np.int64))]
    with tempfile.TemporaryDirectory(prefix="fastssl-bench-") as name:
        folder = Path(name)
        with BetonWriter(folder / "stock.beton", len(chosen)) as writer:
            for n, i in enumerate(chosen):
                stored, label = samples.sample(i).tobytes(), 0 if samples.label is None else int(samples.label[i])
                writer.append(stored, JPEG, int(samples.height[i]), int(samples.width[i]), label)
                file = folder / "files" / f"{label:05d}" / f"{n:05d}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(stored)
            writer.finish([f"{n:05d}.jpg" for n in range(len(chosen))])
        yield folder
