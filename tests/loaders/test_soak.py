"""3,000 batches on each back end: memory, open files and threads stay as they are."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from fastssl.batch import ImageBatch
from fastssl.recipes import center_crop
from loaders import dali, ffcv
from loaders.build import build_eval_loader
from tests.loaders.stored import OneMachine, jpeg, picture, samples, train_loader, write

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning"),
]
BATCHES, WARM_UP, BATCH = 3_000, 600, 16
GROWTH = 8 << 20
"""Bytes, between the halves of the readings: a leak of one image of 90 x 90 pixels a batch would be 30 MB."""
needs_ffcv = pytest.mark.skipif(bool(ffcv.load()), reason=str(ffcv.load()))
needs_dali = pytest.mark.skipif(bool(dali.load()), reason=str(dali.load()))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """train.beton (JPEGs and raw), val shards, and class folders of the same pictures."""
    folder = tmp_path_factory.mktemp("soak")
    write(folder / "train.beton", samples(raw=True, count=200))
    write(folder / "shards" / "val.json", samples(raw=False, count=200))
    for i in range(200):
        file = folder / "tree" / f"class{i % 3}" / f"{i:03}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(picture(i)))
    return folder


def endless(data: Path, backend: str) -> Iterator[ImageBatch]:
    path = data / ("tree" if backend == "folder" else "train.beton")
    return train_loader(path, batch=BATCH, backend=backend, workers=2).from_step(0)


def passes(data: Path, backend: str) -> Iterator[ImageBatch]:
    """One evaluation after the other, each with a ring (and in DALI's case a reader) of its own."""
    while True:
        spec = center_crop(size=32, resize=36)
        yield from build_eval_loader(str(data / "shards"), "val", spec, dist=OneMachine(), batch=BATCH, backend=backend, workers=2)


@pytest.mark.parametrize(
    ("batches", "backend"),
    [
        pytest.param(endless, "ffcv", marks=needs_ffcv),
        pytest.param(endless, "dali", marks=needs_dali),
        (endless, "torchvision"),
        (endless, "folder"),
        pytest.param(passes, "ffcv", marks=needs_ffcv),
        pytest.param(passes, "dali", marks=needs_dali),
    ],
)
def test_nothing_grows(data, batches, backend):
    process = psutil.Process()
    found = batches(data, backend)
    used = []
    for n in range(1, BATCHES + 1):
        batch = next(found)
        assert len(batch) > 0
        if n >= WARM_UP and n % 200 == 0:
            gc.collect()
            used.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
    found.close()
    # Medians of the halves: one reading may fall on a moment with two rings, a reader, or files just open.
    half = len(used) // 2
    early, late = (np.median(part, axis=0) for part in (used[:half], used[half:]))
    memory, files, threads = late - early
    assert memory < GROWTH and files < 4 and threads < 4, used
