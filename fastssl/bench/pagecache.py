"""Dropping a file from the page cache, and seeing whether that worked: Linux, without root."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np

HOW = "fsync, madvise(MADV_DONTNEED) on this process's mappings, posix_fadvise(POSIX_FADV_DONTNEED) on the file; checked with mincore"
DROPPED = 0.02
"""At most this share of a dropped file may still be in memory."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_libc.mincore.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p


def evict(path: Path) -> None:
    """Drop the pages of a file that no other process has mapped, as far as the file system allows.

    Pages in a page table cannot be dropped, so our own read-only mappings let go of theirs first; whoever reads through
    them afterwards reads the same bytes from the disk.
    """
    for start, length in _mappings(path):
        _libc.madvise(start, length, mmap.MADV_DONTNEED)
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)  # a page that is not on the disk yet stays
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _mappings(path: Path) -> list[tuple[int, int]]:
    """Address and length of this process's read-only mappings of a file."""
    found, name = [], str(path.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access, _, _, _, *mapped = line.split(maxsplit=5)
        if mapped == [name] and "w" not in access:
            start, stop = (int(part, 16) for part in span.split("-"))
            found.append((start, stop - start))
    return found


def resident(path: Path) -> float:
    """Share of a file's pages that are in memory; 1 where the kernel does not tell."""
    data = np.memmap(path, np.uint8, mode="r")
    pages = np.zeros(-(-data.size // mmap.PAGESIZE), np.uint8)
    if _libc.mincore(data.ctypes.data, data.size, pages.ctypes.data) != 0:
        return 1.0
    return float((pages & 1).mean())
