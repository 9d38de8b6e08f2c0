"""What a back end is: something that knows its samples' sizes and decodes them into memory it is given."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from loaders.errors import DataError

if TYPE_CHECKING:
    import torch

OK, CORRUPT, WRONG_SIZE, OUTSIDE, CHECKSUM = 0, 1, 2, 3, 4
"""Status of a decoded sample."""

_REASONS = {
    CORRUPT: "its bytes are not a complete JPEG",
    WRONG_SIZE: "its image has another size than the tables say",
    OUTSIDE: "its pixels do not fit into the place that was made for them",
    CHECKSUM: "its bytes are not those that were written",
}


class Samples(Protocol):
    """A stored data set of N samples, by sample id: `Beton` (one file) or `Shards` (several tars).

    The columns are checked when the set is opened and cannot be changed afterwards, so native code may rely on them.
    """

    path: Path
    """The file to name: the .beton, or the shards' NAME.json."""
    mode: np.ndarray
    """uint8 [N], JPEG or RAW of loaders/beton.py."""
    height: np.ndarray
    """int32 [N], pixels."""
    width: np.ndarray
    """int32 [N], pixels."""
    size: np.ndarray
    """uint64 [N], bytes."""
    address: np.ndarray
    """uint64 [N]: where the first byte of each sample lies in this process's memory.  Valid while this object lives."""
    label: np.ndarray | None
    """int64 [N], or None."""

    @property
    def classes(self) -> list[str] | None:
        """Class names by label, when known."""

    @property
    def source(self) -> str | None:
        """What the images were converted from, when known."""

    @property
    def names(self) -> list[str] | None:
        """Path of each sample below `source`, when known."""

    @property
    def crc32(self) -> np.ndarray | None:
        """uint32 [N]: CRC-32 (zlib's) of each sample's bytes as written, when known."""

    @property
    def again(self) -> str:
        """The next step when the set is damaged: how to make it anew."""

    def __len__(self) -> int: ...

    def sample(self, i: int) -> np.ndarray:
        """The stored bytes of sample i: uint8 [size], a read-only view of the file."""

    def file(self, i: int) -> Path:
        """The file that holds sample i."""

    def will_need(self, ids: np.ndarray) -> None:
        """Ask the kernel to read the samples int64 [B] `ids` ahead; returns at once."""


class Decoder(Protocol):
    """A data set whose N samples can be decoded once each to uint8 RGB.  Called from one thread at a time."""

    name: str
    path: Path
    workers: int
    """Threads it decodes with."""
    on_device: bool
    """Whether it decodes into memory of the device."""
    labels: np.ndarray | None
    """int64 [N], or None."""
    classes: Sequence[str] | None
    """Class names by label, when known."""

    def __len__(self) -> int: ...

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [B] sample ids -> heights, widths: int32 [B], before anything is decoded."""

    def will_need(self, ids: np.ndarray) -> None:
        """Say that the samples int64 [B] `ids` will be decoded soon; returns at once."""

    def decode_into(
        self, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, offsets: np.ndarray, buffer: np.ndarray | torch.Tensor
    ) -> np.ndarray:
        """Write sample ids[b] as height x width x 3 bytes from byte offsets[b] of the uint8 vector `buffer`; return the
        status of each, int32 [B].

        `buffer` is a numpy vector, or for a decoder with `on_device` a CUDA tensor, to be filled on the current stream.
        """

    def error(self, sample: int, status: int) -> DataError:
        """What to tell the user about a sample whose status is not OK."""


class StoredDecoder:
    """The part of a decoder that is the same for every way to decode a stored data set.

    Where the set knows its samples' CRC-32, the bytes of a sample are compared with it the first time this process decodes
    the sample, and not again: a changed byte costs one pass over the data, not one per epoch.
    """

    on_device = False

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        self.path = samples.path
        self.labels = samples.label
        self.classes = samples.classes
        # Two threads that meet at one sample both check it and write the same value.
        self.unchecked = None if samples.crc32 is None else np.ones(len(samples), np.bool_)
        """bool [N]: samples whose bytes have not been compared with their CRC-32 yet; None without CRCs."""

    def __len__(self) -> int:
        return len(self.samples)

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.samples.height[ids], self.samples.width[ids]

    def will_need(self, ids: np.ndarray) -> None:
        self.samples.will_need(ids)

    def verify(self, i: int) -> bool:
        """Whether the bytes of sample i are those that were written, as far as that can be known.  Thread-safe."""
        if self.unchecked is None or not self.unchecked[i]:
            return True
        if zlib.crc32(self.samples.sample(i)) != self.samples.crc32[i]:
            return False
        self.unchecked[i] = False
        return True

    def error(self, sample: int, status: int) -> DataError:
        samples = self.samples
        name = f" ({samples.names[sample]})" if samples.names else ""
        return DataError(
            f"{samples.file(sample)} is damaged: sample {sample}{name} cannot be decoded, because {_REASONS[status]}. Copy the file anew "
            f"if it was copied here. {samples.again}"
        )
