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
from contextlib import suppress
from pathlib import Path

import llvmlite.binding
import numba
import numpy as np
from numba import njit, prange, types

from loaders.beton import RAW
from loaders.checksum import crc32, load_u8
from loaders.decoder import CHECKSUM, CORRUPT, OK, OUTSIDE, WRONG_SIZE, Samples, StoredDecoder
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
def _at(start, p):
    return np.int64(load_u8(start + np.uint64(p)))


@njit(nogil=True)
def _jpeg_size(start, size):
    """Height and width in the frame header of the JPEG of `size` bytes at address `start`; 0, 0 without one."""
    if size < 4 or _at(start, 0) != 0xFF or _at(start, 1) != 0xD8:
        return 0, 0
    p = 2
    while p + 9 <= size:
        if _at(start, p) != 0xFF:
            return 0, 0
        marker = _at(start, p + 1)
        if marker == 0xFF:
            p += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD7:  # these stand alone
            p += 2
        elif marker == 0xD9 or marker == 0xDA:  # the image or its scan, without a frame header
            return 0, 0
        elif 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            return _at(start, p + 5) << 8 | _at(start, p + 6), _at(start, p + 7) << 8 | _at(start, p + 8)
        else:
            p += 2 + (_at(start, p + 2) << 8 | _at(start, p + 3))
    return 0, 0


@njit(nogil=True, parallel=True)
def _decode(address, size, raw, crcs, unchecked, ids, heights, widths, offsets, buffer, status):
    target = buffer.ctypes.data
    for b in prange(ids.shape[0]):
        i = ids[b]
        start, count = address[i], np.int64(size[i])
        height, width = np.int64(heights[b]), np.int64(widths[b])
        check = unchecked.shape[0] > 0 and unchecked[i]
        if offsets[b] < 0 or offsets[b] + 3 * height * width > buffer.shape[0]:
            status[b] = OUTSIDE
        elif check and crc32(start, count) != crcs[i]:
            status[b] = CHECKSUM
        else:
            if check:
                unchecked[i] = False
            if raw[i]:
                if count == 3 * height * width:
                    _memcpy(start, target + np.uint64(offsets[b]), count)
                    status[b] = OK
                else:
                    status[b] = WRONG_SIZE
            else:
                # Given a wrong size, the decoder would scale or overrun the target without an error.
                found_height, found_width = _jpeg_size(start, count)
                if found_height != height or found_width != width:
                    status[b] = CORRUPT if found_height == 0 else WRONG_SIZE
                elif imdecode(start, count, height, width, target + np.uint64(offsets[b]), height, width, 0, 0, 1, 1, 0, 0) != 0:
                    status[b] = CORRUPT
                else:
                    status[b] = OK


class FFCVDecoder(StoredDecoder):
    """Decodes a stored data set with FFCV's library in `workers` threads of numba's."""

    name = "ffcv"

    def __init__(self, samples: Samples, workers: int) -> None:
        if problem := load():
            raise DataError(f"The loader ffcv cannot be used here: {problem}. Run `make setup`, or take --efficiency.loader torchvision.")
        super().__init__(samples)
        self.workers = min(workers, numba.config.NUMBA_NUM_THREADS)
        self._raw = samples.mode == RAW
        # Without CRCs the kernel gets empty vectors: an argument of it has one type.
        known = self.unchecked is not None
        self._crcs = np.array(samples.crc32 if known else (), np.uint32)
        self._unchecked = self.unchecked if known else np.empty(0, np.bool_)

    def decode_into(self, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, offsets: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        samples = self.samples
        status = np.empty(len(ids), np.int32)
        numba.set_num_threads(self.workers)  # of the calling thread only
        with numba.parallel_chunksize(1):  # images differ in size: one at a time to whoever is free
            _decode(
                *(samples.address, samples.size, self._raw, self._crcs, self._unchecked),
                *(ids, heights, widths, offsets, buffer, status),
            )
        return status
