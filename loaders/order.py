"""Which samples belong to a step: a pure function of (seed, epoch, step, rank, world), without a table.

The order of an epoch is a keyed permutation of [0, num_samples): a Feistel network over the next power of four, and
positions that land outside are sent through it again until they fall inside (cycle walking; Black and Rogaway, CT-RSA
2002).  Any position costs the same, so a run starts anywhere at once and 8 ranks hold no copy of a 1.28 M list.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint32, uint64

from fastssl.rng import ORDER, random_u32
from loaders.errors import DataError

_ROUNDS = 8


@njit(nogil=True)
def _permute(out, first, num_samples, half_bits, seed, epoch):
    """Fill `out` with the samples at positions first, first + 1, ... of the epoch's permutation."""
    mask = uint64((1 << half_bits) - 1)
    for j in range(out.shape[0]):
        x = uint64(first + j)
        while True:
            left, right = x >> uint64(half_bits), x & mask
            for r in range(_ROUNDS):
                left, right = right, left ^ (uint64(random_u32(seed, ORDER, epoch, uint32(right), r)) & mask)
            x = (left << uint64(half_bits)) | right
            if x < uint64(num_samples):
                break
        out[j] = x


class Order:
    """Endless global order: step s of an epoch takes positions [s * G, (s + 1) * G) of its permutation, G the global batch.

    The tail of fewer than G samples is left out, another one each epoch (drop_last).  Ranks take equal consecutive slices,
    so the samples of a step do not depend on how many ranks share it.
    """

    def __init__(self, num_samples: int, global_batch_size: int, seed: int = 0, shuffle: bool = True) -> None:
        if global_batch_size < 1:
            raise DataError(f"A batch of {global_batch_size} images is empty; set the global batch size to at least 1.")
        if num_samples < global_batch_size:
            raise DataError(
                f"The data set has {num_samples} images, fewer than one global batch of {global_batch_size}, so no step would "
                f"ever be complete. Set the global batch size to at most {num_samples}, or use more data."
            )
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.steps_per_epoch = num_samples // global_batch_size
        # Two equal halves whose product covers every position; at least one bit each.
        self._half_bits = max(1, ((num_samples - 1).bit_length() + 1) // 2)

    def epoch(self, step: int) -> int:
        """Epoch that global step `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def ids(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """int64 [G / world]: this rank's samples of global step `step`; consecutive pieces of it are its micro-batches."""
        if self.global_batch_size % world:
            raise DataError(
                f"A global batch of {self.global_batch_size} images cannot be shared equally by {world} ranks; "
                f"set the global batch size to a multiple of {world}."
            )
        count = self.global_batch_size // world
        first = (step % self.steps_per_epoch) * self.global_batch_size + rank * count
        if not self.shuffle:
            return np.arange(first, first + count, dtype=np.int64)
        out = np.empty(count, np.int64)
        _permute(out, first, self.num_samples, self._half_bits, np.uint64(self.seed % 2**64), self.epoch(step))
        return out


def shard(num_samples: int, rank: int, world: int) -> range:
    """This rank's samples of one sequential pass: every sample on exactly one rank, in order, sizes differing by at most one."""
    return range(rank * num_samples // world, (rank + 1) * num_samples // world)
