"""Back end `folder`: a tree of class folders as it lies on the disk, without conversion.

Images are not turned by their EXIF tag: torchvision's ImageFolder does not, and neither does the conversion.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from loaders.class_folders import scan
from loaders.decoder import CORRUPT, OK
from loaders.errors import DataError
from loaders.torchvision import decode_rgb


class FolderDecoder:
    """Decodes image files in a pool of `workers` threads: JPEGs by torchvision, everything else by Pillow."""

    name = "folder"

    def __init__(self, path: str | os.PathLike, workers: int, classes: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self.workers = workers
        self.files, self.labels, self.classes = scan(self.path, classes)
        # Sizes are read from the files' headers when a sample is first needed; 0: not yet.
        self._height = np.zeros(len(self.files), np.int32)
        self._width = np.zeros(len(self.files), np.int32)
        self._plain_jpeg = np.zeros(len(self.files), np.bool_)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="fastssl-decode")

    def __len__(self) -> int:
        return len(self.files)

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        list(self._pool.map(self._read_header, ids[self._height[ids] == 0]))
        return self._height[ids], self._width[ids]

    def _read_header(self, i: int) -> None:
        try:
            with Image.open(self.path / self.files[i]) as image:
                # CMYK is left to Pillow: torchvision converts it by another formula.
                self._plain_jpeg[i] = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
                self._width[i], self._height[i] = image.size
        except Exception as error:  # Pillow raises whatever a broken header leads to, SyntaxError and struct.error included
            raise self._bad(i, error) from error

    def decode_into(self, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, offsets: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        def one(b: int) -> int:
            i, height, width = int(ids[b]), int(heights[b]), int(widths[b])
            out = buffer[offsets[b] : offsets[b] + 3 * height * width]
            file = self.path / self.files[i]
            try:
                if self._plain_jpeg[i]:
                    return decode_rgb(np.fromfile(file, np.uint8), height, width, out)
                with Image.open(file) as image:
                    np.copyto(out.reshape(height, width, 3), np.asarray(image.convert("RGB")))
            except Exception as error:
                raise self._bad(i, error) from error
            return OK

        return np.fromiter(self._pool.map(one, range(len(ids))), np.int32, len(ids))

    def error(self, sample: int, status: int) -> DataError:
        return self._bad(sample, "it is cut off or broken" if status == CORRUPT else "its size changed while it was read")

    def _bad(self, i: int, reason: object) -> DataError:
        source = self.path.parent if self.path.name in ("train", "val") else self.path
        return DataError(
            f"{self.path / self.files[i]} cannot be read as an image: {reason}. Remove or replace the file, or convert the folder, which "
            f"lists all bad files at once: python -m convert.imagenet --source {source} --out DIR"
        )
