"""Images in any form -> .beton, once:  python -m convert.imagenet --source /data/ILSVRC2012 --out data/imagenet

--source may hold train/ and val/ with one folder per class (torchvision's ImageFolder), ImageNet's official tars, STL-10's or
CIFAR's files, WebDataset shards, or images without labels (convert/detect.py).  Each split becomes SPLIT.beton with its
sidecar: images in the source's order with its class indices, by default with the longer side at most 500 pixels, as JPEG of
quality 90, 4:2:0.  The bytes depend on the images and the options, not on the number of workers.

Three things to know of bad images.  A file that no decoder reads, that is cut off, or whose compressed data libjpeg calls
damaged is bad, and so is a JPEG without its end marker: pixels that were never stored would be trained on.  By default the
conversion fails with their list; --on-bad skip leaves them out and says so in OUT/conversion_report.json.

All is checked that can be before the first image is written, all files are put in place at the end, and a conversion that
stops leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convert import report as reports_file
from convert.command import run, say
from convert.detect import detect
from convert.encode import Encoding, Subsampling
from convert.progress import note
from convert.report import Report
from convert.sources import SPLITS, Pixels, Source, chosen_classes, from_class_folders, only_classes
from convert.verify import verify_set
from convert.write import Format, Job, OnBad, convert, jobs_for
from loaders.errors import DataError

SMALL = 50_000
"""Images below which a first run is suggested with a small preset: an epoch of the published ones has 1,024 and more a step."""


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
    job = Job(from_class_folders(source, "train", classes), out)
    encoding = Encoding(max_side=max_side, quality=quality)
    return convert([job], encoding, workers=workers, overwrite=overwrite, progress=progress)[0]


def convert_imagenet(
    source: Path,
    out: Path = Path("data/imagenet"),
    max_side: int = 500,
    quality: int = 90,
    workers: int = 0,
    overwrite: bool = False,
    subsampling: Subsampling = "4:2:0",
    keep_original: bool = False,
    raw_fraction: float | None = None,
    seed: int = 0,
    classes: str | None = None,
    format: Format = "beton",
    on_bad: OnBad = "fail",
    verify: bool = False,
) -> list[Report]:
    """Convert images to OUT/train.beton, OUT/val.beton (and OUT/unlabeled.beton for STL-10), once, for all training runs.

    Args:
        source: Folder with train/ and val/, each with one folder of images per class, or class folders only (training set); with
            ImageNet's ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and devkit as downloaded; with STL-10's stl10_binary/; with
            CIFAR's python archive; of WebDataset shards; or of images without labels.
        out: Folder for the files.
        max_side: Longer side of the stored images, pixels; smaller images keep their size.
        quality: JPEG quality of the stored images.
        workers: Processes; 0: one per core.
        overwrite: Replace existing files of these splits, in either format.
        subsampling: Chroma subsampling of the stored JPEGs.
        keep_original: Store a file's bytes untouched when it is within max_side and a complete baseline RGB (YCbCr) JPEG, sampled
            4:4:4, 4:2:2 or 4:2:0. All other images are encoded as without this option, grey ones as RGB.
        raw_fraction: Share of the images that is stored as pixels instead of JPEG, chosen by seed and position. Default: 0, but 1 for
            STL-10 and CIFAR, which come as pixels.
        seed: Of the choice of raw images.
        classes: Only these classes: a number N for the first N by name, or a text file with one class name per line. Labels are
            numbered anew by sorted name, alike in all splits.
        format: beton; or webdataset: shards of JPEGs with DALI's index files.
        on_bad: What to do about images that cannot be decoded completely: fail with a list of them, or skip them and report.
        verify: Read everything again afterwards and compare it with the source, as python -m convert.verify does.
    """
    # Before the source is looked at, which may take minutes.
    Encoding(max_side=max_side, quality=quality, subsampling=subsampling, raw_fraction=raw_fraction or 0.0)
    sources = detect(source)
    chosen = None if classes is None else chosen_classes(sources, classes)
    if chosen is not None:
        sources = only_classes(sources, chosen)
    encoding = Encoding(
        max_side=max_side,
        quality=quality,
        subsampling=subsampling,
        keep_original=keep_original,
        raw_fraction=float(isinstance(sources[0].items, Pixels)) if raw_fraction is None else raw_fraction,
        seed=seed,
    )
    if format == "webdataset" and encoding.raw_fraction:
        raise DataError(f"Shards hold JPEGs, but {encoding.raw_fraction:.0%} of the images would be stored raw. Add --raw-fraction 0.")
    jobs = jobs_for(sources, out, format)
    _say_what_is_missing(source, sources, jobs)
    for one in sources:
        note(f"{one}.")
    options = {"classes": chosen}
    reports = convert(jobs, encoding, workers=workers, overwrite=overwrite, on_bad=on_bad, options=options)
    reports.sort(key=lambda r: SPLITS.index(r.split))
    reports_file.write(out, source, encoding.describe() | options, reports)
    if verify:
        _verify(jobs, workers)
    return reports


def _verify(jobs: Sequence[Job], workers: int) -> None:
    try:
        for job in jobs:
            verdict = verify_set(job.path, job.source, workers)
            verdict.raise_if_different()
            note(str(verdict))
    except KeyboardInterrupt as e:
        raise DataError(
            f"Interrupted while reading again what was written. All files are in place; for the check alone: "
            f"python -m convert.verify --beton {jobs[0].path.parent}"
        ) from e


def _say_what_is_missing(source: Path, sources: Sequence[Source], jobs: Sequence[Job]) -> None:
    splits = {one.split for one in sources}
    if splits == {"val"}:
        note(f"{source} has no training images: only a validation set is written.")
    elif "val" not in splits and all(one.labels is not None for one in sources):
        val = jobs[0].path.with_stem("val")
        stale = "".join(f"; {path} is left as it is" for path in (val.with_suffix(".beton"), val.with_suffix(".json")) if path.exists())
        other = " Its test/ is left out; named val/ it would be one." if (source / "test").is_dir() else ""
        note(f"{source} has no val/: only {jobs[0].path.name} is written{stale}. Evaluations need a validation set.{other}")


def next_step(reports: Sequence[Report]) -> str:
    """What to run on what was written."""
    folder = reports[0].path.parent
    splits = {r.split: r.path for r in reports}
    steps = []
    if "train" in splits:
        small = next(r.images for r in reports if r.split == "train") < SMALL
        steps.append(f"Next: python train.py {'--preset simclr_mini' if small else '--method lewel'} --data.path {folder}")
    if "unlabeled" in splits:
        steps.append(f"To train on the unlabelled images: --data.path {splits['unlabeled']}")
    return ". ".join(steps)


def main(args: Sequence[str] | None = None) -> None:
    reports = run(convert_imagenet, "convert.imagenet", args)
    for report in reports:
        say(f"Wrote {report}.")
    say(f"Complete table: {reports[0].path.parent / reports_file.FILE}. {next_step(reports)}")


if __name__ == "__main__":
    main()
