"""WebDataset shards as a data set with random access: the tars are mapped, and their indices say where each image lies.

A split SPLIT in a folder is

    SPLIT-000000.tar, ...   samples in order: KEY.cls (its label as text; not without labels), KEY.jpg
    SPLIT-000000.idx, ...   DALI's index of each tar (v1.2): a line per sample with extension, position, size, name of each part
    SPLIT.json              the sidecar: names, labels, sizes, CRC-32 of every image, and sums of all tables

Any reader of WebDatasets takes the tars, DALI's the tars with their indices.  Here the index gives positions and the sidecar
everything else, so no tar is read from start to end.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import resource
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from loaders.beton import JPEG
from loaders.errors import DataError
from loaders.sidecar import Sidecar, sha256
from loaders.stored import Stored, read_only

INDEX_VERSION = "v1.2"


def sidecar_path(folder: Path, split: str) -> Path:
    return folder / f"{split}.json"


def tar_path(folder: Path, split: str, k: int) -> Path:
    return folder / f"{split}-{k:06d}.tar"


def find_tars(folder: Path, split: str, ending: str = "tar") -> list[Path]:
    """The tars of a split that are there, in order; `ending`: other files of the same numbering."""
    return sorted(folder.glob(f"{glob.escape(split)}-{'[0-9]' * 6}.{ending}"))


def is_shards(folder: str | os.PathLike, split: str) -> bool:
    """Whether `folder` holds WebDataset shards SPLIT-000000.tar, ..., whoever wrote them."""
    return bool(find_tars(Path(folder), split))


@dataclass(frozen=True, eq=False, repr=False)
class Shards(Stored):
    """The tables of an open set of shards in memory, its tars mapped.  N samples, by sample id."""

    path: Path
    """The sidecar."""
    tars: list[Path]
    first: np.ndarray
    """int64 [K + 1]: id of the first sample of each of the K tars, and N."""
    data: list[np.ndarray]
    """uint8 memmap of each tar, read-only."""
    mode: np.ndarray
    """uint8 [N]: JPEG."""
    height: np.ndarray
    """int32 [N], pixels."""
    width: np.ndarray
    """int32 [N], pixels."""
    offset: np.ndarray
    """uint64 [N], first byte of the sample in its tar."""
    size: np.ndarray
    """uint64 [N], bytes."""
    label: np.ndarray | None
    """int64 [N], or None."""
    sidecar: Sidecar

    @classmethod
    def open(cls, folder: str | os.PathLike, split: str) -> Shards:
        """Read and check the tables; no image is touched.  Raises DataError for anything that cannot be trusted."""
        return _open(Path(folder), split)

    def sample(self, i: int) -> np.ndarray:
        """The stored bytes of sample i: uint8 [size], a view of its tar."""
        start = int(self.offset[i])
        return self._bytes[self._shard(i)][start : start + int(self.size[i])]

    def file(self, i: int) -> Path:
        """The tar that holds sample i."""
        return self.tars[self._shard(i)]

    def _shard(self, i: int) -> int:
        return int(np.searchsorted(self.first, i, side="right")) - 1

    @cached_property
    def address(self) -> np.ndarray:
        """uint64 [N]: where the first byte of each sample lies in this process's memory."""
        starts = np.array([tar.ctypes.data for tar in self._bytes], np.uint64)
        address = self.offset + np.repeat(starts, np.diff(self.first))
        read_only(address)
        return address

    @cached_property
    def _bytes(self) -> list[np.ndarray]:
        return [tar.view(np.ndarray) for tar in self.data]  # slicing a memmap costs microseconds


