"""Images to the bytes that are stored, on all cores, in order.

What is stored decodes alike in every decoder of the loaders: baseline JPEGs of Pillow's standard settings, RGB, upright as
stored (EXIF orientation is ignored, as torchvision's ImageFolder ignores it) and without metadata; on request raw pixels, or
the original bytes of a file that is such a JPEG already.  Worker processes import this module and nothing heavier.
"""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from convert.jpeg import is_plain
from convert.parallel import in_order
from convert.sources import Items, Span
from loaders.beton import JPEG, PAGE_SIZE, RAW
from loaders.errors import DataError
from loaders.images import open_image, to_rgb
from loaders.jpeg import complaint, is_damage

CHUNK = 8
"""Images per task: enough to hide the cost of a task, few enough that small data sets keep all workers busy."""

Subsampling = Literal["4:2:0", "4:2:2", "4:4:4"]


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How images are stored."""

    max_side: int = 500
    """Longer side after shrinking, pixels; smaller images keep their size."""
    quality: int = 90
    """JPEG quality."""
    subsampling: Subsampling = "4:2:0"
    """Of the chroma."""
    keep_original: bool = False
    """Store the bytes of a file untouched when they are within `max_side`, complete, and a baseline JPEG in YCbCr (`is_plain`)."""
    raw_fraction: float = 0.0
    """Share of the images that is stored as pixels; which ones depends on `seed` and their position only."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 16 <= self.max_side <= 8192 or not 1 <= self.quality <= 100:
            raise DataError(
                f"Images cannot be stored with a longer side of {self.max_side} pixels at JPEG quality {self.quality}. "
                "Choose --max-side from 16 to 8192 and --quality from 1 to 100."
            )
        if self.subsampling not in get_args(Subsampling):
            raise DataError(
                f"There is no chroma subsampling {self.subsampling}. Choose --subsampling from {', '.join(get_args(Subsampling))}."
            )
        if not 0 <= self.raw_fraction <= 1:
            raise DataError(f"A share of {self.raw_fraction} of the images cannot be stored raw. Choose --raw-fraction from 0 to 1.")

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Encoding:
        """From what `describe` gave; what an older conversion did not know has its default."""
        return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options})

    def describe(self) -> dict[str, object]:
        """Everything the stored bytes depend on besides the images."""
        encoder = f"Pillow {Image.__version__}, libjpeg-turbo {features.version_feature('libjpeg_turbo')}"
        return {**asdict(self), "resample": "lanczos", "encoder": encoder}

    @property
    def page_size(self) -> int:
        """Bytes of a .beton page that every image fits into."""
        return max(PAGE_SIZE, 1 << (3 * self.max_side**2).bit_length())

    def stores_raw(self, index: int) -> bool:
        """Whether the image at that position of its split is stored as pixels."""
        digest = hashlib.blake2b(f"{self.seed}/{index}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.raw_fraction * 2**64


class Stored(NamedTuple):
    data: bytes
    mode: int
    """JPEG or RAW of loaders/beton.py."""
    height: int
    width: int
    crc32: int
    """zlib's, taken where the bytes were made."""
    kept: bool
    """Whether `data` is the original file."""
    resized: bool


class Bad(NamedTuple):
    reason: str


class DamagedImage(Exception):
    """A JPEG whose pixels would not be those that were once stored."""


def encode(item: bytes | np.ndarray, encoding: Encoding, raw: bool = False) -> Stored:
    """An image file in any format Pillow reads, or pixels uint8 [H, W, 3], as it is stored; `raw`: as pixels.

    Raises DamagedImage, or whatever Pillow raises for what it cannot decode.
    """
    if isinstance(item, np.ndarray):
        pixels = Image.fromarray(item)
        original, size = pixels.size, _stored_size(pixels.size, encoding)
    else:
        with open_image(BytesIO(item)) as image:
            original, size = image.size, _stored_size(image.size, encoding)
            faultless = _is_faultless_jpeg(image, item)
            if encoding.keep_original and not raw and faultless and size == original and len(item) <= encoding.page_size:
                if is_plain(item):
                    return Stored(item, JPEG, size[1], size[0], zlib.crc32(item), kept=True, resized=False)
            # Photographs of many megapixels decode ten times as fast at a power-of-two fraction; three times the final size
            # leaves the filter below all the detail it can use.
            image.draft(None, (3 * size[0], 3 * size[1]))
            pixels = to_rgb(image)
    if pixels.size != size:
        # Antialiased; of Pillow's filters the one that keeps most of the detail a later crop may enlarge. The 0.5 ms over
        # a bicubic are paid once.
        pixels = pixels.resize(size, Image.Resampling.LANCZOS)
    data = pixels.tobytes() if raw else _as_jpeg(pixels, encoding)
    return Stored(data, RAW if raw else JPEG, size[1], size[0], zlib.crc32(data), kept=False, resized=size != original)


def _is_faultless_jpeg(image: Image.Image, data: bytes) -> bool:
    """Raises DamagedImage for a JPEG that Pillow would decode in part or wrongly without saying so."""
    if image.format not in ("JPEG", "MPO"):
        return False
    message = complaint(data)
    if message and is_damage(data, message):
        raise DamagedImage(message)
    return message is None


def _stored_size(size: tuple[int, int], encoding: Encoding) -> tuple[int, int]:
    """Width, height of an image as stored."""
    scale = min(1.0, encoding.max_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _as_jpeg(pixels: Image.Image, encoding: Encoding) -> bytes:
    pixels.info.clear()  # a comment would be copied
    out = BytesIO()
    pixels.save(out, "JPEG", quality=encoding.quality, subsampling=encoding.subsampling, progressive=False, optimize=False)
    return out.getvalue()


def read(item: str | Path | Span | np.ndarray) -> bytes | np.ndarray:
    """The bytes of an image file, or pixels as they are."""
    if isinstance(item, np.ndarray):
        return item
    if not isinstance(item, Span):
        return Path(item).read_bytes()
    with open(item.path, "rb") as f:
        f.seek(item.offset)
        return f.read(item.size)


def encode_item(item: str | Path | Span | np.ndarray, encoding: Encoding, raw: bool = False) -> Stored | Bad:
    """As `encode`; whatever is wrong with the image becomes a reason."""
    try:
        content = read(item)
        if len(content) == 0:
            return Bad("is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large, oddly tagged or palette images that decode all the same
            return encode(content, encoding, raw)
    except UnidentifiedImageError:
        return Bad("is not an image")
    except DamagedImage as e:
        return Bad(f"is damaged: {e}")
    except Exception as e:  # Pillow's plugins raise anything from struct.error to SyntaxError
        return Bad(f"{type(e).__name__}: {e}")


def _encode_chunk(first: int, items: Sequence[str | Span | np.ndarray], encoding: Encoding) -> list[Stored | Bad]:
    return [encode_item(item, encoding, encoding.stores_raw(first + i)) for i, item in enumerate(items)]


def encode_all(items: Items, encoding: Encoding, workers: int) -> Iterator[Stored | Bad]:
    """Every item, encoded by `workers` processes, in order and in bounded memory.  Close the iterator to stop early."""
    n = len(items)
    tasks = ((i, [items[j] for j in range(i, min(i + CHUNK, n))], encoding) for i in range(0, n, CHUNK))
    for chunk in in_order(_encode_chunk, tasks, min(workers, -(-n // CHUNK))):
        yield from chunk
