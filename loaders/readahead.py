"""Ask the kernel to read mapped bytes before they are decoded, so that a cold disk is read many samples at a time.

madvise(MADV_WILLNEED) starts the reads and does not wait for them.  The mappings keep the kernel's default readahead: a
sample that was not announced still arrives in pieces of 128 KB or so, where MADV_RANDOM would fetch it page by page.
"""

from __future__ import annotations

import mmap

import numpy as np
from numba import njit, types, uint64

# int madvise(void *address, size_t length, int advice).
_madvise = types.ExternalFunction("madvise", types.int32(types.uintp, types.uint64, types.int32))
_WILLNEED = mmap.MADV_WILLNEED


# One call without the GIL: mmap.madvise would hold it while a busy disk takes the requests.
@njit(nogil=True)
def _advise(first, last, page):
    """Announce the pages [first, last) of each sample, sorted by `first`; ranges that touch are joined."""
    i = 0
    while i < first.shape[0]:
        start, stop = first[i], last[i]
        i += 1
        while i < first.shape[0] and first[i] <= stop:
            stop = max(stop, last[i])
            i += 1
        # A refusal only means that the bytes are read when they are needed.
        _madvise(start * page, (stop - start) * page, _WILLNEED)


def will_need(address: np.ndarray, size: np.ndarray) -> None:
    """Announce the bytes at memory addresses uint64 [B] `address`, `size` each, all of them in mapped files."""
    page = np.uint64(mmap.PAGESIZE)
    first = address // page
    last = (address + size + page - np.uint64(1)) // page
    order = np.argsort(first)
    _advise(first[order], last[order], uint64(page))
