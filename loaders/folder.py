"""Back end `folder`: image files as they lie on the disk, in class folders or in one folder, without conversion.

Images are not turned by their EXIF tag: torchvision's ImageFolder does not, and neither does the conversion.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np

from loaders.class_folders import EXTENSIONS, scan
from loaders.decoder import CORRUPT, OK
from loaders.errors import DataError
from loaders.images import open_image, to_rgb
from loaders.jpeg import complaint, is_damage
from loaders.torchvision import decode_rgb


def flat(root: Path) -> list[str] | None:
    """The images that lie directly in `root`, by name, if it has no folders that could be classes; None otherwise."""
    if not root.is_dir():
        return None
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    if any(entry.is_dir() for entry in entries):
        return None
    return sorted(entry.name for entry in entries if entry.name.lower().endswith(EXTENSIONS)) or None


class FolderDecoder:
    """Decodes image files in a pool of `workers` threads: JPEGs by torchvision, everything else by Pillow.

    A folder with images and without folders in it is a data set without labels; any other is a tree of class folders, with
    `classes` as the class names by label (default: its own).
    """

    name = "folder"
    on_device = False

    def __init__(self, path: str | os.PathLike, workers: int, classes: Sequence[str] | None = None) -> None:
        self.path = Path(path)
        self.workers = workers
        self.labels: np.ndarray | None = None
        self.classes: Sequence[str] | None = None
        if files := flat(self.path):
            self.files = files
        else:
            self.files, self.labels, self.classes = scan(self.path, classes)
        # Sizes are read from the files' headers when a sample is first needed; 0: not yet.
        self._height = np.zeros(len(self.files), np.int32)
        self._width = np.zeros(len(self.files), np.int32)
        self._jpeg = np.zeros(len(self.files), np.bool_)
        self._plain = np.zeros(len(self.files), np.bool_)
        self._unchecked = np.ones(len(self.files), np.bool_)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="fastssl-decode")

    def __len__(self) -> int:
        return len(self.files)

    def will_need(self, ids: np.ndarray) -> None:
        """Nothing: to announce a file one has to open it, and on a cold disk that is the wait to be avoided."""

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        list(self._pool.map(self._read_header, ids[self._height[ids] == 0]))
        return self._height[ids], self._width[ids]

    def _read_header(self, i: int) -> None:
        try:
            with open_image(self.path / self.files[i]) as image:
                self._jpeg[i] = image.format in ("JPEG", "MPO")
                # CMYK is left to Pillow: torchvision converts it by another formula.
                self._plain[i] = self._jpeg[i] and image.mode in ("RGB", "L")
                self._width[i], self._height[i] = image.size
        except Exception as error:  # Pillow raises whatever a broken header leads to, SyntaxError and struct.error included
            raise self._bad(i, error) from error

    def decode_into(self, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, offsets: np.ndarray, buffer: np.ndarray) -> np.ndarray:
        def one(b: int) -> int:
            i, height, width = int(ids[b]), int(heights[b]), int(widths[b])
            out = buffer[offsets[b] : offsets[b] + 3 * height * width]
            try:
                stored = np.fromfile(self.path / self.files[i], np.uint8)
                if self._jpeg[i] and self._unchecked[i]:
                    self._check(stored.tobytes())
                    self._unchecked[i] = False
                if self._plain[i]:
                    return decode_rgb(stored, height, width, out)
                with open_image(BytesIO(stored)) as image:
                    np.copyto(out.reshape(height, width, 3), np.asarray(to_rgb(image)))
            except Exception as error:
                raise self._bad(i, error) from error
            return OK

        return np.fromiter(self._pool.map(one, range(len(ids))), np.int32, len(ids))

    @staticmethod
    def _check(jpeg: bytes) -> None:
        """Decoders give wrong pixels for damaged data and say nothing.  Asking costs 0.6 of a decode, once per file."""
        if (message := complaint(jpeg)) and is_damage(jpeg, message):
            raise ValueError(message)

    def error(self, sample: int, status: int) -> DataError:
        return self._bad(sample, "it is cut off or broken" if status == CORRUPT else "its size changed while it was read")

    def _bad(self, i: int, reason: object) -> DataError:
        source = self.path.parent if self.path.name in ("train", "val") else self.path
        return DataError(
            f"{self.path / self.files[i]} cannot be read as an image: {reason}. Remove or replace the file, or convert the folder, which "
            f"lists all bad files at once: python -m convert.imagenet --source {source} --out DIR"
        )
