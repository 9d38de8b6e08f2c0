"""Image files to the JPEGs that are stored, on all cores, in order.

Stored images are baseline 4:2:0 JPEGs of Pillow's standard settings, RGB, upright as stored (EXIF orientation is ignored,
as torchvision's ImageFolder ignores it) and without metadata: what every decoder of the loaders reads fastest.  Worker
processes import this module and nothing heavier.
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError, features

from loaders.errors import DataError

_CHUNK = 8
"""Files per task: enough to hide the cost of a task, few enough that small data sets keep all workers busy."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images are stored."""

    max_side: int = 500
    """Longer side after shrinking, pixels; smaller images keep their size."""
    quality: int = 90
    """JPEG quality."""

    def __post_init__(self) -> None:
        if not 16 <= self.max_side <= 8192 or not 1 <= self.quality <= 100:
            raise DataError(
                f"Images cannot be stored with a longer side of {self.max_side} pixels at JPEG quality {self.quality}. "
                "Choose --max-side from 16 to 8192 and --quality from 1 to 100."
            )

    def describe(self) -> dict[str, object]:
        """Everything the stored bytes depend on besides the images."""
        encoder = f"Pillow {Image.__version__}, libjpeg-turbo {features.version_feature('libjpeg_turbo')}"
        return {**asdict(self), "subsampling": "4:2:0", "resample": "lanczos", "encoder": encoder}


class Stored(NamedTuple):
    jpeg: bytes
    height: int
    width: int
    crc32: int
    """zlib's, taken where the bytes were made."""


class Bad(NamedTuple):
    reason: str


def encode(raw: bytes, encoding: Encoding) -> Stored:
    """One image file, in any format Pillow reads, as it is stored.  Raises Pillow's errors for what it cannot decode."""
    with Image.open(BytesIO(raw)) as image:
        width, height = image.size
        scale = min(1.0, encoding.max_side / max(width, height))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        # Photographs of many megapixels decode ten times as fast at a power-of-two fraction; three times the final size
        # leaves the filter below all the detail it can use.
        image.draft(None, (3 * size[0], 3 * size[1]))
        rgb = image.convert("RGB")
    if rgb.size != size:
        # Antialiased; of Pillow's filters the one that keeps most of the detail a later crop may enlarge. The 0.5 ms over
        # a bicubic are paid once.
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    rgb.info.clear()  # a comment would be copied
    out = BytesIO()
    rgb.save(out, "JPEG", quality=encoding.quality, subsampling="4:2:0", progressive=False, optimize=False)
    jpeg = out.getvalue()
    return Stored(jpeg, size[1], size[0], zlib.crc32(jpeg))


def encode_file(path: Path, encoding: Encoding) -> Stored | Bad:
    """As `encode`; whatever is wrong with the file becomes a reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large, oddly tagged or palette images that decode all the same
            return encode(path.read_bytes(), encoding)
    except UnidentifiedImageError:
        return Bad("is empty" if path.stat().st_size == 0 else "is not an image")
    except Exception as e:  # Pillow's plugins raise anything from struct.error to SyntaxError
        return Bad(f"{type(e).__name__}: {e}")


def _encode_chunk(folder: Path, names: Sequence[str], encoding: Encoding) -> list[Stored | Bad]:
    return [encode_file(folder / name, encoding) for name in names]


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def encode_files(folder: Path, names: Sequence[str], encoding: Encoding, workers: int) -> Iterator[Stored | Bad]:
    """The files `names` below `folder`, encoded by `workers` processes, in order.

    A bounded number of images is in flight, so memory does not grow with the data set.  Close the iterator to stop early.
    """
    chunks = (names[i : i + _CHUNK] for i in range(0, len(names), _CHUNK))
    workers = min(workers, -(-len(names) // _CHUNK))
    if workers <= 1:
        for chunk in chunks:
            yield from _encode_chunk(folder, chunk, encoding)
        return
    # Spawned, not forked: the caller may hold threads and their locks (torch, numba).
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_leave_interrupts_to_the_parent)
    pending = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(_encode_chunk, folder, chunk, encoding))
            if len(pending) == 4 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as e:
        raise DataError("A conversion process was killed, most likely for lack of memory. Try again with fewer --workers.") from e
    finally:
        pool.shutdown(cancel_futures=True)
