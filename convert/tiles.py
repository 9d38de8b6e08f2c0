"""A small set of real photographs without a download:  python -m convert.tiles --out data/demo/tiles

The photographs that scikit-image and scikit-learn carry, cut into about 2,000 JPEG tiles of varied size: train/ and val/
with one folder per photograph.  A tile's class is its photograph; validation tiles come from a band of it that no training
tile touches.  The same files, byte for byte, for the same seed and Pillow.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from loaders.errors import DataError

PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "camera": ("skimage", "data/camera.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "cell": ("skimage", "data/cell.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "moon": ("skimage", "data/moon.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "page": ("skimage", "data/page.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}
SIDES = (72, 160)
"""Sides of a tile, pixels."""
VAL_BAND = 0.35
"""Share of a photograph's longer side that only validation tiles come from."""
_COMPLETE = ".complete"


@dataclass(frozen=True)
class Tile:
    top: int
    left: int
    height: int
    width: int
    quality: int
    """JPEG quality."""


def cut(height: int, width: int, train: int, val: int, rng: np.random.Generator) -> tuple[list[Tile], list[Tile]]:
    """Boxes of the training and validation tiles of one photograph, in pixels: no pixel is in both.

    The band of the validation tiles lies across the longer side, at either end of it.
    """
    across = width >= height
    length = max(height, width)
    band = round(VAL_BAND * length)
    first = rng.random() < 0.5
    spans = {"val": (0, band) if first else (length - band, length), "train": (band, length) if first else (0, length - band)}
    out = {}
    for split, count in (("train", train), ("val", val)):
        start, stop = spans[split]
        top, bottom, left, right = (0, height, start, stop) if across else (start, stop, 0, width)
        out[split] = [_tile(top, bottom, left, right, rng) for _ in range(count)]
    return out["train"], out["val"]


def _tile(top: int, bottom: int, left: int, right: int, rng: np.random.Generator) -> Tile:
    h, w = (int(rng.integers(SIDES[0], min(SIDES[1], room) + 1)) for room in (bottom - top, right - left))
    return Tile(int(rng.integers(top, bottom - h + 1)), int(rng.integers(left, right - w + 1)), h, w, int(rng.integers(85, 96)))


def write_tiles(out: Path = Path("data/demo/tiles"), *, per_class: int = 110, seed: int = 0) -> Path:
    """Cut the photographs of scikit-image and scikit-learn into OUT/{train,val}/PHOTOGRAPH/NNNN.jpg, unless that is done already.

    Raises DataError when OUT holds something else, or a photograph is missing.

    Args:
        out: Folder to write; returned.
        per_class: Tiles of each photograph; a fifth of them is for validation.
        seed: Of places, sizes and JPEG qualities.
    """
    if per_class < 5:
        raise DataError(f"{per_class} tiles per class leave none for validation. Take --per-class 5 or more.")
    mark = f"{per_class} tiles per class, seed {seed}\n"
    if (out / _COMPLETE).is_file() and (out / _COMPLETE).read_text() == mark:
        return out
    if out.exists():
        raise DataError(f"{out} exists and is not a complete set of {mark.strip()}. Remove it, or choose another folder with --out DIR.")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for number, (name, (package, file)) in enumerate(PHOTOGRAPHS.items()):
            photograph = _open(package, file)
            val = per_class // 5
            splits = cut(photograph.height, photograph.width, per_class - val, val, np.random.default_rng((seed, number)))
            for split, tiles in zip(("train", "val"), splits, strict=True):
                folder = partial / split / name
                folder.mkdir(parents=True)
                for i, tile in enumerate(tiles):
                    box = (tile.left, tile.top, tile.left + tile.width, tile.top + tile.height)
                    photograph.crop(box).save(folder / f"{i:04d}.jpg", quality=tile.quality)
        (partial / _COMPLETE).write_text(mark)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _open(package: str, file: str) -> Image.Image:
    path = files(package) / file
    if not path.is_file():
        raise DataError(f"{package} comes without {file} here. Install the pinned version with `make setup`, or use images of your own.")
    with path.open("rb") as stream:
        return Image.open(stream).convert("RGB")


def main(argv: Sequence[str] | None = None) -> None:
    try:
        print(tyro.cli(write_tiles, prog="python -m convert.tiles", args=argv))
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
