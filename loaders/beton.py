"""FFCV's .beton files (format version 2), read and written without FFCV.

    header            24 bytes: version, number of fields, page size, number of samples, position of the allocation table
    field descriptors 1041 bytes each: type, name, arguments
    sample table      one aligned record per sample: image (mode, width, height, position), label
    data pages        from a multiple of the page size on; no sample crosses a page border
    allocation table  to the end of the file: (sample, position, size) of every stored piece

FFCV's own writer lays out pages as its workers happen to finish; `BetonWriter` appends in order, so equal samples give
equal bytes, and stock FFCV reads the result.  Next to FILE lies FILE.json, the sidecar: class and sample names, sizes, the
CRC-32 of every sample, and SHA-256 sums of the tables, because FFCV's format would let a flipped label pass unseen.
A file without a sidecar (stock FFCV's) opens too.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from loaders.errors import DataError
from loaders.images import MAX_PIXELS
from loaders.sidecar import Sidecar, convert_again, dump, sha256, sidecar_path
from loaders.stored import Stored, read_only
from loaders.unfinished import Unfinished, partial

VERSION = 2
JPEG, RAW = 0, 1
"""Modes of a sample: a JPEG stream, or height x width x 3 bytes RGB."""
PAGE_SIZE = 8 << 20
"""Bytes; FFCV's default. A power of two below 2**32."""

HEADER = np.dtype([("version", "<u2"), ("num_fields", "<u2"), ("page_size", "<u4"), ("num_samples", "<u8"), ("alloc_table_ptr", "<u8")])
FIELD = np.dtype([("type_id", "u1"), ("name", "S16"), ("arguments", "V1024")])
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_PIECE = np.dtype([("ptr", "<u8"), ("size", "<u8")])
_INT, _RGB = 1, 2
# What each of FFCV's field types keeps in the sample table: float, int, image, bytes, array, JSON, tensor.
_FIELD_TYPES = {0: np.dtype("<f8"), _INT: np.dtype("<i8"), _RGB: IMAGE, 3: _PIECE, 4: np.dtype("<u8"), 5: _PIECE, 6: np.dtype("<u8")}


def _record(types: Sequence[np.dtype]) -> np.dtype:
    return np.dtype([(f"f{i}", t) for i, t in enumerate(types)], align=True)


def _sums(head: Iterable[np.ndarray], labels: np.ndarray | None, tables: Iterable[np.ndarray]) -> dict[str, str]:
    """The tables hold the labels too; a sum of their own names the culprit."""
    return {"header": sha256(head), "labels": sha256([] if labels is None else [labels]), "tables": sha256(tables)}


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, eq=False, repr=False)
class Beton(Stored):
    """The tables of an open .beton in memory, its bytes mapped.  N samples, by sample id."""

    path: Path
    data: np.ndarray
    """uint8 memmap of the whole file, read-only."""
    mode: np.ndarray
    """uint8 [N], JPEG or RAW."""
    height: np.ndarray
    """int32 [N], pixels."""
    width: np.ndarray
    """int32 [N], pixels."""
    ptr: np.ndarray
    """uint64 [N], first byte of the sample in `data`."""
    size: np.ndarray
    """uint64 [N], bytes."""
    label: np.ndarray | None
    """int64 [N], or None for a file without an integer field."""
    page_size: int
    """Bytes, as its header says."""
    sidecar: Sidecar | None = None

    @classmethod
    def open(cls, path: str | os.PathLike) -> Beton:
        """Read and check the tables; no sample byte is touched.  Raises DataError for any file that cannot be trusted."""
        return _open(Path(path))

    def sample(self, i: int) -> np.ndarray:
        """The stored bytes of sample i: uint8 [size], a view of the file."""
        start = int(self.ptr[i])
        return self._bytes[start : start + int(self.size[i])]

    def file(self, i: int) -> Path:
        """The file that holds sample i."""
        return self.path

    @cached_property
    def address(self) -> np.ndarray:
        """uint64 [N]: where the first byte of each sample lies in this process's memory."""
        address = self.ptr + np.uint64(self._bytes.ctypes.data)
        read_only(address)
        return address

    @cached_property
    def _bytes(self) -> np.ndarray:
        return self.data.view(np.ndarray)  # slicing a memmap costs microseconds


