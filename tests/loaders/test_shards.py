"""WebDataset shards as a data set with random access: what was written comes back, and everything that does not fit is told."""

from __future__ import annotations

import ctypes
import io
import json
import os
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.beton import JPEG
from loaders.errors import DataError
from loaders.shards import Shards, is_shards

pytest.importorskip("webdataset")
from convert.webdataset import ShardWriter  # noqa: E402

N, PER_SHARD = 7, 3


def picture(i: int) -> np.ndarray:
    """Smooth colours: uint8 [20 + i, 30, 3]."""
    coarse = Image.fromarray(np.random.default_rng(i).integers(0, 256, (3, 3, 3), np.uint8))
    return np.asarray(coarse.resize((30, 20 + i), Image.Resampling.BICUBIC))


def jpeg(i: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture(i)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write(folder: Path, *, labels: bool = True, split: str = "train", n: int = N, per_shard: int = PER_SHARD) -> list[bytes]:
    stored = [jpeg(i) for i in range(n)]
    with ShardWriter(folder, split, n, labels=labels, samples_per_shard=per_shard) as writer:
        for i, image in enumerate(stored):
            writer.append(image, JPEG, 20 + i, 30, 5 * i if labels else None, name=f"c/{i}.jpg")
        writer.finish([f"c/{i}.jpg" for i in range(n)], ["c"], "/data/set/train", {"quality": 90})
    return stored


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path)
    return tmp_path


@pytest.mark.parametrize("labels", [True, False])
def test_round_trip(tmp_path, labels):
    stored = write(tmp_path, labels=labels)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == sorted([*(f"train-00000{k}.{kind}" for k in range(3) for kind in ("tar", "idx")), "train.json"])
    assert is_shards(tmp_path, "train") and not is_shards(tmp_path, "val")
    opened = Shards.open(tmp_path, "train")
    assert [opened.sample(i).tobytes() for i in range(N)] == stored and len(opened) == N
    assert opened.height.tolist() == [20 + i for i in range(N)] and set(opened.width.tolist()) == {30}
    assert set(opened.mode.tolist()) == {JPEG}
    assert (opened.label is None) if not labels else opened.label.tolist() == [5 * i for i in range(N)]
    assert (opened.classes, opened.source, opened.names[4]) == (["c"], "/data/set/train", "c/4.jpg")
    assert [opened.file(i).name for i in (0, 2, 3, 6)] == [f"train-00000{k}.tar" for k in (0, 0, 1, 2)]
    for i in range(N):
        there = (ctypes.c_uint8 * int(opened.size[i])).from_address(int(opened.address[i]))
        assert bytes(there) == stored[i]
    opened.will_need(np.arange(N))


def test_columns_cannot_be_changed(folder):
    opened = Shards.open(folder, "train")
    for name in ("address", "offset", "size", "height", "width", "mode", "label"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(opened, name)[0] = 1


@pytest.mark.parametrize("backend", ["ffcv", "torchvision"])
def test_back_ends_decode_what_was_stored(folder, backend):
    shards = Shards.open(folder, "train")
    if backend == "ffcv":
        ffcv = pytest.importorskip("loaders.ffcv")
        if problem := ffcv.load():
            pytest.skip(problem)
        decoder = ffcv.FFCVDecoder(shards, workers=2)
    else:
        from loaders.torchvision import TorchvisionDecoder

        decoder = TorchvisionDecoder(shards, workers=2)
    ids = np.array([6, 0, 3, 3])
    heights, widths = decoder.sizes(ids)
    sizes = 3 * heights.astype(np.int64) * widths
    offsets = np.cumsum(sizes) - sizes
    buffer = np.empty(sizes.sum(), np.uint8)
    assert decoder.decode_into(ids, heights, widths, offsets, buffer).tolist() == [0] * 4
    for i, h, w, offset in zip(ids, heights, widths, offsets, strict=True):
        image = buffer[offset : offset + 3 * int(h) * int(w)].reshape(h, w, 3)
        assert np.abs(image.astype(int) - picture(i)).mean() < 4
    assert decoder.unchecked.tolist() == [i not in (0, 3, 6) for i in range(N)]


@pytest.mark.parametrize("allowed", [True, False])
def test_more_tars_than_open_files(tmp_path, monkeypatch, allowed):
    stored = write(tmp_path, n=120, per_shard=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, before[1]))
    try:
        if allowed:
            opened = Shards.open(tmp_path, "train")
            assert [opened.sample(i).tobytes() for i in (0, 119)] == [stored[0], stored[119]]
        else:
            monkeypatch.setattr("loaders.shards._allow_open_files", lambda: None)
            with pytest.raises(DataError, match=r"train\.json describes 120 tars, .* Allow more with `ulimit -n 1144`"):
                Shards.open(tmp_path, "train")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# ------------------------------------------------------------------------------------------------ what does not fit


