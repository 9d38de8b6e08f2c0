"""What a back end is: something that knows its samples' sizes and decodes them into memory it is given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from loaders.beton import Beton
from loaders.errors import DataError
from loaders.sidecar import convert_again

OK, CORRUPT, WRONG_SIZE, OUTSIDE = 0, 1, 2, 3
"""Status of a decoded sample."""

_REASONS = {
    CORRUPT: "its bytes are not a complete JPEG",
    WRONG_SIZE: "its JPEG has another size than the file's table says",
    OUTSIDE: "the file's table points outside of the file",
}


class Decoder(Protocol):
    """A data set whose N samples can be decoded once each to uint8 RGB.  Called from one thread at a time."""

    name: str
    path: Path
    workers: int
    """Threads it decodes with."""
    labels: np.ndarray | None
    """int64 [N], or None."""
    classes: Sequence[str] | None
    """Class names by label, when known."""

    def __len__(self) -> int: ...

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [B] sample ids -> heights, widths: int32 [B], before anything is decoded."""

    def decode_into(self, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, offsets: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        """Write sample ids[b] as height x width x 3 bytes from byte offsets[b] of the uint8 vector `buffer`; return the
        status of each, int32 [B]."""

    def error(self, sample: int, status: int) -> DataError:
        """What to tell the user about a sample whose status is not OK."""


class BetonDecoder:
    """The part of a decoder that is the same for every way to decode a .beton."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.beton = Beton.open(path)
        self.path = self.beton.path
        self.labels = self.beton.label
        self.classes = self.beton.classes

    def __len__(self) -> int:
        return len(self.beton)

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.beton.height[ids], self.beton.width[ids]

    def error(self, sample: int, status: int) -> DataError:
        name = f" ({self.beton.names[sample]})" if self.beton.names else ""
        return DataError(
            f"{self.path} is damaged: sample {sample}{name} cannot be decoded, because {_REASONS[status]}. Copy the file anew if it was "
            f"copied here. {convert_again(self.path, self.beton.source)}"
        )
