"""Writing WebDataset shards with DALI's indices and our sidecar; loaders/shards.py says how they are laid out."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import numpy as np

from loaders.beton import PAGE_SIZE, RAW
from loaders.errors import DataError
from loaders.shards import INDEX_VERSION, find_tars, sidecar_path, tar_path
from loaders.sidecar import dump, sha256
from loaders.unfinished import Unfinished, partial

SAMPLES_PER_SHARD = 10_000
"""About 1 GB of ImageNet at 500 pixels: large enough to stream, and 129 files in all."""
_LONGEST_KEY = 90
"""Bytes.  With its extension that fits into the 100 of a plain tar header."""


def key(name: str) -> str:
    """A sample's name as the key of its parts in a tar: without its extension, and what WebDataset or DALI's index would
    misread (dots, blanks, a leading underscore) percent-encoded."""
    path = PurePosixPath(name)
    stem = str(path.with_suffix("")) if path.suffix else name
    escaped = quote(stem.lstrip("/"), errors="surrogateescape").replace(".", "%2E").replace("~", "%7E")
    return f"%5F{escaped[1:]}" if escaped.startswith("_") else escaped


def index(tar: Path) -> str:
    """DALI's index of a tar, as its wds2idx writes it: the parts of each sample with extension, position, size and name."""
    lines: list[str] = []
    last = None
    with tarfile.open(tar, "r:") as members:
        for member in members:
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            part = f"{extension} {member.offset_data} {member.size} {member.name}"
            if (sample := folder + slash + stem) == last:
                lines[-1] += f" {part}"
            else:
                lines.append(part)
            last = sample
    return "\n".join([f"{INDEX_VERSION} {len(lines)}", *lines, ""])


@dataclass
class ShardWriter:
    """Write the shards of one split in one pass, under temporary names until they are complete; used as `BetonWriter` is.

    Leaving the block puts tars, indices and sidecar in place and removes what a larger earlier set leaves over; leaving it by
    an exception leaves nothing behind (and an earlier set as it was).
    """

    folder: Path
    split: str
    num_samples: int
    """Or an upper bound."""
    labels: bool = field(default=True, kw_only=True)
    samples_per_shard: int = field(default=SAMPLES_PER_SHARD, kw_only=True)
    page_size: int = field(default=PAGE_SIZE, kw_only=True)
    """Of the .beton that the shards come from or may become."""

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        if self.samples_per_shard < 1:
            raise DataError(f"A shard cannot hold {self.samples_per_shard} samples. Give --samples-per-shard 1 or more.")
        types = {"bytes": "<u4", "height": "<u2", "width": "<u2", "crc32": "<u4"} | ({"label": "<i8"} if self.labels else {})
        self._columns = {name: np.zeros(self.num_samples, dtype) for name, dtype in types.items()}
        self._keys: set[str] = set()
        self._counts: list[int] = []
        self._lengths: list[int] = []
        self._tar = None
        self._finished = False

    def __enter__(self) -> ShardWriter:
        self._out = Unfinished(sidecar_path(self.folder, self.split))
        for part in ("tar", "idx"):
            for left in find_tars(self.folder, self.split, f"{part}.partial"):  # by a killed conversion
                left.unlink()
        return self

    @property
    def bytes_written(self) -> int:
        """Length of the tars so far."""
        return sum(self._lengths) + (self._stream.tell() if self._tar else 0)

    def append(
        self,
        image: bytes,
        mode: int,
        height: int,
        width: int,
        label: int | None = None,
        *,
        crc32: int | None = None,
        name: str | None = None,
    ) -> None:
        """Add the next sample, a JPEG stream.  `crc32`: zlib's of `image`, if a worker has computed it; `name`: what its parts
        in the tar are called after (default: its number).

        Raises DataError for raw pixels, which no reader of WebDatasets knows.
        """
        i = sum(self._counts)
        if mode == RAW:
            raise DataError(
                f"Sample {i} is stored as raw pixels, and shards hold JPEGs only. Convert the images with --raw-fraction 0, or to a .beton."
            )
        if self._tar is None or self._counts[-1] == self.samples_per_shard:
            self._next_tar()
        self._tar.write({"__key__": self._key(i, name), "jpg": image} | ({"cls": b"%d" % int(label)} if self.labels else {}))
        self._counts[-1] += 1
        crc32 = zlib.crc32(image) if crc32 is None else crc32
        for column, value in {"bytes": len(image), "height": height, "width": width, "crc32": crc32}.items():
            self._columns[column][i] = value
        if self.labels:
            self._columns["label"][i] = label

    def _key(self, i: int, name: str | None) -> str:
        """Unique: readers take neighbours with the same key for one sample."""
        found = key(name) if name else ""
        if not found or len(found) > _LONGEST_KEY or found in self._keys:
            found = f"{i:09d}"
        while found in self._keys:
            found += "-"
        self._keys.add(found)
        return found

    def _next_tar(self) -> None:
        import webdataset  # not at the top: it takes seconds, and the processes of other converters import this module

        self._close_tar()
        self._stream = self._out.create(tar_path(self.folder, self.split, len(self._counts)))
        self._counts.append(0)
        # No time and no user, so that equal samples give equal bytes.
        self._tar = webdataset.TarWriter(self._stream, user="", group="", mode=0o644, encoder=False, mtime=0)

    def _close_tar(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        self._out.sync(self._stream)
        self._lengths.append(self._stream.tell())
        self._stream.close()
        path = tar_path(self.folder, self.split, len(self._counts) - 1)
        with self._out.create(path.with_suffix(".idx")) as f:
            f.write(index(partial(path)).encode())
            self._out.sync(f)

    def finish(
        self, names: Sequence[str], classes: Sequence[str] | None = None, source: str | None = None, options: Mapping | None = None
    ) -> None:
        """Write the last index and the sidecar.  `names`: path of each sample below `source`; `classes`: names by label."""
        n = sum(self._counts)
        if not 0 < n == len(names) <= self.num_samples:
            raise ValueError(f"{n} samples and {len(names)} names for shards of at most {self.num_samples}")
        self._close_tar()
        tars = [tar_path(self.folder, self.split, k) for k in range(len(self._counts))]
        columns = {name: column[:n] for name, column in self._columns.items()}
        dump(
            self._out.file,
            source=source,
            options=options or {},
            classes=classes,
            names=names,
            sums={
                "index": sha256(partial(tar.with_suffix(".idx")).read_bytes() for tar in tars),
                "labels": sha256([columns["label"]] if self.labels else []),
            },
            columns=columns,
            samples_per_tar=self._counts,
            bytes_per_tar=self._lengths,
            page_size=self.page_size,
        )
        self._out.sync(self._out.file)
        stale = sorted(set(find_tars(self.folder, self.split)) - set(tars))
        self._stale = [path for tar in stale for path in (tar, tar.with_suffix(".idx"))]
        self._finished = True

    def __exit__(self, kind, error, traceback) -> None:
        if self._tar is not None:
            for file in (self._tar, self._stream):
                with suppress(OSError):  # the disk may be full
                    file.close()
        complete = kind is None and self._finished
        self._out.close(complete, error, self._stale if complete else ())
        if kind is None and not self._finished:
            raise RuntimeError("ShardWriter was left without finish()")
