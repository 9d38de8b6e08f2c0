"""What every stored data set has: columns in memory, and names, classes and checksums from its sidecar."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from loaders.sidecar import Sidecar, convert_again


class Stored:
    """Base of `Beton` and `Shards`: together with their columns they are `Samples` of loaders/decoder.py."""

    path: Path
    mode: np.ndarray
    size: np.ndarray
    address: np.ndarray
    sidecar: Sidecar | None

    def __len__(self) -> int:
        return len(self.mode)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} samples)"

    def will_need(self, ids: np.ndarray) -> None:
        """Ask the kernel to read the samples int64 [B] `ids` ahead; returns at once."""
        from loaders.readahead import will_need  # not at the top: converters open data sets too, and numba takes a second

        will_need(self.address[ids], self.size[ids])

    @property
    def classes(self) -> list[str] | None:
        """Class names by label, if the sidecar has them."""
        return self.sidecar.content["classes"] if self.sidecar else None

    @property
    def source(self) -> str | None:
        """What the images came from."""
        return self.sidecar.content["source"] if self.sidecar else None

    @property
    def options(self) -> dict | None:
        """How the images were encoded."""
        return self.sidecar.content["options"] if self.sidecar else None

    @cached_property
    def names(self) -> list[str] | None:
        """Path of each sample below `source`; unpacked at first use."""
        return self.sidecar.names() if self.sidecar else None

    @cached_property
    def crc32(self) -> np.ndarray | None:
        """uint32 [N]: CRC-32 (zlib's) of each sample's bytes as written; unpacked at first use."""
        return self.sidecar.column("crc32", "<u4") if self.sidecar else None

    @property
    def again(self) -> str:
        """The next step when the set is damaged: how to make it anew."""
        return convert_again(self.path, self.source)


def read_only(*columns: np.ndarray | None) -> None:
    """Native code trusts columns that were checked once; nothing may change them afterwards."""
    for column in columns:
        if column is not None:
            column.setflags(write=False)
