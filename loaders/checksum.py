"""CRC-32 of bytes in memory, for numba kernels: zlib's and PNG's CRC, sixteen bytes a step by table ("slicing-by-16",
Kounavis and Berry, IEEE ToC 2008).

The loads take absolute addresses, so one kernel serves samples of several mapped files.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types, uint32, uint64
from numba.extending import intrinsic

_POLYNOMIAL = 0xEDB88320


def _tables() -> np.ndarray:
    """uint32 [16, 256]: what byte value v, k bytes before the end of a step, adds to the CRC."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ _POLYNOMIAL, table >> 1).astype(np.uint32)
    tables = [table]
    for _ in range(15):
        tables.append((tables[-1] >> 8) ^ table[tables[-1] & 0xFF])
    return np.stack(tables)


_T = _tables()


@intrinsic
def load_u8(_typing, address):
    """The byte at a memory address."""

    def code(_context, builder, _signature, args):
        return builder.load(builder.inttoptr(args[0], ir.IntType(8).as_pointer()))

    return types.uint8(types.uint64), code


@intrinsic
def _load_u64(_typing, address):
    """Eight bytes at a memory address of any alignment, the first one lowest (x86 and ARM are little-endian)."""

    def code(_context, builder, _signature, args):
        return builder.load(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), align=1)

    return types.uint64(types.uint64), code


@njit
def _part(k, word, shift):
    return uint64(_T[k, (word >> uint64(shift)) & uint64(0xFF)])


@njit(nogil=True)
def crc32(address, size):
    """CRC-32 of the `size` bytes at memory address `address` (uint64): uint32, equal to zlib.crc32."""
    crc = uint64(0xFFFFFFFF)
    p = uint64(address)
    end = p + uint64(size)
    while p + uint64(16) <= end:
        a, b = _load_u64(p) ^ crc, _load_u64(p + uint64(8))
        crc = (
            _part(15, a, 0)
            ^ _part(14, a, 8)
            ^ _part(13, a, 16)
            ^ _part(12, a, 24)
            ^ _part(11, a, 32)
            ^ _part(10, a, 40)
            ^ _part(9, a, 48)
            ^ _part(8, a, 56)
            ^ _part(7, b, 0)
            ^ _part(6, b, 8)
            ^ _part(5, b, 16)
            ^ _part(4, b, 24)
            ^ _part(3, b, 32)
            ^ _part(2, b, 40)
            ^ _part(1, b, 48)
            ^ _part(0, b, 56)
        )
        p += uint64(16)
    while p < end:
        crc = (crc >> uint64(8)) ^ _part(0, crc ^ uint64(load_u8(p)), 0)
        p += uint64(1)
    return uint32(crc ^ uint64(0xFFFFFFFF))
