"""Damaged data sets: with a sidecar every change is noticed or changes nothing; without one nothing crashes or hangs.

The native decoder is called on damaged bytes, so the long runs are made by this file as a script: a crash ends that process,
and the test names the case.  Case k of a kind is the same everywhere: python tests/loaders/test_corruption.py KIND k k+1 DIR
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.beton import FIELD, HEADER, JPEG, RAW, Beton, BetonWriter
from loaders.decoder import CHECKSUM, OK, StoredDecoder
from loaders.errors import DataError
from loaders.shards import Shards
from loaders.sidecar import sidecar_path

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")
SIZES = [(24, 32), (32, 24), (17, 40), (40, 40), (8, 60), (33, 31)]
"""Height, width; the last image is stored raw in the .beton."""


def picture(i: int) -> np.ndarray:
    """Smooth colours: uint8 [height, width, 3]."""
    height, width = SIZES[i]
    coarse = Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def jpeg(i: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(i)).save(out, "JPEG", quality=85, progressive=i == 2)
    return out.getvalue()


NAMES = [f"class{i % 3}/{i}.jpg" for i in range(len(SIZES))]
CLASSES = ["class0", "class1", "class2"]


def write_beton(folder: Path) -> None:
    with BetonWriter(folder / "train.beton", len(SIZES), page_size=1 << 13) as writer:
        for i, (height, width) in enumerate(SIZES):
            raw = i == len(SIZES) - 1
            writer.append(picture(i).tobytes() if raw else jpeg(i), RAW if raw else JPEG, height, width, i % 3)
        writer.finish(NAMES, CLASSES, "/data/set/train", {"quality": 85})


def write_shards(folder: Path) -> None:
    from convert.webdataset import ShardWriter

    with ShardWriter(folder, "train", len(SIZES), samples_per_shard=4) as writer:
        for i, (height, width) in enumerate(SIZES):
            writer.append(jpeg(i), JPEG, height, width, i % 3, name=NAMES[i])
        writer.finish(NAMES, CLASSES, "/data/set/train", {"quality": 85})


# ------------------------------------------------------------------------------------------------ one case


def regions(content: bytes) -> list[tuple[int, int]]:
    """Header, fields, sample table, data and allocation table of a .beton: first and last byte + 1."""
    header = np.frombuffer(content[: HEADER.itemsize], HEADER)[0]
    fields = HEADER.itemsize + int(header["num_fields"]) * FIELD.itemsize
    page, end = int(header["page_size"]), int(header["alloc_table_ptr"])
    return [(0, HEADER.itemsize), (HEADER.itemsize, fields), (fields, page), (page, end), (end, len(content))]


def damaged(content: bytes, rng: np.random.Generator, parts: list[tuple[int, int]]) -> bytes:
    """Cut, flip, overwrite, blank, remove or insert bytes at a random place of a random part."""
    while True:
        first, stop = parts[rng.integers(len(parts))]
        at, length = int(rng.integers(first, stop)), int(rng.integers(1, 40))
        noise = rng.integers(0, 256, length, np.uint8).tobytes()
        kind = rng.integers(7)
        if kind == 0:
            changed = content[:at]
        elif kind <= 2:
            changed = content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1 :]
        elif kind == 3:
            changed = (content[:at] + noise + content[at + length :])[: len(content)]
        elif kind == 4:
            changed = (content[:at] + bytes(50 * length) + content[at + 50 * length :])[: len(content)]
        elif kind == 5:
            changed = content[:at] + content[at + length :]
        else:
            changed = content[:at] + noise + content[at:]
        if changed != content:
            return changed


def decode_all(decoder: StoredDecoder) -> list[np.ndarray]:
    """Every image, uint8 [height, width, 3]; raises the decoder's error for a bad one."""
    ids = np.arange(len(decoder))
    heights, widths = decoder.sizes(ids)
    sizes = 3 * heights.astype(np.int64) * widths
    offsets = np.cumsum(sizes) - sizes
    buffer = np.empty(int(sizes.sum()), np.uint8)
    status = decoder.decode_into(ids, heights, widths, offsets, buffer)
    for i in np.flatnonzero(status != OK):
        raise decoder.error(int(ids[i]), int(status[i]))
    return [buffer[o : o + s].reshape(h, w, 3) for o, s, h, w in zip(offsets, sizes, heights, widths, strict=True)]


def contents(folder: Path, backend: str) -> dict[str, object]:
    """All that a data set says."""
    samples = Beton.open(folder / "train.beton") if (folder / "train.beton").exists() else Shards.open(folder, "train")
    if backend == "ffcv":
        from loaders.ffcv import FFCVDecoder

        decoder = FFCVDecoder(samples, workers=1)
    else:
        from loaders.torchvision import TorchvisionDecoder

        decoder = TorchvisionDecoder(samples, workers=1)
    images = decode_all(decoder)
    label = None if samples.label is None else samples.label.tolist()
    return {"labels": label, "classes": samples.classes, "names": samples.names, "images": [(i.shape, i.tobytes()) for i in images]}


