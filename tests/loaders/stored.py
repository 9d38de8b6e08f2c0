"""One small data set in every stored form, and what the loaders make of it: for the tests that compare back ends."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from convert.webdataset import ShardWriter
from fastssl.batch import ImageBatch
from fastssl.recipes import byol_asymmetric
from loaders.beton import JPEG, RAW, BetonWriter
from loaders.build import TrainLoader, build_loader
from loaders.decoder import Decoder

SPEC = byol_asymmetric(size=32)
SEED = 3
SIZES = [(48, 64), (64, 48), (33, 71), (90, 90), (17, 120), (61, 40), (1, 1), (8, 16)]
NUM_SAMPLES = 50
CLASSES = ["class0", "class1", "class2"]
Sample = tuple[bytes, int, int, int]
"""Bytes, mode, height, width."""


@dataclass(frozen=True)
class OneMachine:
    rank: int = 0
    world: int = 1
    local_world: int = 1
    device: torch.device = torch.device("cpu")

    def gather_objects(self, value: object) -> list:
        return [value] * self.world


def picture(i: int) -> np.ndarray:
    """Smooth colours with some texture: uint8 [height, width, 3], or [height, width] for every ninth."""
    height, width = SIZES[i % len(SIZES)]
    rng = np.random.default_rng(i)
    coarse = Image.fromarray(rng.integers(80, 176, (5, 5, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.clip(np.asarray(coarse, np.int16) + rng.integers(-8, 9, (height, width, 1)), 0, 255).astype(np.uint8)
    return pixels[..., 1] if i % 9 == 2 else pixels


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **({"quality": 90} | options))
    return out.getvalue()


def samples(raw: bool, count: int = NUM_SAMPLES) -> list[Sample]:
    """JPEGs, grey ones and three kinds of chroma subsampling among them, and `raw` images as every seventh."""
    found = []
    for i in range(count):
        pixels = picture(i)
        height, width = pixels.shape[:2]
        if raw and i % 7 == 4 and pixels.ndim == 3:
            found.append((pixels.tobytes(), RAW, height, width))
        else:
            options = {} if pixels.ndim == 2 else {"subsampling": i % 3}
            found.append((jpeg(pixels, **options), JPEG, height, width))
    return found


def write(path: Path, stored: list[Sample], *, labels: bool = True) -> Path:
    """`path`: a .beton, or the NAME.json of shards (of eleven samples each, so that batches cross them)."""
    if path.suffix == ".beton":
        writer = BetonWriter(path, len(stored), labels=labels)
    else:
        writer = ShardWriter(path.parent, path.stem, len(stored), labels=labels, samples_per_shard=11)
    with writer:
        for i, sample in enumerate(stored):
            writer.append(*sample, label=i % 3 if labels else None)
        writer.finish([f"class{i % 3}/{i}.jpg" for i in range(len(stored))], CLASSES if labels else None, "pictures/train")
    return path


def train_loader(path: Path, *, dist: OneMachine | None = None, batch: int = 8, **options) -> TrainLoader:
    return build_loader(str(path), "train", SPEC, dist=dist or OneMachine(), batch=batch, seed=SEED, **options)


def copied(batch: ImageBatch) -> dict:
    """What a batch holds, copied out of the ring to the host."""
    names = ("index", "key", "label", "height", "width", "boxes", "flips")
    small = {name: None if getattr(batch, name) is None else getattr(batch, name).cpu().clone() for name in names}
    return small | {"images": [batch.image(i).cpu().clone() for i in range(len(batch))], "epoch": batch.epoch, "step": batch.step}


def collect(batches: Iterable[ImageBatch], count: int) -> list[dict]:
    return [copied(batch) for batch in islice(batches, count)]


def assert_same(a: list[dict], b: list[dict], pixels: bool = True) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x["epoch"], x["step"]) == (y["epoch"], y["step"])
        for name in ("index", "key", "label", "height", "width", "boxes", "flips"):
            assert torch.equal(x[name], y[name]), name
        if pixels:
            assert all(torch.equal(p, q) for p, q in zip(x["images"], y["images"], strict=True))


def decode(decoder: Decoder, ids: Iterable[int], gap: int = 0) -> tuple[list[np.ndarray], np.ndarray]:
    """Images of the samples (uint8 [height, width, 3]) and their status, with `gap` bytes before each in the buffer.

    Checks that nothing outside of their places was written."""
    ids = np.array(list(ids), np.int64)
    heights, widths = decoder.sizes(ids)
    sizes = 3 * heights.astype(np.int64) * widths
    offsets = np.cumsum(sizes + gap) - sizes
    total = int((sizes + gap).sum()) + gap
    if decoder.on_device:
        device = getattr(decoder, "_device", torch.device("cpu"))
        buffer = torch.full((total,), 77, dtype=torch.uint8, device=device)
        status = decoder.decode_into(ids, heights, widths, offsets, buffer)
        flat = buffer.cpu().numpy()
    else:
        flat = np.full(total, 77, np.uint8)
        status = decoder.decode_into(ids, heights, widths, offsets, flat)
    outside = np.ones(total, np.bool_)
    images = []
    for offset, size, height, width in zip(offsets, sizes, heights, widths, strict=True):
        outside[offset : offset + size] = False
        images.append(flat[offset : offset + size].reshape(height, width, 3).copy())
    assert (flat[outside] == 77).all()
    return images, status


def difference(a: np.ndarray, b: np.ndarray) -> tuple[float, int]:
    """Mean and largest absolute difference of two images on the 0..255 scale."""
    d = np.abs(a.astype(np.int16) - b)
    return float(d.mean()), int(d.max())
