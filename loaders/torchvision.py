"""Back end `torchvision`: `torchvision.io.decode_jpeg` over stored bytes, in threads; needs neither FFCV nor a compiler."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from loaders.beton import RAW
from loaders.decoder import CHECKSUM, CORRUPT, OK, WRONG_SIZE, Samples, StoredDecoder


def decode_rgb(encoded: np.ndarray, height: int, width: int, out: np.ndarray) -> int:
    """JPEG bytes (uint8 [n], writable memory) -> RGB in the uint8 vector `out`; returns the sample's status."""
    try:
        image = decode_jpeg(torch.from_numpy(encoded), ImageReadMode.RGB)
    except RuntimeError:
        return CORRUPT
    if tuple(image.shape[1:]) != (height, width):
        return WRONG_SIZE
    # By numpy: torch would start its own threads for a copy of this size.
    np.copyto(out.reshape(height, width, 3), image.permute(1, 2, 0).numpy())
    return OK


class TorchvisionDecoder(StoredDecoder):
    """Decodes a stored data set in a pool of `workers` threads."""

    name = "torchvision"

    def __init__(self, samples: Samples, workers: int) -> None:
        super().__init__(samples)
        self.workers = workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="fastssl-decode")

    def decode_into(self, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, offsets: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        def one(b: int) -> int:
            sample, height, width = int(ids[b]), int(heights[b]), int(widths[b])
            if not self.verify(sample):
                return CHECKSUM
            out = buffer[offsets[b] : offsets[b] + 3 * height * width]
            stored = self.samples.sample(sample)
            if self.samples.mode[sample] == RAW:
                np.copyto(out, stored)
                return OK
            # torch wants writable memory, and the file is mapped read-only.
            return decode_rgb(stored.copy(), height, width, out)

        return np.fromiter(self._pool.map(one, range(len(ids))), np.int32, len(ids))
