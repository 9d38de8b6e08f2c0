"""The .beton format: our files in stock FFCV, stock FFCV's files in ours, and every way a file can be broken."""

import ctypes
import fcntl
import io
import json
import mmap
import os
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.beton import ALLOCATION, FIELD, HEADER, JPEG, RAW, Beton, BetonWriter
from loaders.errors import DataError
from loaders.sidecar import sidecar_path
from loaders.unfinished import Unfinished, partial

SIZES = [(48, 64), (40, 40), (31, 57), (64, 33), (48, 64)]  # height, width


def picture(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth colours, so that JPEG changes them little: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90, subsampling="4:2:0")
    return out.getvalue()


def write(path: Path, *, labels: bool = True, raw: bool = False, page_size: int = 1 << 13, repeat: int = 1) -> list[bytes]:
    """A small .beton with several pages; returns what was stored."""
    pixels = [picture(h, w, i) for i, (h, w) in enumerate(SIZES * repeat)]
    stored = [p.tobytes() if raw and i % 2 else jpeg(p) for i, p in enumerate(pixels)]
    with BetonWriter(path, len(stored), labels=labels, page_size=page_size) as writer:
        for i, (p, image) in enumerate(zip(pixels, stored, strict=True)):
            writer.append(image, RAW if raw and i % 2 else JPEG, *p.shape[:2], 100 + i if labels else None)
        writer.finish([f"c/{i}.jpg" for i in range(len(stored))], ["c"], "/data/set/" + path.stem, {"quality": 90})
    return stored


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    write(tmp_path / "train.beton")
    return tmp_path / "train.beton"


def patch(path: Path, position: int, value: bytes) -> None:
    with open(path, "r+b") as f:
        f.seek(position)
        f.write(value)