def refuses(folder: Path, text: str, next_step: str = "python -m convert.imagenet --source /data/set --out {} --format webdataset") -> None:
    with pytest.raises(DataError, match=text) as caught:
        Shards.open(folder, "train")
    assert next_step.format(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    refuses(tmp_path, "There are no shards", "python -m convert.imagenet --source DIR")


def test_shards_of_others(tmp_path):
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        member = tarfile.TarInfo("a.jpg")
        member.size = len(jpeg(0))
        tar.addfile(member, io.BytesIO(jpeg(0)))
    assert is_shards(tmp_path, "train")
    refuses(tmp_path, "come from elsewhere", f"python -m convert.imagenet --source {tmp_path} --out DIR --format webdataset")


def test_json_of_something_else(tmp_path):
    (tmp_path / "train.json").write_text('{"images": []}')
    refuses(tmp_path, "cannot be read", "python -m convert.imagenet --source DIR")


def test_sidecar_of_a_beton(folder):
    from loaders.beton import BetonWriter

    with BetonWriter(folder / "x.beton", 1) as writer:
        writer.append(b"abc", JPEG, 1, 1, 0)
        writer.finish(["a"], source="/data/set/train")
    (folder / "x.beton.json").rename(folder / "train.json")
    refuses(folder, "something else than shards")


@pytest.mark.parametrize("name", ["train-000001.tar", "train-000002.tar"])
def test_a_missing_tar(folder, name):
    (folder / name).unlink()
    refuses(folder, f"{name} is missing")


def test_a_tar_too_many(folder):
    (folder / "train-000003.tar").write_bytes((folder / "train-000000.tar").read_bytes())
    refuses(folder, "train-000003.tar is not one of them")


def test_a_missing_index(folder):
    (folder / "train-000001.idx").unlink()
    refuses(folder, "train-000001.idx cannot be read: No such file")


@pytest.mark.parametrize("keep", [0, 512, -1])
def test_a_truncated_tar(folder, keep):
    path = folder / "train-000001.tar"
    path.write_bytes(path.read_bytes()[:keep])
    refuses(folder, "train-000001.tar has .* bytes instead of")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.replace("v1.2", "v1.1"), "not an index of 3 images"),
        (lambda s: s.replace("jpg", "png"), "not an index of 3 images"),
        (lambda s: s[: s.rindex("jpg ")], "not an index of 3 images"),
        (lambda s: "", "not an index of 3 images"),
        (lambda s: s.replace("cls 512 ", "cls 1024 "), "differ for index"),
        (lambda s: " ".join("9" * 15 if w.isdigit() and len(w) > 3 else w for w in s.split(" ")), "points outside of train-000001.tar"),
    ],
)
def test_a_changed_index(folder, change, text):
    path = folder / "train-000001.idx"
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    refuses(folder, text)


def test_labels_of_another_set(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write(other, labels=False)
    (other / "train.json").rename(folder / "train.json")
    refuses(folder, "not as it was written|instead of")


def test_an_edited_sidecar(folder):
    content = json.loads((folder / "train.json").read_text())
    (folder / "train.json").write_text(json.dumps(content | {"classes": ["d"]}))
    refuses(folder, "not as it was written", "python -m convert.imagenet --source DIR")
