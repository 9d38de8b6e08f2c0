"""Class folders -> .beton, once:  python -m convert.imagenet --source /data/ILSVRC2012 --out data/imagenet

train/ and val/ with one folder per class (torchvision's ImageFolder) become train.beton and val.beton, each with its
sidecar: images in ImageFolder's order with its class indices, the longer side at most 500 pixels, JPEG quality 90 4:2:0.
The bytes depend on the images and on these two options, not on the number of workers.  All is checked that can be before
the first image is written, both files are put in place at the end, and a conversion that stops leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np

from convert.encode import Bad, Encoding, Stored, encode_file, encode_files
from convert.progress import Progress, gigabytes, note
from loaders import class_folders
from loaders.beton import JPEG, PAGE_SIZE, BetonWriter
from loaders.errors import DataError

_PROBE = 64
"""Images encoded beforehand to estimate the size."""
_MAX_BAD = 20


@dataclass(frozen=True)
class Split:
    """One tree of class folders and the file it becomes."""

    folder: Path
    beton: Path
    classes: list[str]
    names: list[str]
    """Paths below `folder`, in order."""
    labels: np.ndarray
    """int64 [N], indices into `classes`."""


@dataclass(frozen=True)
class Report:
    """What a conversion made."""

    path: Path
    images: int
    classes: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.images:,} images of {self.classes:,} classes, {gigabytes(self.bytes)}, "
            f"in {timedelta(seconds=round(self.seconds))} ({self.images / self.seconds:,.0f} images/s)"
        )


def scan(folder: Path, beton: Path, classes: Sequence[str] | None = None) -> Split:
    """List a tree of class folders.  `classes`: the classes whose indices to use (the training set's); default: its own.

    Raises DataError where there are no class folders, a class is empty, or a class is not among `classes`.
    """
    names, labels, classes = class_folders.scan(folder, classes)
    return Split(folder, beton, classes, names, labels)


def _usable_workers(workers: int) -> int:
    cores = len(os.sched_getaffinity(0))
    if workers < 0:
        raise DataError(f"There cannot be {workers} workers. Give --workers 1 or more, or 0 for one per core.")
    if workers > cores:
        note(f"{workers} workers asked for, but {cores} cores are available: using {cores}.")
    return min(workers, cores) or cores


def estimate(split: Split, encoding: Encoding) -> int:
    """Expected bytes of the .beton and its sidecar, from images spread over the split."""
    probe = np.unique(np.linspace(0, len(split.names) - 1, _PROBE).astype(int))
    results = [encode_file(split.folder / split.names[i], encoding) for i in probe]
    sizes = [len(r.jpeg) for r in results if isinstance(r, Stored)]
    per_image = sum(sizes) / max(1, len(sizes)) * 1.01 + 80  # page ends; tables and sidecar
    return PAGE_SIZE + round(len(split.names) * per_image)


def _check_outputs(splits: Iterable[Split], encoding: Encoding, overwrite: bool) -> None:
    """Existing outputs and disk space, before hours of work."""
    if taken := [str(s.beton) for s in splits if s.beton.exists() and not overwrite]:
        raise DataError(
            f"{' and '.join(taken)} exist{'s' * (len(taken) == 1)} already. Add --overwrite, or choose another folder with --out."
        )
    needed = sum(estimate(s, encoding) for s in splits)
    out = next(iter(splits)).beton.absolute().parent
    existing = next(p for p in (out, *out.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DataError(
            f"Converting needs about {gigabytes(needed)}, but the disk of {out} has {gigabytes(free)} free. "
            "Free space, or choose another folder with --out, or smaller images with --max-side."
        )


def _write(split: Split, writer: BetonWriter, encoding: Encoding, workers: int, progress: bool) -> None:
    bad: list[str] = []
    total = len(split.names)
    with ExitStack() as stack:
        shown = stack.enter_context(Progress(split.beton.name, total)) if progress else None
        encoded = stack.enter_context(closing(encode_files(split.folder, split.names, encoding, workers)))
        for i, (name, image) in enumerate(zip(split.names, encoded, strict=True)):
            if isinstance(image, Bad):
                bad.append(f"{split.folder / name} ({image.reason})")
                if len(bad) == _MAX_BAD:
                    break
            elif not bad:  # once one is bad, the rest is only looked through for others
                writer.append(image.jpeg, JPEG, image.height, image.width, int(split.labels[i]), crc32=image.crc32)
            if shown:
                expected = f"{gigabytes(writer.bytes_written / (i + 1) * total)} expected" if i >= 200 else ""
                shown.update(f"{len(bad)} bad" if bad else expected)
    if bad:
        raise DataError(
            f"{len(bad)}{' or more' * (len(bad) == _MAX_BAD)} files cannot be converted: {'; '.join(bad)}. "
            "Replace or remove them, then convert again."
        )
    writer.finish(split.names, split.classes, str(split.folder.absolute()), encoding.describe())


def _convert(splits: Sequence[Split], encoding: Encoding, workers: int, overwrite: bool, progress: bool) -> list[Report]:
    workers = _usable_workers(workers)
    _check_outputs(splits, encoding, overwrite)
    page_size = max(PAGE_SIZE, 1 << (3 * encoding.max_side**2).bit_length())
    reports = []
    with ExitStack() as stack:  # all files are put in place together, or none
        for split in splits:
            start = time.monotonic()
            writer = stack.enter_context(BetonWriter(split.beton, len(split.names), page_size=page_size))
            _write(split, writer, encoding, workers, progress)
            seconds = time.monotonic() - start
            reports.append(Report(split.beton, len(split.names), len(np.unique(split.labels)), writer.bytes_written, seconds))
    return reports


def convert_folder(
    source: Path,
    out: Path,
    *,
    classes: Sequence[str] | None = None,
    max_side: int = 500,
    quality: int = 90,
    workers: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> Report:
    """One tree of class folders -> the one file `out` (and its sidecar `out`.json).

    `classes`: class names by label, where not `source`'s own (a validation set takes its training set's).  Raises DataError
    for anything wrong with the images, the options or the disk; then `out` is as it was.
    """
    return _convert([scan(source, out, classes)], Encoding(max_side=max_side, quality=quality), workers, overwrite, progress)[0]


def convert_imagenet(
    source: Path, out: Path = Path("data/imagenet"), max_side: int = 500, quality: int = 90, workers: int = 0, overwrite: bool = False
) -> list[Report]:
    """Convert train/ and val/ class folders to OUT/train.beton and OUT/val.beton, once, for all training runs.

    Args:
        source: Folder with train/ and val/, each with one folder of images per class; or class folders only (training set).
        out: Folder for the .beton files.
        max_side: Longer side of the stored images, pixels; smaller images keep their size.
        quality: JPEG quality of the stored images.
        workers: Processes; 0: one per core.
        overwrite: Replace existing .beton files.
    """
    encoding = Encoding(max_side=max_side, quality=quality)
    train, val = source / "train", source / "val"
    if not train.is_dir() and val.is_dir():
        raise DataError(f"{source} has val/ but no train/. Put the training images into {train}, one folder per class, and convert again.")
    if train.is_dir():
        splits = [scan(train, out / "train.beton")]
    else:
        splits = [scan(source, out / "train.beton")]
        note(f"{source} has no train/ and val/: its {len(splits[0].classes):,} folders are taken as the classes of a training set.")
    if val.is_dir():
        # The small one first: what is wrong with it shows before the hours that the training set takes.
        splits.insert(0, scan(val, out / "val.beton", splits[0].classes))
    elif train.is_dir():
        stale = f"; {out / 'val.beton'} is left as it is" if (out / "val.beton").exists() else ""
        note(f"{source} has no val/: only train.beton is written{stale}. Evaluations need a val.beton.")
    for split in splits:
        note(f"{split.folder}: {len(split.names):,} images of {len(np.unique(split.labels)):,} classes.")
    return _convert(splits, encoding, workers, overwrite, progress=True)


def main(args: Sequence[str] | None = None) -> None:
    import tyro  # not at the top: worker processes import this module

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # unwinds, so that partial files go
    try:
        reports = tyro.cli(convert_imagenet, prog="python -m convert.imagenet", args=args)
    except DataError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("Interrupted; nothing was written.", file=sys.stderr)
        sys.exit(130)
    out = reports[0].path.parent
    print(f"Wrote {'; '.join(map(str, reversed(reports)))}. Next: python train.py --method lewel --data.path {out}")


if __name__ == "__main__":
    main()