# ------------------------------------------------------------------------------------------------ round trip


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("raw", [True, False])
def test_round_trip(tmp_path, labels, raw):
    path = tmp_path / "x.beton"
    page = 1 << 14
    stored = write(path, labels=labels, raw=raw, page_size=page, repeat=4)
    opened = Beton.open(path)
    assert len(opened) == len(stored)
    assert [opened.sample(i).tobytes() for i in range(len(stored))] == stored
    assert list(zip(opened.height.tolist(), opened.width.tolist(), strict=True)) == SIZES * 4
    assert opened.mode.tolist() == [RAW if raw and i % 2 else JPEG for i in range(len(stored))]
    if labels:
        assert opened.label.dtype == np.int64 and opened.label.tolist() == list(range(100, 100 + len(stored)))
    else:
        assert opened.label is None
    assert (opened.classes, opened.source, opened.names[7]) == (["c"], "/data/set/x", "c/7.jpg")
    assert opened.crc32.tolist() == [zlib.crc32(s) for s in stored]
    assert opened.sidecar.column("bytes", "<u4").tolist() == opened.size.tolist()
    assert opened.sidecar.column("height", "<u2").tolist() == opened.height.tolist()
    assert opened.sidecar.column("width", "<u2").tolist() == opened.width.tolist()
    assert not opened.data.flags.writeable
    first, last = opened.ptr, opened.ptr + opened.size - np.uint64(1)
    assert (first // page == last // page).all() and len(set((first // page).tolist())) > 1  # several pages, none crossed


def test_same_samples_give_the_same_bytes(tmp_path):
    write(tmp_path / "a" / "train.beton", raw=True, page_size=1 << 15)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.beton.partial").write_bytes(b"left by a killed conversion" * 10_000)
    write(tmp_path / "b" / "train.beton", raw=True, page_size=1 << 15)
    for name in ("train.beton", "train.beton.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_fewer_samples_than_promised(tmp_path):
    for promised in (2, 5):
        with BetonWriter(tmp_path / f"{promised}.beton", promised, page_size=1 << 13) as writer:
            for label in range(2):
                writer.append(jpeg(picture(8, 9, label)), JPEG, 8, 9, label)
            writer.finish(["a", "b"])
    few, exact = (Beton.open(tmp_path / f"{n}.beton") for n in (5, 2))
    assert [few.sample(i).tobytes() for i in range(2)] == [exact.sample(i).tobytes() for i in range(2)]
    assert len(few) == 2 and few.label.tolist() == [0, 1] and few.names == ["a", "b"] and few.crc32.tolist() == exact.crc32.tolist()
    with pytest.raises(IndexError), BetonWriter(tmp_path / "x.beton", 1) as writer:
        for _ in range(2):
            writer.append(b"abc", JPEG, 1, 1, 0)


def test_names_of_any_bytes(tmp_path):
    names = ["a b/ünï,\n.jpg", "c/\udcff.jpg"]  # a line break; a byte that is no UTF-8
    with BetonWriter(tmp_path / "x.beton", 2) as writer:
        for label in range(2):
            writer.append(b"abc", JPEG, 1, 1, label)
        writer.finish(names, ["a b", "c"])
    opened = Beton.open(tmp_path / "x.beton")
    assert opened.names == names and opened.source is None


# ------------------------------------------------------------------------------------------------ stock FFCV


def test_stock_ffcv_reads_our_file(tmp_path):
    pytest.importorskip("ffcv")
    from ffcv.libffcv import imdecode
    from ffcv.reader import Reader

    stored = write(tmp_path / "x.beton", page_size=1 << 21)
    reader = Reader(str(tmp_path / "x.beton"))
    assert reader.field_names == ["image", "label"] and reader.num_samples == len(stored)
    assert reader.metadata["f1"].tolist() == list(range(100, 105))
    assert reader.alloc_table["sample_id"].tolist() == list(range(5))
    data = np.fromfile(tmp_path / "x.beton", np.uint8)
    for record, allocation, image in zip(reader.metadata["f0"], reader.alloc_table, stored, strict=True):
        assert record["data_ptr"] == allocation["ptr"] and record["mode"] == 0
        h, w = int(record["height"]), int(record["width"])
        decoded = np.zeros((h, w, 3), np.uint8)
        source = data[int(allocation["ptr"]) : int(allocation["ptr"] + allocation["size"])]
        assert imdecode(source, decoded, h, w, h, w, 0, 0, 1, 1, False, False) == 0
        pillow = np.asarray(Image.open(io.BytesIO(image))).astype(int)
        assert np.abs(decoded - pillow).max() <= 8  # two builds of libjpeg-turbo: upsampling of the chroma may differ


STOCK = """
import sys
import time
from pathlib import Path
import numpy as np
from ffcv.fields import BytesField, FloatField, IntField, RGBImageField
from ffcv.fields.decoders import CenterCropRGBImageDecoder, IntDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.writer import DatasetWriter

folder, pictures = Path(sys.argv[1]), np.load(sys.argv[2], allow_pickle=True)

class Items:
    def __init__(self, make): self.make = make
    def __len__(self): return len(pictures)
    def __getitem__(self, i): return self.make(i)

def stock(name, make, **fields):
    DatasetWriter(str(folder / name), fields, num_workers=1).from_indexed_dataset(Items(make))

stock("jpg.beton", lambda i: (pictures[i], 7 + i), picture=RGBImageField("jpg"), cls=IntField())
stock("raw.beton", lambda i: (pictures[i], 7 + i), image=RGBImageField("raw"), label=IntField())
stock("alone.beton", lambda i: (pictures[i],), image=RGBImageField("jpg"))
stock("many.beton", lambda i: (.5, i, np.arange(9, dtype=np.uint8), 7 + i, pictures[i]), score=FloatField(), index=IntField(),
      blob=BytesField(), label=IntField(), image=RGBImageField("jpg"))

for os_cache in (True, False):
    pipelines = {"image": [CenterCropRGBImageDecoder((32, 32), ratio=1)], "label": [IntDecoder()]}
    loader = Loader(str(folder / "ours.beton"), batch_size=5, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
                    os_cache=os_cache, pipelines=pipelines)
    images, labels = zip(*((i.copy(), l.copy()) for i, l in loader))
    np.savez(folder / f"epoch{int(os_cache)}.npz", images=np.concatenate(images), labels=np.concatenate(labels))
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """What stock FFCV writes, and one epoch of its Loader over a file of ours (in a process of its own: it sets threads)."""
    pytest.importorskip("ffcv")
    folder = tmp_path_factory.mktemp("stock")
    write(folder / "ours.beton", page_size=1 << 21, repeat=2)
    pictures = np.empty(len(SIZES), object)
    pictures[:] = [picture(h, w, i) for i, (h, w) in enumerate(SIZES)]
    np.save(folder / "pictures.npy", pictures, allow_pickle=True)
    command = [sys.executable, "-c", STOCK, str(folder), str(folder / "pictures.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("os_cache", [0, 1])
def test_stock_loader_runs_an_epoch_over_our_file(stock, os_cache):
    epoch = np.load(stock / f"epoch{os_cache}.npz")
    assert epoch["labels"].ravel().tolist() == list(range(100, 110))
    for i, (h, w) in enumerate(SIZES * 2):
        side = min(h, w)
        top, left = (h - side) // 2, (w - side) // 2
        crop = Image.fromarray(picture(h, w, i)).crop((left, top, left + side, top + side)).resize((32, 32), Image.Resampling.BOX)
        assert np.abs(epoch["images"][i].astype(int) - np.asarray(crop)).mean() < 6


@pytest.mark.parametrize("name", ["jpg", "raw", "alone", "many"])
def test_we_read_what_stock_ffcv_writes(stock, name):
    opened = Beton.open(stock / f"{name}.beton")
    assert len(opened) == len(SIZES)
    assert opened.names is None and opened.classes is None and opened.crc32 is None
    if name == "alone":
        assert opened.label is None
    else:
        assert opened.label.tolist() == [7 + i for i in range(len(SIZES))]
    for i, (h, w) in enumerate(SIZES):
        assert (opened.height[i], opened.width[i], opened.mode[i]) == (h, w, RAW if name == "raw" else JPEG)
        expected = picture(h, w, i)
        if name == "raw":
            assert np.array_equal(opened.sample(i).reshape(h, w, 3), expected)
        else:
            decoded = np.asarray(Image.open(io.BytesIO(opened.sample(i).tobytes())))
            assert np.abs(decoded.astype(int) - expected).mean() < 6


# ------------------------------------------------------------------------------------------------ broken files

LABEL_OF_0 = HEADER.itemsize + 2 * FIELD.itemsize + 16  # after the image record, aligned to 8
NEXT_STEP = "python -m convert.imagenet --source"


def refuses(path: Path, text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        Beton.open(path)
    assert NEXT_STEP in str(caught.value) and "\n" not in str(caught.value) and path.name in str(caught.value)


def test_missing_file(tmp_path):
    refuses(tmp_path / "train.beton", "There is no file")
    (tmp_path / "train.beton.partial").touch()
    refuses(tmp_path / "train.beton", "running or was killed")
    (tmp_path / "folder.beton").mkdir()
    refuses(tmp_path / "folder.beton", "There is no file")


@pytest.mark.parametrize("content", [b"", b"short"])
def test_no_beton_at_all(tmp_path, content):
    (tmp_path / "x.beton").write_bytes(content)
    refuses(tmp_path / "x.beton", f"not a .beton: it has {len(content)} bytes")


def test_other_version(beton):
    patch(beton, 0, b"\x01")
    refuses(beton, r"not a .beton of this version \(found 1, expected 2\)")
    beton.write_text("this is some text that is longer than a header")
    refuses(beton, "not a .beton of this version")


def test_error_names_the_folder_it_was_made_of(beton):
    patch(beton, 0, b"\x01")
    refuses(beton, f"--source /data/set --out {beton.parent} --overwrite$")


@pytest.mark.parametrize("sidecar", [True, False])
@pytest.mark.parametrize("keep", [30, HEADER.itemsize + 2 * FIELD.itemsize + 10, 1 << 13, -100, -24, -1])
def test_truncated(beton, keep, sidecar):
    if not sidecar:
        sidecar_path(beton).unlink()
    content = beton.read_bytes()
    beton.write_bytes(content[:keep])
    refuses(beton, "truncated")


def test_something_appended(beton):
    with open(beton, "ab") as f:
        f.write(bytes(7))
    refuses(beton, "truncated or was not finished")


def test_no_samples(beton):
    patch(beton, 8, bytes(8))
    refuses(beton, "holds no samples")


def test_unknown_and_missing_fields(beton):
    patch(beton, HEADER.itemsize, b"\xff")
    refuses(beton, "field of type 255")
    patch(beton, HEADER.itemsize, b"\x01")
    refuses(beton, "no image field")


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("mode", b"\x05", "neither a JPEG"),
        ("mode", b"\x01", "raw and has not"),
        ("height", bytes(2), "no pixels"),
        ("ptr", b"\x01", "no entry in the allocation table"),
        ("size", b"\xff\xff\xff\xff\xff\xff\xff\xff", "outside of the file"),
        ("size", bytes(8), "no bytes"),
    ],
)
def test_damaged_tables(beton, field, value, text):
    """With a sidecar its checksum tells; without one the tables' own contradictions do."""
    allocations = int(np.fromfile(beton, HEADER, 1)[0]["alloc_table_ptr"])
    record = HEADER.itemsize + 2 * FIELD.itemsize
    position = {"mode": record, "height": record + 3, "ptr": record + 5, "size": allocations + ALLOCATION.fields["size"][1]}[field]
    patch(beton, position, value)
    refuses(beton, "checksums in train.beton.json differ for tables")
    sidecar_path(beton).unlink()
    refuses(beton, f"sample 0 .*{text}")


def test_flipped_label(beton):
    before = Beton.open(beton).label[0]
    patch(beton, LABEL_OF_0, bytes([int(before) ^ 1]))
    refuses(beton, "differ for labels, tables")
    sidecar_path(beton).unlink()
    assert Beton.open(beton).label[0] == before ^ 1  # the format alone cannot know


def test_sidecar_of_another_file(beton, tmp_path):
    write(tmp_path / "other.beton", repeat=2)
    sidecar_path(tmp_path / "other.beton").rename(sidecar_path(beton))
    refuses(beton, "differ for header, labels, tables, number of samples")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s | {"version": 99}, r"another version \(found 99, expected 2\)"),
        (lambda s: {k: v for k, v in s.items() if k != "names"}, "not as it was written"),
        (lambda s: s | {"sha256": 3}, "not as it was written"),
        (lambda s: s | {"classes": ["d"]}, "not as it was written"),
        (lambda s: [], "cannot be read"),
    ],
)
def test_damaged_sidecar(beton, change, text):
    side = sidecar_path(beton)
    content = json.loads(side.read_text())
    side.write_text(json.dumps(change(content)))
    refuses(beton, text)
    side.write_text(json.dumps(content)[:-50])
    refuses(beton, "cannot be read")


