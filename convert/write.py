"""From sources to files: what is checked before hours of work, and the one pass over the images."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from convert.encode import Bad, Encoding, Stored, encode_all, encode_item
from convert.outputs import check_existing, check_space, remove_replaced
from convert.parallel import usable_workers
from convert.progress import Progress, gigabytes
from convert.report import Report
from convert.shard_writer import ShardWriter
from convert.sources import Source, Span, Spans
from loaders.beton import PAGE_SIZE, RAW, BetonWriter
from loaders.errors import DataError

Format = Literal["beton", "webdataset"]
OnBad = Literal["fail", "skip"]

_PROBE = 64
"""Images encoded beforehand to estimate the size."""
_MAX_BAD = 20
"""Bad images after which a conversion that will fail looks for no more."""


@dataclass(frozen=True)
class Job:
    """A source and the file it becomes: NAME.beton, or the NAME.json of WebDataset shards."""

    source: Source
    path: Path

    @property
    def label(self) -> str:
        return self.path.name if self.path.suffix == ".beton" else f"{self.path.stem} shards"


def jobs_for(sources: Sequence[Source], out: Path, format: Format) -> list[Job]:
    """Small splits first: what is wrong with them shows before the hours that the large one takes."""
    suffix = "beton" if format == "beton" else "json"
    return [Job(source, out / f"{source.split}.{suffix}") for source in sorted(sources, key=len)]


# ------------------------------------------------------------------------------------------------ beforehand


def estimate(source: Source, encoding: Encoding) -> int:
    """Expected bytes of what the source becomes, sidecar included, from images spread over it."""
    probe = np.unique(np.linspace(0, len(source) - 1, _PROBE).astype(int))
    results = [encode_item(source.items[i], encoding, encoding.stores_raw(i)) for i in probe.tolist()]
    sizes = [len(r.data) for r in results if isinstance(r, Stored)]
    per_image = sum(sizes) / max(1, len(sizes)) * 1.01 + 80  # page ends; tables and sidecar
    return PAGE_SIZE + round(len(source) * per_image)


def check_outputs(jobs: Sequence[Job], encoding: Encoding, overwrite: bool) -> list[list[Path]]:
    """Raise DataError for existing outputs, or where the disk is too small.  Returns what is to go when the new files are in place."""
    for job in jobs:
        _spare_the_source(job)
    replaced = check_existing([job.path for job in jobs], overwrite, {tar for job in jobs for tar in _tars(job)})
    check_space(sum(estimate(job.source, encoding) for job in jobs), jobs[0].path.parent, ", or smaller images with --max-side")
    return replaced


def _tars(job: Job) -> Sequence[Path]:
    return job.source.items.paths if isinstance(job.source.items, Spans) else ()


def _spare_the_source(job: Job) -> None:
    out = job.path.parent.resolve()
    if job.path.suffix == ".json" and any(p.parent.resolve() == out and p.name.startswith(f"{job.path.stem}-") for p in _tars(job)):
        raise DataError(f"The shards in {out} would be written over while they are read. Choose another folder with --out.")


# ------------------------------------------------------------------------------------------------ the pass


@contextmanager
def _writer(job: Job, encoding: Encoding) -> Iterator:
    labels = job.source.labels is not None
    if job.path.suffix == ".beton":
        with BetonWriter(job.path, len(job.source), labels=labels, page_size=encoding.page_size) as writer:
            yield writer
    else:
        with ShardWriter(job.path.parent, job.path.stem, len(job.source), labels=labels, page_size=encoding.page_size) as writer:
            yield writer


class _Skipping:
    """Bad images of one split; what to do with them."""

    def __init__(self, source: Source, on_bad: OnBad) -> None:
        self._source, self._on_bad = source, on_bad
        self.bad: list[tuple[int, str]] = []
        # Images of each class that may still be good; without labels there is one class.
        self._left = Counter([-1] * len(source) if source.labels is None else source.labels.tolist())

    def add(self, i: int, reason: str) -> None:
        """Raises DataError when too much is bad."""
        self.bad.append((i, reason))
        if self._on_bad == "fail":
            if len(self.bad) == _MAX_BAD:
                self.fail()
            return
        label = -1 if self._source.labels is None else int(self._source.labels[i])
        self._left[label] -= 1
        if not self._left[label]:
            of = "" if label == -1 else f" of class {self._source.class_name(label)}"
            raise DataError(
                f"No image{of} in {self._source.origin} ({self._source.split}) can be converted; the last is {self._described(i, reason)}. "
                "Replace the images, or leave the class out: --classes takes a list of the others."
            )

    def fail(self) -> None:
        listed = "; ".join(self._described(*one) for one in self.bad)
        raise DataError(
            f"{len(self.bad)}{' or more' * (len(self.bad) == _MAX_BAD)} files cannot be converted: {listed}. "
            "Replace or remove them, or leave them out with --on-bad skip, then convert again."
        )

    def _described(self, i: int, reason: str) -> str:
        item, name = self._source.items[i], self._source.names[i]
        return f"{f'{name} in {item.path}' if isinstance(item, Span) else self._source.origin / name} ({reason})"


def _write(job: Job, writer, encoding: Encoding, workers: int, on_bad: OnBad, options: Mapping[str, object], progress: bool) -> Report:
    source, start, total = job.source, time.monotonic(), len(job.source)
    skipping = _Skipping(source, on_bad)
    good: list[int] = []
    done = Counter()

    def named(i: int) -> dict[str, str]:
        """Shards name their parts after the images; a .beton has its names in the sidecar alone."""
        return {} if job.path.suffix == ".beton" else {"name": source.names[i]}

    with ExitStack() as stack:
        shown = stack.enter_context(Progress(job.label, total)) if progress else None
        encoded = stack.enter_context(closing(encode_all(source.items, encoding, workers)))
        for i, image in enumerate(encoded):
            if isinstance(image, Bad):
                skipping.add(i, image.reason)
            elif not skipping.bad or on_bad == "skip":  # once it will fail, the rest is only looked through for others
                label = None if source.labels is None else int(source.labels[i])
                writer.append(image.data, image.mode, image.height, image.width, label, crc32=image.crc32, **named(i))
                good.append(i)
                done["raw" if image.mode == RAW else "kept" if image.kept else "re_encoded"] += 1
                done["resized"] += image.resized
            if shown:
                expected = f"{gigabytes(writer.bytes_written / (i + 1) * total)} expected" if i >= 200 else ""
                shown.update(f"{len(skipping.bad)} bad" if skipping.bad else expected)
    if skipping.bad and on_bad == "fail":
        skipping.fail()
    skipped = [(source.names[i], reason) for i, reason in skipping.bad]
    names = [source.names[i] for i in good]
    writer.finish(names, source.classes, str(source.origin.absolute()), {**encoding.describe(), **options, "skipped": skipped})
    return Report(
        split=source.split,
        path=job.path,
        images=len(good),
        per_class=_per_class(source, good),
        **{key: done[key] for key in ("kept", "re_encoded", "raw", "resized")},
        skipped=skipped,
        bytes=writer.bytes_written,
        seconds=time.monotonic() - start,
    )


def _per_class(source: Source, good: Sequence[int]) -> dict[str, int] | None:
    """Images of each class, classes without images included where the source names them."""
    if source.labels is None:
        return None
    labels = source.labels[good]
    counts = np.bincount(labels, minlength=len(source.classes or ()))
    return {source.class_name(label): int(count) for label, count in enumerate(counts)}


def convert(
    jobs: Sequence[Job],
    encoding: Encoding,
    *,
    workers: int,
    overwrite: bool,
    on_bad: OnBad = "fail",
    options: Mapping[str, object] | None = None,
    progress: bool = True,
) -> list[Report]:
    """Write all jobs: all files are put in place together, or none.

    options: what the sidecar shall say besides the encoding.  Raises DataError for anything wrong with the images, the
    options or the disk; then the outputs are as they were.
    """
    workers = usable_workers(workers)
    replaced = check_outputs(jobs, encoding, overwrite)
    with ExitStack() as stack:
        reports = [
            _write(job, stack.enter_context(_writer(job, encoding)), encoding, workers, on_bad, options or {}, progress) for job in jobs
        ]
    remove_replaced(replaced)
    return reports
