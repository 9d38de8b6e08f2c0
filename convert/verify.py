"""Read a converted data set again, completely:  python -m convert.verify --beton data/imagenet [--source /data/ILSVRC2012]

Every sample is decoded and its bytes compared with the CRC-32 of the sidecar.  With the source: the same images, labels and
order, and per image the size and the pixels that encoding it again gives.  Ends with status 1 and a list of what differs.
"""

from __future__ import annotations

import functools
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from convert.command import run, say
from convert.detect import detect
from convert.encode import CHUNK, Bad, Encoding, encode_item
from convert.parallel import in_order, usable_workers
from convert.progress import Progress
from convert.sources import Source, Span, only_classes
from loaders.beton import RAW, Beton
from loaders.decoder import Samples
from loaders.errors import DataError
from loaders.jpeg import complaint, is_damage

_SHOWN = 50
_MEAN, _MAX = 1.0, 32
"""Grey levels by which a JPEG of the same pixels may differ on average and at one place, when another libjpeg wrote it."""


@dataclass
class Verdict:
    """What was read of one data set, and what is not as it should be."""

    path: Path
    images: int
    contents: str
    """Classes and images per class, in words."""
    checked: str
    """What was compared, in words."""
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.path}: {self.images:,} images {self.contents}"
        if not self.differences:
            return f"{text}; all {self.checked}."
        more = [f"and {len(self.differences) - _SHOWN:,} more"] if len(self.differences) > _SHOWN else []
        listed = "\n".join(f"  {line}" for line in self.differences[:_SHOWN] + more)
        return f"{text}; {self._count()}:\n{listed}"

    def _count(self) -> str:
        return f"{len(self.differences):,} difference{'s' * (len(self.differences) != 1)}"

    def raise_if_different(self) -> None:
        if self.differences:
            raise DataError(
                f"{self.path} was written, but reading it again found {self._count()}, first: {self.differences[0]}. "
                f"Check the disk; for the whole list: python -m convert.verify --beton {self.path}"
            )


def open_set(path: Path) -> Samples:
    """A .beton, or the shards whose sidecar is NAME.json.  Raises DataError."""
    if path.suffix != ".json":
        return Beton.open(path)
    from loaders.shards import Shards  # needs no library, but nobody with a .beton needs it

    return Shards.open(path.parent, path.stem)


# ------------------------------------------------------------------------------------------------ one sample, in a worker


_opened = functools.lru_cache(maxsize=1)(open_set)


def _check(path: Path, ids: Sequence[int], items: Sequence[str | Span | np.ndarray | None], encoding: Encoding) -> list[str | None]:
    """What is wrong with each of the samples; `items`: their images in the source, None for those it has not."""
    samples = _opened(path)
    return [_problem(samples, i, item, encoding) for i, item in zip(ids, items, strict=True)]


def _problem(samples: Samples, i: int, item: str | Span | np.ndarray | None, encoding: Encoding) -> str | None:
    data, raw = samples.sample(i).tobytes(), bool(samples.mode[i] == RAW)
    height, width = int(samples.height[i]), int(samples.width[i])
    if samples.crc32 is not None and zlib.crc32(data) != samples.crc32[i]:
        return "its bytes are not those that were written"
    try:
        pixels = _decode(data, raw, height, width)
    except Exception as e:  # Pillow raises anything
        return f"it cannot be decoded ({type(e).__name__}: {e})"
    if pixels.shape != (height, width, 3):
        return f"it is an image of {pixels.shape[1]} x {pixels.shape[0]} pixels, but the table says {width} x {height}"
    if item is None:
        return None
    again = encode_item(item, encoding, raw)
    if isinstance(again, Bad):
        return f"its image in the source {again.reason}"
    if again.data == data:
        return None
    if (again.height, again.width) != (height, width):
        return f"it has {width} x {height} pixels, and the source gives {again.width} x {again.height}"
    if raw or again.kept:
        return "its bytes are not the source's"
    difference = np.abs(pixels.astype(np.int16) - _decode(again.data, raw, height, width))
    if difference.mean() > _MEAN or difference.max() > _MAX:
        return f"its pixels are not the source's (they differ by {difference.mean():.1f} on average, {difference.max()} at most)"
    return None