def test_sidecar_may_be_laid_out_anew(beton):
    side = sidecar_path(beton)
    side.write_text(json.dumps(json.loads(side.read_text()), indent=4))
    assert Beton.open(beton).names[1] == "c/1.jpg"


def test_sidecar_of_the_first_version_names_the_way_out(beton):
    side = sidecar_path(beton)
    side.write_text(json.dumps({k: v for k, v in json.loads(side.read_text()).items() if not k.startswith("sha256_of")} | {"version": 1}))
    refuses(beton, r"another version \(found 1, expected 2\)")


# ------------------------------------------------------------------------------------------------ what decoders are given


def test_addresses_are_those_of_the_bytes(beton):
    opened = Beton.open(beton)
    for i in range(len(opened)):
        there = (ctypes.c_uint8 * int(opened.size[i])).from_address(int(opened.address[i]))
        assert bytes(there) == opened.sample(i).tobytes()
        assert opened.file(i) == beton


def test_columns_cannot_be_changed(beton):
    opened = Beton.open(beton)
    for name in ("address", "ptr", "size", "height", "width", "mode", "label"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(opened, name)[0] = 1


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs Linux")
def test_announced_samples_are_read_and_others_are_not(tmp_path):
    path = tmp_path / "x.beton"
    with BetonWriter(path, 4, page_size=1 << 25) as writer:
        for label in range(4):
            writer.append(bytes(6 << 20), JPEG, 1, 1, label)
        writer.finish(list("abcd"))
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    opened = Beton.open(path)
    if resident(opened, 0) or resident(opened, 1):
        pytest.skip("this file system keeps its pages")
    opened.will_need(np.array([0, 0]))
    deadline = time.monotonic() + 5
    while resident(opened, 0) < 0.1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident(opened, 0) >= 0.1  # the kernel may take less than all of a long range
    assert resident(opened, 1) == 0  # but nothing of another


def resident(beton: Beton, i: int) -> float:
    """Share of the pages of sample i that are in the page cache; its first and last, shared with others, do not count."""
    start = -(-int(beton.address[i]) // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = (int(beton.address[i]) + int(beton.size[i]) - start) // mmap.PAGESIZE
    found = (ctypes.c_ubyte * pages)()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(pages * mmap.PAGESIZE), found) == 0
    return float(np.mean(np.frombuffer(found, np.uint8) & 1))


def test_touching_ranges_are_announced_as_one(monkeypatch):
    from loaders import readahead

    calls = []
    monkeypatch.setattr(readahead, "_madvise", lambda *args: calls.append(args))
    pages = np.array([30, 10, 12, 11, 20], np.uint64)
    readahead._advise.py_func(np.sort(pages), np.sort(pages) + np.uint64(1), np.uint64(4096))
    assert [(int(start) // 4096, int(length) // 4096) for start, length, _ in calls] == [(10, 3), (20, 1), (30, 1)]


# ------------------------------------------------------------------------------------------------ failing while writing


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    path = tmp_path / "new" / "folder" / "train.beton"
    with pytest.raises(error), BetonWriter(path, 3) as writer:
        writer.append(b"abc", JPEG, 1, 1, 0)
        assert path.with_name("train.beton.partial").exists() and not path.exists()
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_starts_while_another_finishes_leaves_its_file_alone(tmp_path, monkeypatch):
    """Between the opening of the temporary file and its lock, the other has put that very file in place."""
    path, lock = tmp_path / "train.beton", fcntl.flock

    def late(file, operation):
        if not path.exists():
            partial(path).write_bytes(b"finished")
            partial(path).rename(path)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    out = Unfinished(path)
    assert path.read_bytes() == b"finished"
    out.file.write(b"newer")
    out.close(complete=True)
    assert path.read_bytes() == b"newer" and list(tmp_path.iterdir()) == [path]


def test_a_writer_that_finishes_leaves_the_next_ones_file_alone(tmp_path, monkeypatch):
    path, replace, begun = tmp_path / "train.beton", os.replace, []
    first = Unfinished(path)

    def replace_and_begin(*names):
        replace(*names)
        if not begun:
            begun.append(Unfinished(path))

    monkeypatch.setattr(os, "replace", replace_and_begin)
    first.file.write(b"first")
    first.close(complete=True)
    assert path.read_bytes() == b"first" and partial(path).exists()
    begun[0].file.write(b"second")
    begun[0].close(complete=True)
    assert path.read_bytes() == b"second"


def test_a_failed_overwrite_keeps_the_old_pair(beton):
    before = beton.read_bytes(), sidecar_path(beton).read_bytes()
    with pytest.raises(ValueError, match="1 samples and 3 names"), BetonWriter(beton, 3) as writer:
        writer.append(b"abc", JPEG, 1, 1, 0)
        writer.finish(["a", "b", "c"])
    assert (beton.read_bytes(), sidecar_path(beton).read_bytes()) == before
    assert sorted(p.name for p in beton.parent.iterdir()) == ["train.beton", "train.beton.json"]


def test_forgotten_finish(tmp_path):
    with pytest.raises(RuntimeError, match="without finish"), BetonWriter(tmp_path / "x.beton", 0):
        pass
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file(tmp_path):
    path = tmp_path / "x.beton"
    with BetonWriter(path, 1) as writer:
        with pytest.raises(DataError, match="Another process is writing"), BetonWriter(path, 1):
            pass
        writer.append(b"abc", JPEG, 1, 1, 0)
        writer.finish(["a"])
    assert Beton.open(path).sample(0).tobytes() == b"abc"


def test_image_larger_than_a_page(tmp_path):
    with (
        pytest.raises(DataError, match="does not fit into a .beton page of 8192 bytes"),
        BetonWriter(tmp_path / "x.beton", 1, page_size=8192) as w,
    ):
        w.append(bytes(8193), JPEG, 10, 10, 0)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="Cannot write .*Choose another folder"), BetonWriter(tmp_path / "file" / "x.beton", 1):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(tmp_path):
    path = tmp_path / "x.beton"
    with pytest.raises(DataError, match="disk of .* is full"), BetonWriter(path, 1) as writer:
        writer._file.close()
        writer._file = open("/dev/full", "wb", buffering=0)
        writer.append(b"abc", JPEG, 1, 1, 0)
    assert list(tmp_path.iterdir()) == []