class Fuzz:
    """Cases of one kind: a file of a good data set is damaged, and the set opened and decoded."""

    KINDS = ("beton", "sidecar", "shards", "bare")

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder
        folder.mkdir(parents=True, exist_ok=True)
        if kind == "shards":
            write_shards(folder)
            self.targets = sorted(folder.iterdir())
        else:
            write_beton(folder)
            beton = folder / "train.beton"
            self.targets = [sidecar_path(beton) if kind == "sidecar" else beton]
        if kind == "bare":
            sidecar_path(self.targets[0]).unlink()
        self.good = {backend: contents(folder, backend) for backend in ("ffcv", "torchvision")}
        self.before = {path: path.read_bytes() for path in self.targets}

    def run(self, k: int) -> str:
        """Case k: "refused", "same" or, for a file without a sidecar, "other".  Raises AssertionError for wrong data."""
        rng = np.random.default_rng((Fuzz.KINDS.index(self.kind), k))
        path = self.targets[rng.integers(len(self.targets))]
        content = self.before[path]
        parts = regions(content) if path.suffix == ".beton" else [(0, len(content))]
        replace(path, damaged(content, rng, parts))
        backend = "torchvision" if k % 5 == 4 else "ffcv"
        try:
            found = contents(self.folder, backend)
        except DataError as error:
            assert str(error).count("\n") == 0 and "python -m convert." in str(error), error
            return "refused"
        finally:
            replace(path, content)
        if found == self.good[backend]:
            return "same"
        assert self.kind == "bare", f"case {k} gave wrong data: {[key for key in found if found[key] != self.good[backend][key]]}"
        return "other"


def replace(path: Path, content: bytes) -> None:
    """By a new file: the old one may still be mapped."""
    path.unlink()
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def ffcv():
    module = pytest.importorskip("loaders.ffcv")
    if problem := module.load():
        pytest.skip(problem)
    return module


@pytest.mark.parametrize("kind", Fuzz.KINDS)
def test_a_few_cases_of_every_kind(ffcv, tmp_path, kind):
    if kind == "shards":
        pytest.importorskip("webdataset")
    fuzz = Fuzz(kind, tmp_path / kind)
    outcomes = [fuzz.run(k) for k in range(20)]
    assert "refused" in outcomes  # what a damaged file looks like to a test that does nothing is "same"


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first", "stop"), [
    *(("beton", k, k + 500) for k in range(0, 2000, 500)),
    ("sidecar", 0, 300),
    ("shards", 0, 500),
    ("bare", 0, 500),
    ("bare", 500, 1000),
])  # fmt: skip
def test_many_cases(ffcv, tmp_path, kind, first, stop):
    if kind == "shards":
        pytest.importorskip("webdataset")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, kind, str(first), str(stop), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, f"case {done.stdout.split()[-2:]} ended the process with {done.returncode}: {done.stderr[-2000:]}"
    outcomes = done.stdout.split()[1::2]
    assert len(outcomes) == stop - first and outcomes.count("refused") > 0.2 * len(outcomes)


def test_the_checksum_is_zlibs(ffcv):
    from loaders.checksum import crc32

    data = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    for start in range(20):
        for size in (*range(40), 1000, 4097):
            part = data[start : start + size]
            assert crc32(np.uint64(data.ctypes.data + start), size) == zlib.crc32(part.tobytes())


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_bytes_are_compared_the_first_time_they_are_decoded(ffcv, tmp_path, backend):
    write_beton(tmp_path)
    samples = Beton.open(tmp_path / "train.beton")
    if backend == "ffcv":
        decoder = ffcv.FFCVDecoder(samples, workers=2)
    else:
        from loaders.torchvision import TorchvisionDecoder

        decoder = TorchvisionDecoder(samples, workers=2)
    raw = len(samples) - 1

    def decode(*ids: int) -> list[int]:
        ids = np.array(ids)
        heights, widths = decoder.sizes(ids)
        sizes = 3 * heights.astype(np.int64) * widths
        offsets = np.cumsum(sizes) - sizes
        return decoder.decode_into(ids, heights, widths, offsets, np.empty(int(sizes.sum()), np.uint8)).tolist()

    assert decoder.unchecked.all() and decode(raw, 1, raw) == [OK] * 3
    assert decoder.unchecked.tolist() == [i not in (1, raw) for i in range(len(samples))]
    with open(tmp_path / "train.beton", "r+b") as f:  # the mapped bytes change too
        for i in (0, raw):
            f.seek(int(samples.ptr[i]) + int(samples.size[i]) // 2)
            byte = f.read(1)[0]
            f.seek(-1, os.SEEK_CUR)
            f.write(bytes([byte ^ 1]))
    assert decode(raw, 0, 2, 0) == [OK, CHECKSUM, OK, CHECKSUM]
    assert decoder.unchecked[0] and not decoder.verify(0) and decoder.verify(raw)
    assert "sample 0 (class0/0.jpg) cannot be decoded, because its bytes are not those that were written" in str(decoder.error(0, CHECKSUM))


def test_without_checksums_nothing_is_compared(ffcv, tmp_path):
    write_beton(tmp_path)
    sidecar_path(tmp_path / "train.beton").unlink()
    decoder = ffcv.FFCVDecoder(Beton.open(tmp_path / "train.beton"), workers=1)
    assert decoder.unchecked is None and decoder.verify(0) and len(decode_all(decoder)) == len(SIZES)


if __name__ == "__main__":
    chosen, begin, end, place = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    cases = Fuzz(chosen, place / chosen)
    for case in range(begin, end):
        print(case, end=" ", flush=True)
        print(cases.run(case), flush=True)
