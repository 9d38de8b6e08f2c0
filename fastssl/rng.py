"""Keyed, counter-based draws: Philox-4x32-10 (Salmon et al., SC 2011), the same stream in numba and in torch.

Every random number of the data path is `uniform(seed, stream, epoch, sample, view, slot)`: a pure function, so a crop or
a colour does not depend on the back end, the number of workers or ranks, or on where a run was resumed.

Counter words: sample (its id, or in a balanced order its position in the epoch; < 2**32), epoch, view | stream << 16, block of
four slots.  Key: the two halves of the seed.
torch is imported inside the torch forms only: loader threads and converters need none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numba import njit, uint32, uint64

if TYPE_CHECKING:
    import torch

# Streams keep draws of different purposes apart.
ORDER, CROP, COLOUR, MASK, PATCH, STEP = 0, 1, 2, 3, 4, 5
MONTAGE, TUNING = 6, 7

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_U32 = 0xFFFFFFFF
_ROUNDS = 10
_TO_UNIT = 2.0**-32


@njit(inline="always", nogil=True)
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on four uint32 counter words with two uint32 key words -> four uint32."""
    c0, c1, c2, c3 = uint32(c0), uint32(c1), uint32(c2), uint32(c3)
    k0, k1 = uint32(k0), uint32(k1)
    for _ in range(_ROUNDS):
        p0 = uint64(_M0) * uint64(c0)
        p1 = uint64(_M1) * uint64(c2)
        c0, c1, c2, c3 = (
            uint32((p1 >> uint64(32)) ^ uint64(c1) ^ uint64(k0)),
            uint32(p1 & uint64(_U32)),
            uint32((p0 >> uint64(32)) ^ uint64(c3) ^ uint64(k1)),
            uint32(p0 & uint64(_U32)),
        )
        k0 = uint32(uint64(k0) + uint64(_W0))
        k1 = uint32(uint64(k1) + uint64(_W1))
    return c0, c1, c2, c3


@njit(nogil=True)
def fill_uniform(out, seed, stream, epoch, sample, view):
    """Fill the float64 vector `out` with slots 0..len(out)-1 of one (sample, view): values in [0, 1)."""
    k0, k1 = uint64(seed) & uint64(_U32), uint64(seed) >> uint64(32)
    n = out.shape[0]
    for block in range((n + 3) // 4):
        words = philox4x32(sample, epoch, view | (stream << 16), block, k0, k1)
        for j in range(4):
            if 4 * block + j < n:
                out[4 * block + j] = words[j] * _TO_UNIT


@njit(nogil=True)
def uniform(seed, stream, epoch, sample, view, slot):
    """Slot `slot` of what `fill_uniform` fills, alone: for draws whose number is not known before."""
    words = philox4x32(sample, epoch, view | (stream << 16), slot // 4, uint64(seed) & uint64(_U32), uint64(seed) >> uint64(32))
    return words[slot % 4] * _TO_UNIT


@njit(nogil=True)
def random_u32(seed, stream, epoch, a, b):
    """One uint32 for the counter (a, epoch, b | stream << 16, 0): what a hash of two small integers needs."""
    word, _, _, _ = philox4x32(a, epoch, b | (stream << 16), 0, uint64(seed) & uint64(_U32), uint64(seed) >> uint64(32))
    return word


def uniform_torch(seed: int, stream: int, epoch: int, sample: torch.Tensor, views: torch.Tensor, slots: int):
    """[B] samples, [V] view ids -> float64 [V, B, slots] on their device: the numbers `fill_uniform` gives.

    int64 products wrap around; the bits are those of the unsigned product, so a mask after the shift is enough.
    """
    import torch

    blocks = torch.arange((slots + 3) // 4, device=sample.device)
    c0, c2, c3 = torch.broadcast_tensors(sample[None, :, None], (views | (stream << 16))[:, None, None], blocks[None, None, :])
    c1 = torch.full_like(c0, epoch)
    k0, k1 = seed & _U32, (seed >> 32) & _U32
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _U32) ^ c1 ^ k0, p1 & _U32, ((p0 >> 32) & _U32) ^ c3 ^ k1, p0 & _U32
        k0, k1 = (k0 + _W0) & _U32, (k1 + _W1) & _U32
    words = torch.stack((c0, c1, c2, c3), dim=-1).flatten(2)[..., :slots]
    return words.double() * _TO_UNIT


def permutations(count: int, size: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    """int64 [count, size] on the host: so many random orders of 0 .. size - 1, each keyed by its number."""
    import torch

    keys = uniform_torch(seed, stream, epoch, torch.arange(size), torch.arange(count), 1)
    return keys[..., 0].argsort(dim=1, stable=True).numpy()