def _open(path: Path) -> Beton:
    if not path.is_file():
        hint = f" ({partial(path).name} is there: a conversion is running or was killed)" if partial(path).exists() else ""
        raise DataError(f"There is no file {path}{hint}. Make it with: python -m convert.imagenet --source DIR --out {path.parent}")
    try:
        total = path.stat().st_size
        data = np.memmap(path, np.uint8, mode="r") if total else np.empty(0, np.uint8)
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror}. Check its permissions and the disk.") from e
    sidecar = Sidecar.load(sidecar_path(path), path)
    again = sidecar.again if sidecar else convert_again(path)

    if total < HEADER.itemsize:
        raise DataError(f"{path} is not a .beton: it has {total} bytes. {again}")
    header = data[: HEADER.itemsize].view(HEADER)[0]
    if header["version"] != VERSION:
        raise DataError(f"{path} is not a .beton of this version (found {header['version']}, expected {VERSION}). {again}")
    n, end_of_fields = int(header["num_samples"]), HEADER.itemsize + int(header["num_fields"]) * FIELD.itemsize
    if total < end_of_fields:
        raise DataError(f"{path} is truncated: its {total} bytes end within the field descriptors. {again}")
    fields = data[HEADER.itemsize : end_of_fields].view(FIELD)
    if unknown := [int(t) for t in fields["type_id"] if int(t) not in _FIELD_TYPES]:
        raise DataError(f"{path} has a field of type {unknown[0]}, which is not one of FFCV's own. {again}")
    if _RGB not in fields["type_id"]:
        raise DataError(f"{path} has no image field. {again}")
    if n == 0:
        raise DataError(f"{path} holds no samples. {again}")

    record = _record([_FIELD_TYPES[int(t)] for t in fields["type_id"]])
    start = int(header["alloc_table_ptr"])
    end_of_samples = end_of_fields + n * record.itemsize
    missing, rest = divmod(total - start, ALLOCATION.itemsize)
    if start < end_of_samples or missing < n or rest:
        raise DataError(
            f"{path} is truncated or was not finished: its header promises {n} samples and an allocation table at byte {start}, "
            f"and the file has {total} bytes. {again}"
        )
    samples, allocations = data[end_of_fields:end_of_samples].view(record), data[start:].view(ALLOCATION)

    ints = [i for i, t in enumerate(fields["type_id"]) if t == _INT]
    label_field = next((i for i in ints if fields["name"][i] == b"label"), ints[0] if ints else None)
    label = None if label_field is None else np.ascontiguousarray(samples[f"f{label_field}"], np.int64)
    if sidecar is not None:
        sidecar.check(n, _sums([data[:end_of_fields]], label, [samples, allocations]))

    image = samples[f"f{list(fields['type_id']).index(_RGB)}"]
    columns = {name: np.array(image[name], t) for name, t in (("mode", np.uint8), ("height", np.int32), ("width", np.int32))}
    ptr = np.array(image["data_ptr"], np.uint64)
    order = np.argsort(allocations["ptr"], kind="stable")
    known = allocations["ptr"][order]
    at = np.minimum(np.searchsorted(known, ptr), len(known) - 1)
    size = np.array(allocations["size"][order][at], np.uint64)

    read_only(*columns.values(), ptr, size, label)
    beton = Beton(path, data, **columns, ptr=ptr, size=size, label=label, page_size=int(header["page_size"]), sidecar=sidecar)
    _check_tables(beton, found=known[at] == ptr, first=end_of_samples, last=start, again=again)
    return beton


def _check_tables(beton: Beton, found: np.ndarray, first: int, last: int, again: str) -> None:
    """Every sample lies inside of the data pages and has a size that its mode allows."""
    pixels = beton.height.astype(np.uint64) * beton.width.astype(np.uint64)
    # The sum of a damaged position and size may wrap around, so both are compared on their own.
    inside = (beton.ptr >= first) & (beton.ptr <= last) & (beton.size <= last) & (beton.ptr + beton.size <= last)
    for what, good in (
        ("has no entry in the allocation table", found),
        ("lies outside of the file's data", inside),
        ("has no bytes or no pixels", (beton.size > 0) & (pixels > 0)),
        (f"has more than {MAX_PIXELS:,} pixels", pixels <= MAX_PIXELS),
        (f"is neither a JPEG (mode {JPEG}) nor raw (mode {RAW})", beton.mode <= RAW),
        ("is raw and has not height x width x 3 bytes", (beton.mode != RAW) | (beton.size == 3 * pixels)),
    ):
        if not good.all():
            i, bad = int(np.argmin(good)), int((~good).sum())
            raise DataError(f"{beton.path} is damaged: sample {i} {what} ({bad} of {len(beton)} such samples). {again}")


