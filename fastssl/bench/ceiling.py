"""The bound of a loader: bare libjpeg-turbo over the same bytes, with the flags of the ffcv back end; for raw images, memcpy.

No batch of decoded images is kept, nothing is checked, nothing is handed over.  Raw images go into the memory of a batch all
the same: a copy into the processor's cache would bound nothing that a loader does.
"""

from __future__ import annotations

import ctypes
from itertools import count

import llvmlite.binding
import numba
import numpy as np
from numba import njit, prange, types

from loaders import ffcv
from loaders.beton import JPEG, RAW
from loaders.decoder import Samples
from loaders.order import Order

llvmlite.binding.add_symbol("fastssl_bench_memcpy", ctypes.cast(ctypes.CDLL(None).memcpy, ctypes.c_void_p).value)
_memcpy = types.ExternalFunction("fastssl_bench_memcpy", types.uintp(types.uintp, types.uintp, types.uintp))


@njit(nogil=True, parallel=True)
def _decode(address, size, ids, heights, widths, rows):
    """Every JPEG into its thread's own row."""
    target = rows.ctypes.data
    for b in prange(ids.shape[0]):
        i = ids[b]
        row = target + np.uint64(numba.get_thread_id() * rows.shape[1])
        ffcv.imdecode(address[i], size[i], heights[i], widths[i], row, heights[i], widths[i], 0, 0, 1, 1, 0, 0)


@njit(nogil=True, parallel=True)
def _copy(address, size, ids, room, batch):
    """Every raw image into its place of the batch, `room` bytes each."""
    target = batch.ctypes.data
    for b in prange(ids.shape[0]):
        _memcpy(target + np.uint64(b * room), address[ids[b]], size[ids[b]])


class Ceiling:
    """Batches of `ids` in the loader's order, through the bare library."""

    def __init__(self, samples: Samples, ids: np.ndarray, batch: int, threads: int) -> None:
        self._samples, self._ids, self._threads = samples, ids, threads
        self._order, self._step = Order(len(ids), batch, 0), count()
        self._raw = bool((samples.mode == RAW).all())
        self._room = int((3 * samples.height[ids].astype(np.int64) * samples.width[ids]).max())
        rows = batch if self._raw else numba.config.NUMBA_NUM_THREADS
        self._memory = np.empty((rows, self._room), np.uint8)
        self.what = "memcpy" if self._raw else "bare libjpeg-turbo"

    def one_batch(self) -> None:
        samples, ids = self._samples, self._ids[self._order.ids(next(self._step))]
        numba.set_num_threads(self._threads)
        with numba.parallel_chunksize(1):
            if self._raw:
                _copy(samples.address, samples.size, ids, self._room, self._memory)
            else:
                _decode(samples.address, samples.size, ids, samples.height, samples.width, self._memory)


def ceiling(samples: Samples, ids: np.ndarray, batch: int, threads: int) -> Ceiling | str:
    """The bound for these samples, or why there is none."""
    if problem := ffcv.load():
        return f"bare decoding needs FFCV's library: {problem} (`make setup`)"
    if len({JPEG, RAW} & set(samples.mode[ids].tolist())) == 2:
        return "the file holds JPEGs and raw images; there is a bound for either kind only"
    return Ceiling(samples, ids, batch, threads)
