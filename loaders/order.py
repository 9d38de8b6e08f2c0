"""Which samples belong to a step: a pure function of (seed, step, rank, world), without a table of the epoch.

An epoch is a list of positions; step s takes the next G of them, G the global batch, and ranks take equal consecutive
slices of a step.  What lies at a position is one of

    shuffle      a keyed permutation of all samples
    chunks       pieces of 256 consecutive samples in permuted order, mixed within windows of 64 pieces: for files larger
                 than the memory, which reads a window (about 1 GB of ImageNet) at a time, and in long pieces
    balanced     every class once, in a random order, then again; each class goes through its own images before it repeats
    sequential   the stored order

Permutations are Feistel networks over the next power of four; positions that land outside are sent through again until
they fall inside (cycle walking; Black and Rogaway, CT-RSA 2002).  Any position costs the same, so a run starts anywhere at
once and 8 ranks hold no copy of a 1.28 M list.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numba import int64, njit, uint32, uint64

from fastssl.rng import ORDER, random_u32
from loaders.errors import DataError

Sampling = Literal["shuffle", "chunks", "balanced", "sequential"]
LastBatch = Literal["drop", "keep"]

CHUNK = 256
"""Consecutive samples of a chunk: 14 MB of ImageNet at 500 pixels."""
WINDOW = 64 * CHUNK
"""Samples that are mixed: 0.9 GB."""

_ROUNDS = 8
# What a permutation is for, so that no two of them share their keys.
_EPOCH, _CHUNKS, _WINDOWS, _CLASSES, _MEMBERS, _DRAW = range(6)


@njit(nogil=True)
def _half_bits(size):
    """Bits of each of two equal halves that together count to `size`; at least one."""
    bits = 1
    while (int64(1) << (2 * bits)) < size:
        bits += 1
    return bits


@njit(nogil=True)
def _place(position, size, half_bits, seed, epoch, purpose):
    """Where a permutation of [0, size) sends `position`."""
    mask = uint64((1 << half_bits) - 1)
    x = uint64(position)
    while True:
        left, right = x >> uint64(half_bits), x & mask
        for r in range(_ROUNDS):
            left, right = right, left ^ (uint64(random_u32(seed, ORDER, epoch, uint32(right), r | (purpose << 8))) & mask)
        x = (left << uint64(half_bits)) | right
        if x < uint64(size):
            return int64(x)


@njit(nogil=True)
def _key(seed, purpose, a, b):
    """A seed of its own for number (a, b), both below 2**32, of the permutations of one purpose."""
    high = uint64(random_u32(seed, ORDER, a, b, (purpose << 8) | 0xFE))
    return (high << uint64(32)) | uint64(random_u32(seed, ORDER, a, b, (purpose << 8) | 0xFF))


@njit(nogil=True)
def _shuffled(out, first, size, seed, epoch):
    bits = _half_bits(size)
    for j in range(out.shape[0]):
        out[j] = _place((first + j) % size, size, bits, seed, epoch, _EPOCH)


@njit(nogil=True)
def _chunked(out, first, size, seed, epoch, mixed):
    """Chunks are counted from another sample each epoch, round the end of the file, so that the short one, which comes last,
    is not always the same.  mixed: permute the samples of each window."""
    full = size // CHUNK
    chunk_bits = _half_bits(full)
    start = int64(_key(seed, _CHUNKS, epoch, 0) % uint64(size))
    window, room, bits, key = -1, 0, 1, uint64(0)
    for j in range(out.shape[0]):
        x = (first + j) % size
        if mixed:
            if x // WINDOW != window:
                window = x // WINDOW
                room = min(WINDOW, size - window * WINDOW)
                bits = _half_bits(room)
                key = _key(seed, _WINDOWS, epoch, window)
            x = window * WINDOW + _place(x - window * WINDOW, room, bits, key, epoch, _WINDOWS)
        chunk = x // CHUNK
        if chunk < full:
            chunk = _place(chunk, full, chunk_bits, seed, epoch, _CHUNKS)
        out[j] = (start + chunk * CHUNK + x % CHUNK) % size


@njit(nogil=True)
def _balanced(out, before, first, length, members, starts, seed):
    """before: positions of all earlier epochs, each of `length`; class c has the samples members[starts[c] : starts[c + 1]]."""
    classes = starts.shape[0] - 1
    class_bits = _half_bits(classes)
    turn, key = int64(-1), uint64(0)
    for j in range(out.shape[0]):
        position = before + (first + j) % length
        if position // classes != turn:
            turn = position // classes
            key = _key(seed, _CLASSES, turn >> 32, turn)
        c = _place(position - turn * classes, classes, class_bits, key, 0, _CLASSES)
        size = starts[c + 1] - starts[c]
        cycle = _key(seed, _MEMBERS, turn // size, c)
        out[j] = members[starts[c] + _place(turn % size, size, _half_bits(size), cycle, 0, _MEMBERS)]


@njit(nogil=True)
def _drawn(out, size, seed, number):
    key, bits = _key(seed, _DRAW, 0, number), _half_bits(size)
    for j in range(out.shape[0]):
        out[j] = _place(j, size, bits, key, 0, _DRAW)


def draw(count: int, size: int, seed: int, number: int) -> np.ndarray:
    """int64 [count]: different numbers below `size`, the random choice number `number` of this seed."""
    out = np.empty(count, np.int64)
    _drawn(out, size, _seed(seed), number)
    return out


def _seed(seed: int) -> np.uint64:
    return np.uint64(seed % 2**64)


class Order:
    """Endless global order of a data set of `num_samples`, or of its part `ids`.

    ids         sorted sample ids, int64 [M]: the epoch has M positions
    labels      int64 [num_samples], for balanced sampling.  Its epoch is as long as any other, and the classes take turns
                across epochs: every image of a class comes equally often
    last_batch  drop: an epoch ends with its last complete batch, and leaves out other samples each time.  keep: the rest is
                one smaller batch, filled up with the epoch's first samples to a multiple of `multiple_of` (ranks times
                micro-batches; it must divide the global batch), as PyTorch's DistributedSampler fills up.  How many are
                added depends on the number of ranks; everything else about the global order does not
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        seed: int = 0,
        *,
        sampling: Sampling = "shuffle",
        last_batch: LastBatch = "drop",
        ids: np.ndarray | None = None,
        labels: np.ndarray | None = None,
        multiple_of: int = 1,
    ) -> None:
        if sampling not in get_args(Sampling) or last_batch not in get_args(LastBatch):
            raise DataError(
                f"There is no order '{sampling}' with the last batch '{last_batch}'. Choose --data.order from "
                f"{', '.join(get_args(Sampling))} and --data.last-batch from {', '.join(get_args(LastBatch))}."
            )
        if global_batch_size < 1:
            raise DataError(f"A batch of {global_batch_size} images is empty; set the global batch size to at least 1.")
        self.num_samples = num_samples if ids is None else len(ids)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.sampling = sampling
        whole, rest = divmod(self.num_samples, global_batch_size)
        kept = last_batch == "keep" and rest > 0
        if whole + kept == 0:
            raise DataError(
                f"The data set has {self.num_samples} images, fewer than one global batch of {global_batch_size}, so no step would "
                f"ever be complete. Use more data, or a batch of at most {self.num_samples} (--train.global-batch-size; of evaluations "
                "--batch)."
            )
        self.steps_per_epoch = whole + kept
        self._last = -(-rest // multiple_of) * multiple_of if kept else global_batch_size
        self._length = self.num_samples if kept else whole * global_batch_size
        """Different positions of an epoch."""
        self._windows = -(-self.num_samples // WINDOW)
        self._ids = ids
        if sampling == "balanced":
            if labels is None:
                raise DataError("A balanced order needs labels, and these images have none. Choose --data.order shuffle or chunks.")
            labels = labels if ids is None else labels[ids]
            self._members = np.argsort(labels, kind="stable")
            counts = np.unique(labels, return_counts=True)[1]
            self._starts = np.concatenate(([0], np.cumsum(counts)))

    def epoch(self, step: int) -> int:
        """Epoch that global step `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def batch_size(self, step: int) -> int:
        """Images of global step `step` on all ranks: G, or fewer in a kept last batch."""
        return self._last if (step + 1) % self.steps_per_epoch == 0 else self.global_batch_size

    def ids(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """int64 [batch_size(step) / world]: this rank's samples of a step; consecutive equal pieces are its micro-batches."""
        size = self.batch_size(step)
        if size % world:
            raise DataError(
                f"A global batch of {size} images cannot be shared equally by {world} ranks; "
                f"set the global batch size to a multiple of {world}."
            )
        epoch, seed = self.epoch(step), _seed(self.seed)
        out = np.empty(size // world, np.int64)
        first = step % self.steps_per_epoch * self.global_batch_size + rank * len(out)
        if self.sampling == "shuffle":
            _shuffled(out, first, self.num_samples, seed, epoch)
        elif self.sampling == "chunks":
            _chunked(out, first, self.num_samples, seed, epoch, True)
        elif self.sampling == "balanced":
            _balanced(out, epoch * self._length, first, self._length, self._members, self._starts, seed)
        else:
            out[:] = np.arange(first, first + len(out)) % self.num_samples
        return out if self._ids is None else self._ids[out]

    def keys(self, step: int, ids: np.ndarray, rank: int = 0) -> np.ndarray:
        """int64, what keys the random draws of `ids`, a rank's samples of a step, beside epoch and view: the sample id.  In a
        balanced order, where an image may come twice in an epoch and even in a step, its position in the epoch."""
        if self.sampling != "balanced":
            return ids
        first = step % self.steps_per_epoch * self.global_batch_size + rank * len(ids)
        return np.arange(first, first + len(ids))

    def window(self, step: int) -> int:
        """Number, counted from the first epoch on, of the window of chunks that a step ends in."""
        epoch, within = divmod(step, self.steps_per_epoch)
        last = min(within * self.global_batch_size + self.batch_size(step), self.num_samples) - 1
        return epoch * self._windows + last // WINDOW

    def window_ids(self, window: int) -> np.ndarray:
        """int64 [<= WINDOW]: sorted samples of a window, long pieces of consecutive ones."""
        epoch, number = divmod(window, self._windows)
        out = np.empty(min(WINDOW, self.num_samples - number * WINDOW), np.int64)
        _chunked(out, number * WINDOW, self.num_samples, _seed(self.seed), epoch, False)
        out.sort()
        return out if self._ids is None else self._ids[out]


def shard(num_samples: int, rank: int, world: int) -> range:
    """This rank's samples of one sequential pass: every sample on exactly one rank, in order, sizes differing by at most one."""
    return range(rank * num_samples // world, (rank + 1) * num_samples // world)
