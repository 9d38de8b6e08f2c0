"""Image files of any kind to 8-bit RGB: the one place that decides what a strange file looks like.

Pixels are those of Pillow's convert("RGB"): transparency is dropped, CMYK converted by its formula, EXIF orientation ignored
as torchvision's ImageFolder ignores it.  Sixteen-bit grey is an exception: it keeps its upper eight bits, as sixteen-bit
colour does in Pillow, which would turn all grey above 255 white.  Grey of 32 bits is refused: floats between 0 and 1 would
turn black, and no file says which of its numbers is white.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

MAX_PIXELS = 178_956_970
"""Images with more are refused before memory is taken; Pillow's own limit, which other code may have switched off."""


def open_image(source: str | Path | BinaryIO) -> Image.Image:
    """An image file, its header read and nothing decoded.  Raises Pillow's errors, of any type, for what is no image."""
    image = Image.open(source)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow image as 8-bit RGB.  Raises Pillow's errors, of any type, when its data cannot be decoded, and ValueError for grey
    of 32 bits."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        raise ValueError("its grey has 32 bits, and which numbers are black and white is not known: save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; the direct way warns
    return image.convert("RGB")
