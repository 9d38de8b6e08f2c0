"""Back end `ffcv`: FFCV's native JPEG decoder (libjpeg-turbo, fast DCT), called from one parallel kernel of ours.

FFCV's Loader is not used: it sets torch's thread count, re-pins its buffers every epoch, and decodes once per pipeline.  Nor
is its Python package imported (it pulls OpenCV's bindings and, on Python >= 3.12, setuptools): its extension module is an
ordinary shared library, and the two C functions we need are given to the kernel by address.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
from contextlib import suppress
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
from numba import njit, prange, types

from loaders.beton import RAW
from loaders.decoder import CORRUPT, OK, OUTSIDE, WRONG_SIZE, BetonDecoder
from loaders.errors import DataError

# int imdecode(source, source_size, height, width, target, crop_height, crop_width, crop_y, crop_x, scale_num, scale_denom,
#              bool crop, bool flip);  void my_memcpy(source, target, size).
imdecode = types.ExternalFunction(
    "fastssl_imdecode", types.int32(types.uintp, types.uint64, types.uint32, types.uint32, types.uintp, *[types.uint32] * 8)
)
_memcpy = types.ExternalFunction("fastssl_memcpy", types.void(types.uintp, types.uintp, types.uint64))


@functools.cache
def load() -> str | None:
    """Make the native functions and numba's TBB threads ready, once; None, or why that is impossible."""
    package = importlib.util.find_spec("ffcv")
    library = next((f for d in package.submodule_search_locations for f in Path(d).glob("_libffcv*.so")), None) if package else None
    if library is None:
        return "FFCV is not installed"
    _prefer_own_tbb()
    try:
        native = ctypes.CDLL(str(library))
    except OSError as error:
        return f"FFCV's native library cannot be loaded ({error})"
    for symbol, function in (("fastssl_imdecode", native.imdecode), ("fastssl_memcpy", native.my_memcpy)):
        llvmlite.binding.add_symbol(symbol, ctypes.cast(function, ctypes.c_void_p).value)

    # numba's other layer, workqueue, ends the process when the threads of two loaders call kernels at once.
    numba.config.THREADING_LAYER = "tbb"
    try:
        numba.get_num_threads()
    except ValueError:
        return "numba finds no TBB threading layer (package tbb)"
    if numba.threading_layer() == "workqueue":
        return "numba was already started with its workqueue threading layer (set NUMBA_THREADING_LAYER=tbb)"
    return None


def _prefer_own_tbb() -> None:
    """Load the libtbb of the `tbb` package before anything asks for one.

    The wheel puts it into the environment's lib folder, where the dynamic linker does not look, and a libtbb of the system
    (a dependency of FFCV's OpenCV) may be too old for numba.
    """
    with suppress(importlib.metadata.PackageNotFoundError, OSError):
        for file in importlib.metadata.files("tbb") or ():
            if file.name == "libtbb.so.12":
                ctypes.CDLL(str(file.locate()), ctypes.RTLD_GLOBAL)


@njit(nogil=True)
def _jpeg_size(data, start, stop):
    """Height and width in the frame header of the JPEG data[start:stop]; 0, 0 without one."""
    if stop - start < 4 or data[start] != 0xFF or data[start + 1] != 0xD8:
        return 0, 0
    p = start + 2
    while p + 9 <= stop:
        if data[p] != 0xFF:
            return 0, 0
        marker = data[p + 1]
        if marker == 0xFF:
            p += 1
        elif 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            return np.int64(data[p + 5]) << 8 | data[p + 6], np.int64(data[p + 7]) << 8 | data[p + 8]
        else:
            p += 2 + (np.int64(data[p + 2]) << 8 | data[p + 3])
    return 0, 0


@njit(nogil=True, parallel=True)
def _decode(data, ptr, size, raw, ids, heights, widths, offsets, buffer, status):
    source, target = data.ctypes.data, buffer.ctypes.data
    for b in prange(ids.shape[0]):
        start, count = np.int64(ptr[ids[b]]), np.int64(size[ids[b]])
        height, width = np.int64(heights[b]), np.int64(widths[b])
        room = offsets[b] >= 0 and offsets[b] + 3 * height * width <= buffer.shape[0]
        if start < 0 or count < 0 or start + count > data.shape[0] or not room:
            status[b] = OUTSIDE
        elif raw[ids[b]]:
            if count == 3 * height * width:
                _memcpy(source + start, target + offsets[b], count)
                status[b] = OK
            else:
                status[b] = WRONG_SIZE
        else:
            # Given a wrong size, the decoder would scale or overrun the target without an error.
            found_height, found_width = _jpeg_size(data, start, start + count)
            if found_height != height or found_width != width:
                status[b] = CORRUPT if found_height == 0 else WRONG_SIZE
            elif imdecode(source + start, count, height, width, target + offsets[b], height, width, 0, 0, 1, 1, 0, 0) != 0:
                status[b] = CORRUPT
            else:
                status[b] = OK


class FFCVDecoder(BetonDecoder):
    """Decodes a .beton with FFCV's library in `workers` threads of numba's."""

    name = "ffcv"

    def __init__(self, path: str | os.PathLike, workers: int) -> None:
        if problem := load():
            raise DataError(f"The loader ffcv cannot be used here: {problem}. Run `make setup`, or take --efficiency.loader torchvision.")
        super().__init__(path)
        self._data = self.beton.data.view(np.ndarray)
        self._raw = self.beton.mode == RAW
        self.workers = min(workers, numba.config.NUMBA_NUM_THREADS)

    def decode_into(self, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, offsets: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        status = np.empty(len(ids), np.int32)
        numba.set_num_threads(self.workers)  # of the calling thread only
        with numba.parallel_chunksize(1):  # images differ in size: one at a time to whoever is free
            _decode(self._data, self.beton.ptr, self.beton.size, self._raw, ids, heights, widths, offsets, buffer, status)
        return status