def _decode(data: bytes, raw: bool, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3]."""
    if raw:
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    if (message := complaint(data)) and is_damage(data, message):
        raise ValueError(message)
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


# ------------------------------------------------------------------------------------------------ a data set


def verify_set(path: Path, source: Source | None = None, workers: int = 0, progress: bool = True) -> Verdict:
    """Read the .beton or shards (NAME.json) at `path`; with `source`, compare them with it.

    source: with the classes that were converted, in their numbering.  Raises DataError for what cannot be opened at all.
    """
    workers = usable_workers(workers)
    samples = open_set(path)
    n = len(samples)
    checked = "decode" + (", with the bytes that were written" if samples.crc32 is not None else " (there is no sidecar with checksums)")
    verdict = Verdict(path, n, _contents(samples), checked + (f", and are the images of {source.origin}" if source else ""))
    where = None if source is None else _match(samples, source, verdict.differences)
    _opened.cache_clear()  # with one worker it is this process that opens the set, perhaps one of the same name as before
    encoding = Encoding.of(samples.options or {})
    tasks = (
        (path, ids, [None if where is None or where[i] < 0 else source.items[where[i]] for i in ids], encoding)
        for ids in (range(i, min(i + CHUNK, n)) for i in range(0, n, CHUNK))
    )
    with closing(in_order(_check, tasks, min(workers, -(-n // CHUNK)))) as results:
        verdict.differences += _named(samples, results, progress)
    return verdict


def _named(samples: Samples, results: Iterator[list[str | None]], progress: bool) -> list[str]:
    found: list[str] = []
    shown = Progress(f"verify {samples.path.name}", len(samples)) if progress else None
    i = 0
    with shown or closing(results):
        for chunk in results:
            for problem in chunk:
                if problem:
                    found.append(f"{_sample(samples, i)}: {problem}")
                if shown:
                    shown.update(f"{len(found):,} differ" if found else "")
                i += 1
    return found


def _sample(samples: Samples, i: int) -> str:
    return f"sample {i}" + (f" ({samples.names[i]})" if samples.names else "")


def _contents(samples: Samples) -> str:
    if samples.label is None:
        return "without labels"
    # Counted as they come: a file that FFCV wrote may hold any numbers.
    _, counts = np.unique(samples.label[samples.label >= 0], return_counts=True)
    if (there := len(counts)) == 0:
        return "without labels"
    counts = np.pad(counts, (0, max(0, len(samples.classes or ()) - there)))
    return f"of {there:,} classes, {counts.min():,} to {counts.max():,} images a class (median {np.median(counts):,g})"


def _match(samples: Samples, source: Source, differences: list[str]) -> np.ndarray:
    """int64 [N]: position of every sample in the source, -1 where it is not there.  Adds to `differences` whatever of names,
    order, classes and labels is not the source's."""
    if samples.names is None:
        raise DataError(f"{samples.path} has no sidecar, so its images cannot be found in the source. Verify it without --source.")
    position = {name: i for i, name in enumerate(source.names)}
    where = np.array([position.get(name, -1) for name in samples.names], np.int64)
    there = set(samples.names) | {name for name, _ in (samples.options or {}).get("skipped", ())}
    differences += [f"{name} of the source is missing" for name in source.names if name not in there]
    differences += [f"{_sample(samples, i)} is not in the source" for i in np.flatnonzero(where < 0).tolist()]
    if (np.diff(where[where >= 0]) <= 0).any():
        differences.append("the samples are not in the source's order")
    if (samples.label is None) != (source.labels is None):
        differences.append("it has labels, and the source has none" if source.labels is None else "it has no labels, and the source has")
    elif samples.label is not None:
        if samples.classes != source.classes:
            differences.append("its classes are not the source's")
        wrong = np.flatnonzero((where >= 0) & (samples.label != source.labels[where]))
        differences += [
            f"{_sample(samples, i)} has label {samples.label[i]}, and in the source {source.labels[where[i]]}" for i in wrong.tolist()
        ]
    return where


# ------------------------------------------------------------------------------------------------ command line


def sets_at(path: Path) -> list[Path]:
    """The data sets of a folder, or the one at `path`: .beton files, and the NAME.json of shards."""
    if path.is_file():
        return [path]
    found = sorted(path.glob("*.beton")) + sorted(p for p in path.glob("*.json") if p.with_name(f"{p.stem}-000000.tar").exists())
    if not found:
        raise DataError(f"There is no .beton and no set of shards at {path}. Give the folder that a conversion wrote, with --beton DIR.")
    return found


def _source_of(path: Path, samples: Samples, sources: Sequence[Source], only: bool) -> Source:
    """The split that became `path`; `only`: there is no other file to verify."""
    if chosen := (samples.options or {}).get("classes"):
        sources = only_classes(sources, chosen)
    by_split = {s.split: s for s in sources}
    source = by_split.get(path.stem) or (sources[0] if only and len(sources) == 1 else None)
    if source is None:
        raise DataError(f"{sources[0].origin} has no split {path.stem}. Give the --source it was made of, or one file with --beton.")
    return source


def verify(beton: Path, source: Path | None = None, workers: int = 0) -> list[Verdict]:
    """Read a converted data set again, completely, and compare it with its checksums and with what it was made of.

    Args:
        beton: A .beton, or a folder of .beton files or WebDataset shards.
        source: What was given to the conversion as --source.
        workers: Processes; 0: one per core.
    """
    paths = sets_at(beton)
    samples = [open_set(path) for path in paths]
    pairs = [None] * len(paths)
    if source is not None:
        sources = detect(source)
        pairs = [_source_of(path, one, sources, len(paths) == 1) for path, one in zip(paths, samples, strict=True)]
    return [verify_set(path, pair, workers) for path, pair in zip(paths, pairs, strict=True)]


def main(args: Sequence[str] | None = None) -> None:
    verdicts = run(verify, "convert.verify", args, interrupted="Interrupted.")
    say("\n".join(map(str, verdicts)))
    sys.exit(any(v.differences for v in verdicts))


if __name__ == "__main__":
    main()
