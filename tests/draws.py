"""Random numbers of a batch as the host draws them, one sample after the other."""

from __future__ import annotations

import numpy as np

from fastssl.rng import fill_uniform


def uniform_numpy(seed: int, stream: int, epoch: int, sample: np.ndarray, view: int, slots: int) -> np.ndarray:
    """[B] sample ids -> float64 [B, slots] on the host."""
    out = np.empty((len(sample), slots))
    for row, s in zip(out, sample, strict=True):
        fill_uniform(row, seed, stream, epoch, s, view)
    return out