def _open(folder: Path, split: str) -> Shards:
    path, found = sidecar_path(folder, split), find_tars(folder, split)
    sidecar = Sidecar.load(path, path)
    if sidecar is None:
        if found:
            raise DataError(
                f"{found[0]} has no {path.name} next to it: these shards come from elsewhere, and the sizes of their images are not known "
                f"before they are decoded. Convert them with: python -m convert.imagenet --source {folder} --out DIR --format webdataset"
            )
        raise DataError(
            f"There are no shards {split}-*.tar in {folder}. Make them with: python -m convert.imagenet --source DIR --out {folder} "
            "--format webdataset"
        )
    content, again = sidecar.content, sidecar.again
    counts, lengths = content.get("samples_per_tar"), content.get("bytes_per_tar")
    if counts is None or lengths is None:
        raise DataError(f"{path} is the sidecar of something else than shards. {again}")
    tars = [tar_path(folder, split, k) for k in range(len(counts))]
    if found != tars:
        odd = sorted(set(found) ^ set(tars))
        raise DataError(
            f"{folder} has {len(found)} tars of {split}, and {path.name} describes {len(tars)}: {odd[0].name} is "
            f"{'missing' if odd[0] in tars else 'not one of them'}. Copy the folder anew if it was copied here. {again}"
        )

    _allow_open_files()
    data, offsets, sizes, index_sum = [], [], [], hashlib.sha256()
    for tar, count, length in zip(tars, counts, lengths, strict=True):
        index = tar.with_suffix(".idx")
        try:
            actual = tar.stat().st_size
            data.append(np.memmap(tar, np.uint8, mode="r") if actual else np.empty(0, np.uint8))
            text = index.read_bytes()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):
                limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
                raise DataError(
                    f"{path} describes {len(tars):,} tars, and this process may keep only {limit:,} files open. Allow more with "
                    f"`ulimit -n {len(tars) + 1024}` (where that is refused, an administrator can), or convert to a .beton: one file."
                ) from e
            raise DataError(f"{tar} or its index {index.name} cannot be read: {e.strerror}. Copy the folder anew, or: {again}") from e
        if actual != length:
            raise DataError(f"{tar} has {actual} bytes instead of {length}. Copy the folder anew if it was copied here. {again}")
        index_sum.update(text)
        offset, size = _parse(index, text, count, again)
        if ((offset > actual) | (size > actual) | (offset + size > actual) | (size == 0)).any():
            raise DataError(f"{index} is damaged: it points outside of {tar.name}. {again}")
        offsets.append(offset)
        sizes.append(size)

    label = sidecar.column("label", "<i8").astype(np.int64) if "label" in content else None
    sidecar.check(sum(counts), {"index": index_sum.hexdigest(), "labels": sha256([] if label is None else [label])})
    height, width = (sidecar.column(key, "<u2").astype(np.int32) for key in ("height", "width"))
    offset, size, mode = np.concatenate(offsets), np.concatenate(sizes), np.full(len(height), JPEG, np.uint8)
    read_only(mode, height, width, offset, size, label)
    first = np.concatenate([[0], np.cumsum(counts)])
    return Shards(path, tars, first, data, mode, height, width, offset, size, label, sidecar)


def _allow_open_files() -> None:
    """Let this process keep as many files open as it may: maps keep theirs open, and most shells start with 1,024."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _parse(path: Path, text: bytes, count: int, again: str) -> tuple[np.ndarray, np.ndarray]:
    """Position and size, uint64 [count], of the last part of every sample, which is its image."""
    words = text.split()
    per_sample, rest = divmod(len(words) - 2, count)
    try:
        good = not rest and per_sample in (4, 8) and words[:2] == [INDEX_VERSION.encode(), b"%d" % count]
        image = words[2 + per_sample - 4 :]
        good = good and set(image[::per_sample]) == {b"jpg"}
        numbers = [np.fromiter(map(int, image[k::per_sample]), np.uint64, count) for k in (1, 2)] if good else []
    except (ValueError, OverflowError):
        numbers = []
    if not numbers:
        raise DataError(f"{path} is damaged, or not an index of {count} images. {again}")
    return numbers[0], numbers[1]