# ------------------------------------------------------------------------------------------------ writing


@dataclass
class BetonWriter:
    """Write a .beton in one pass, under a temporary name until it is complete.

        with BetonWriter(path, len(images)) as writer:
            for jpeg, height, width, label in images:
                writer.append(jpeg, JPEG, height, width, label)
            writer.finish(names, classes, source, options)

    Leaving the block puts file and sidecar in place; leaving it by an exception leaves nothing behind (and an earlier file
    of that name as it was).  An image must fit into one page.
    """

    path: Path
    num_samples: int
    """Or an upper bound."""
    labels: bool = field(default=True, kw_only=True)
    page_size: int = field(default=PAGE_SIZE, kw_only=True)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        self._head = np.zeros(1, HEADER)
        self._head[0] = (VERSION, 1 + self.labels, self.page_size, self.num_samples, 0)
        self._fields = np.zeros(1 + self.labels, FIELD)
        self._fields["type_id"] = [_RGB, _INT][: 1 + self.labels]
        self._fields["name"] = [b"image", b"label"][: 1 + self.labels]
        self._samples = np.zeros(self.num_samples, _record([IMAGE, np.dtype("<i8")][: 1 + self.labels]))
        self._allocations = np.zeros(self.num_samples, ALLOCATION)
        self._crc32 = np.zeros(self.num_samples, "<u4")
        self._written = 0
        tables = self._head.nbytes + self._fields.nbytes + self._samples.nbytes
        self._end = -(-tables // self.page_size) * self.page_size
        self._finished = False

    def __enter__(self) -> BetonWriter:
        self._out = Unfinished(self.path)
        self._file = self._out.file
        self._file.seek(self._end)
        return self

    @property
    def bytes_written(self) -> int:
        """Length of the file so far."""
        return self._end

    def append(self, image: bytes, mode: int, height: int, width: int, label: int | None = None, *, crc32: int | None = None) -> None:
        """Add the next sample: a JPEG stream or raw RGB bytes.  `crc32`: zlib's of `image`, if a worker has computed it.

        Raises DataError for an image larger than a page or than the format's 65,535 pixels a side.
        """
        size = len(image)
        if size > self.page_size or max(height, width) > 0xFFFF:
            raise DataError(
                f"Sample {self._written} ({width} x {height} pixels, {size} bytes) does not fit into a .beton page of "
                f"{self.page_size} bytes with sides of at most 65535. Shrink the images or write with a larger page size."
            )
        if self._end % self.page_size + size > self.page_size:
            self._end += -self._end % self.page_size
            self._file.seek(self._end)
        self._file.write(image)
        i = self._written
        image_record = (mode, width, height, self._end)
        self._samples[i] = (image_record, label) if self.labels else (image_record,)
        self._allocations[i] = (i, self._end, size)
        self._crc32[i] = zlib.crc32(image) if crc32 is None else crc32
        self._end += size
        self._written += 1

    def finish(
        self, names: Sequence[str], classes: Sequence[str] | None = None, source: str | None = None, options: Mapping | None = None
    ) -> None:
        """Write the tables and the sidecar.  `names`: path of each sample below `source`; `classes`: names by label."""
        n = self._written
        if not n == len(names) <= self.num_samples:
            raise ValueError(f"{n} samples and {len(names)} names for a .beton of at most {self.num_samples}")
        samples, allocations = self._samples[:n], self._allocations[:n]
        self._head["num_samples"], self._head["alloc_table_ptr"] = n, self._end
        for position, part in ((self._end, [allocations]), (0, [self._head, self._fields, samples])):
            self._file.seek(position)
            for table in part:
                self._file.write(table.tobytes())
        self._out.sync(self._file)
        self._end += allocations.nbytes

        image, label = samples["f0"], np.ascontiguousarray(samples["f1"]) if self.labels else None
        with self._out.create(sidecar_path(self.path)) as f:
            dump(
                f,
                source=source,
                options=options or {},
                classes=classes,
                names=names,
                sums=_sums([self._head, self._fields], label, [samples, allocations]),
                columns={
                    "bytes": allocations["size"].astype("<u4"),
                    "height": image["height"],
                    "width": image["width"],
                    "crc32": self._crc32[:n],
                },
            )
            self._out.sync(f)
        self._finished = True

    def __exit__(self, kind, error, traceback) -> None:
        self._out.close(kind is None and self._finished, error)
        if kind is None and not self._finished:
            raise RuntimeError("BetonWriter was left without finish()")
