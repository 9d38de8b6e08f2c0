"""python -m convert.webdataset: there and back again byte by byte, read alike by the webdataset library, DALI and wds2idx's rules."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.beton import JPEG, RAW, Beton, BetonWriter
from loaders.errors import DataError
from loaders.shards import Shards

webdataset = pytest.importorskip("webdataset")
from convert.shard_writer import key  # noqa: E402
from convert.webdataset import ShardWriter, convert, main  # noqa: E402

NAMES = [
    "a/one.JPEG",
    "a/two.v2.jpg",
    "a/two.png",
    "b/with space, ünï & more.jpg",
    "b/\udcff.jpg",
    "__c__/x.jpg",
    "x" * 200 + ".jpg",
    "a/one.jpg",
]
CLASSES = ["a", "b", "__c__"]


def jpeg(i: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (9 + i, 12, 3), np.uint8)).save(out, "JPEG")
    return out.getvalue()


def write(path: Path, *, labels: bool = True, sidecar: bool = True, raw: bool = False, page_size: int = 1 << 15) -> list[bytes]:
    stored = [jpeg(i) for i in range(len(NAMES))]
    with BetonWriter(path, len(stored), labels=labels, page_size=page_size) as writer:
        for i, image in enumerate(stored):
            if raw and i == 3:
                writer.append(bytes(3 * 4), RAW, 2, 2, 0)
            else:
                writer.append(image, JPEG, 9 + i, 12, i % 3 if labels else None)
        writer.finish(NAMES, CLASSES if labels else None, "/data/set/train", {"quality": 75, "resample": "lanczos"})
    if not sidecar:
        path.with_name(path.name + ".json").unlink()
    return stored


@pytest.fixture
def beton(tmp_path: Path) -> Path:
    write(tmp_path / "in" / "train.beton")
    return tmp_path / "in" / "train.beton"


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------------------------ there and back


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("per_shard", [1, 3, 100])
def test_there_and_back_gives_the_same_bytes(tmp_path, labels, per_shard):
    for split in ("train", "val"):
        write(tmp_path / "in" / f"{split}.beton", labels=labels)
    convert(tmp_path / "in", tmp_path / "shards", samples_per_shard=per_shard)
    for split in ("train", "val"):
        there, here = Shards.open(tmp_path / "shards", split), Beton.open(tmp_path / "in" / f"{split}.beton")
        assert len(there.tars) == -(-len(NAMES) // per_shard)
        assert (there.names, there.classes, there.source, there.options) == (here.names, here.classes, here.source, here.options)
        assert there.crc32.tolist() == here.crc32.tolist()
    convert(tmp_path / "shards", tmp_path / "back")
    assert files(tmp_path / "back") == files(tmp_path / "in")


@pytest.mark.parametrize("name", ["sh#1", "sh?x=1", "sh::a", "s3:x", "pipe:ls", "-", "a{0..1}b", "file:x", "50%25"])
def test_folders_of_any_name(tmp_path, beton, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    convert(beton, Path(name))
    convert(Path(name), Path("back"))
    assert files(tmp_path / "back") == files(beton.parent)


def test_a_file_of_stock_ffcv_has_numbers_for_names(tmp_path):
    stored = write(tmp_path / "x.beton", sidecar=False)
    convert(tmp_path / "x.beton", tmp_path / "shards")
    opened = Shards.open(tmp_path / "shards", "x")
    assert opened.names[7] == "000000007.jpg" and opened.source is None and opened.classes is None
    convert(tmp_path / "shards", tmp_path / "back")
    back = Beton.open(tmp_path / "back" / "x.beton")
    assert [back.sample(i).tobytes() for i in range(len(back))] == stored and back.label.tolist() == [i % 3 for i in range(len(NAMES))]


def test_equal_samples_give_equal_bytes(tmp_path, beton):
    for name in ("one", "two"):
        convert(beton, tmp_path / name, samples_per_shard=3)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    with tarfile.open(tmp_path / "one" / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


# ------------------------------------------------------------------------------------------------ read by others


def test_the_library_reads_every_sample(tmp_path, beton):
    convert(beton, tmp_path / "shards", samples_per_shard=3)
    urls = [str(p) for p in sorted((tmp_path / "shards").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [s["jpg"] for s in samples] == [jpeg(i) for i in range(len(NAMES))]
    assert [int(s["cls"]) for s in samples] == [i % 3 for i in range(len(NAMES))]
    assert len({s["__key__"] for s in samples}) == len(NAMES)
    assert samples[0]["__key__"] == "a/one" and samples[1]["__key__"] == "a/two%2Ev2"


@pytest.mark.parametrize("labels", [True, False])
def test_dali_reads_every_sample(tmp_path, labels):
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali.pipeline import Pipeline

    write(tmp_path / "in" / "train.beton", labels=labels)
    convert(tmp_path / "in", tmp_path / "shards", samples_per_shard=3)
    opened = Shards.open(tmp_path / "shards", "train")
    tars, indices = ([str(tar.with_suffix(f".{kind}")) for tar in opened.tars] for kind in ("tar", "idx"))
    pipeline = Pipeline(len(NAMES), 1, None)
    with pipeline:
        parts = fn.readers.webdataset(paths=tars, index_paths=indices, ext=["jpg", "cls"][: 1 + labels])
        pipeline.set_outputs(*(parts if labels else [parts]))
    pipeline.build()
    images, *found = pipeline.run()
    assert [bytes(np.asarray(images.at(i))) for i in range(len(NAMES))] == [jpeg(i) for i in range(len(NAMES))]
    if labels:
        assert [int(bytes(np.asarray(found[0].at(i)))) for i in range(len(NAMES))] == [i % 3 for i in range(len(NAMES))]


def test_the_index_says_where_the_parts_lie(tmp_path, beton):
    convert(beton, tmp_path / "shards", samples_per_shard=100)
    tar, lines = (
        (tmp_path / "shards" / "train-000000.tar").read_bytes(),
        (tmp_path / "shards" / "train-000000.idx").read_text().splitlines(),
    )
    assert lines[0] == f"v1.2 {len(NAMES)}"
    for i, line in enumerate(lines[1:]):
        label, image = line.split(" ")[:4], line.split(" ")[4:]
        assert (label[0], image[0]) == ("cls", "jpg") and label[3].removesuffix("cls") == image[3].removesuffix("jpg")
        for part, content in ((label, b"%d" % (i % 3)), (image, jpeg(i))):
            assert tar[int(part[1]) : int(part[1]) + int(part[2])] == content


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764/n01440764_10026"),
        ("/data/a.b/c", "data/a%2Eb/c"),
        ("../up.jpg", "%2E%2E/up"),
        (".hidden", "%2Ehidden"),
        ("__meta__/a.jpg", "%5F_meta__/a"),
        ("50%.jpg", "50%25"),
        ("a b\n.jpg", "a%20b%0A"),
    ],
)
def test_keys_keep_to_what_every_reader_understands(name, expected):
    assert key(name) == expected
    assert webdataset.tariterators.base_plus_ext(f"{expected}.jpg") == (expected, "jpg")


# ------------------------------------------------------------------------------------------------ refusals


def test_raw_images_are_refused_before_anything_is_written(tmp_path):
    write(tmp_path / "train.beton", raw=True)
    with pytest.raises(DataError, match="1 raw images.*--raw-fraction 0"):
        convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with (
        pytest.raises(DataError, match="Sample 0 is stored as raw pixels.*--raw-fraction 0"),
        ShardWriter(tmp_path / "out", "train", 1) as writer,
    ):
        writer.append(bytes(12), RAW, 2, 2, 0)
    assert not (tmp_path / "out").exists()


def test_existing_output_is_kept_unless_told_otherwise(tmp_path, beton):
    convert(beton, tmp_path / "out", samples_per_shard=1)
    before = files(tmp_path / "out")
    with pytest.raises(DataError, match="train.json exists already. Add --overwrite"):
        convert(beton, tmp_path / "out")
    assert files(tmp_path / "out") == before
    convert(beton, tmp_path / "out", samples_per_shard=4, overwrite=True)
    assert len(Shards.open(tmp_path / "out", "train").tars) == 2  # the six others went
    convert(tmp_path / "out", tmp_path / "back")
    with pytest.raises(DataError, match="train.beton exists already"):
        convert(tmp_path / "out", tmp_path / "back")


def test_a_split_in_the_other_format_gives_way_but_not_the_source(tmp_path, beton):
    write(tmp_path / "out" / "train.beton", labels=False)
    with pytest.raises(DataError, match="out/train.beton exists already .of a split in both formats loaders open the .beton"):
        convert(beton, tmp_path / "out")
    convert(beton, tmp_path / "out", overwrite=True)
    assert sorted(files(tmp_path / "out")) == ["train-000000.idx", "train-000000.tar", "train.json"]
    convert(beton, beton.parent, overwrite=True)  # a copy beside it
    convert(tmp_path / "out", tmp_path / "out")
    for folder in (beton.parent, tmp_path / "out"):
        assert {"train.beton", "train.beton.json", "train.json", "train-000000.tar"} < files(folder).keys()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_nothing(tmp_path, error):
    with (
        pytest.raises(DataError if isinstance(error, OSError) else error),
        ShardWriter(tmp_path / "new", "t", 9, samples_per_shard=2) as writer,
    ):
        for i in range(5):
            writer.append(jpeg(i), JPEG, 9 + i, 12, 0)
        assert len(list((tmp_path / "new").iterdir())) == 6  # three tars, two indices, the sidecar; all partial
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_keeps_the_old_set(tmp_path, beton):
    convert(beton, tmp_path / "out", samples_per_shard=2)
    (tmp_path / "out" / "train-000009.tar.partial").write_bytes(b"left by a killed conversion")
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match="1 samples and 2 names"), ShardWriter(tmp_path / "out", "train", 2) as writer:
        writer.append(jpeg(0), JPEG, 9, 12, 0)
        writer.finish(["a", "b"])
    del before["train-000009.tar.partial"]
    assert files(tmp_path / "out") == before


def test_two_writers_of_one_set(tmp_path):
    with ShardWriter(tmp_path, "train", 1) as writer:
        with pytest.raises(DataError, match="Another process is writing"), ShardWriter(tmp_path, "train", 1):
            pass
        writer.append(jpeg(0), JPEG, 9, 12, 0)
        writer.finish(["a"])
    assert Shards.open(tmp_path, "train").sample(0).tobytes() == jpeg(0)


def test_a_damaged_image_is_not_copied(tmp_path, beton):
    convert(beton, tmp_path / "shards", samples_per_shard=3)
    opened = Beton.open(beton)
    flip(beton, int(opened.ptr[4]) + 30)
    with pytest.raises(DataError, match="train.beton is damaged: the bytes of sample 4"):
        convert(beton, tmp_path / "out")
    shards = Shards.open(tmp_path / "shards", "train")
    flip(shards.file(4), int(shards.offset[4]) + 30)
    with pytest.raises(DataError, match="train-000001.tar is damaged: the bytes of sample 4"):
        convert(tmp_path / "shards", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", ["header", "label"])
def test_a_damaged_tar_is_not_taken_for_a_shorter_one(tmp_path, beton, part):
    convert(beton, tmp_path / "shards", samples_per_shard=3)
    shards = Shards.open(tmp_path / "shards", "train")
    image = int(shards.offset[4])  # before it lie: header of the label, label, header of the image
    with open(shards.file(4), "r+b") as f:
        f.seek(image - 1024 if part == "label" else image - 512)
        f.write(b"9" if part == "label" else bytes(512))
    with pytest.raises(DataError, match="is damaged"):
        convert(tmp_path / "shards", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as f:
        f.seek(position)
        byte = f.read(1)[0]
        f.seek(position)
        f.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: None, "neither a .beton nor a folder"),
        (lambda p: p.mkdir(), "no .beton and no shards"),
        (lambda p: (write(p / "train.beton"), convert(p, p)), "holds .beton files and shards"),
    ],
)
def test_what_is_no_source(tmp_path, make, text):
    make(tmp_path / "in")
    with pytest.raises(DataError, match=text):
        convert(tmp_path / "in", tmp_path / "out")


def test_a_disk_too_small(tmp_path, beton, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(DataError, match="needs about .* but the disk of .* has 0.0 MB free"):
        convert(beton, tmp_path / "out")


def test_the_command_line(tmp_path, beton, capsys):
    main(["--source", str(beton), "--out", str(tmp_path / "out"), "--samples-per-shard", "3"])
    assert "train-*.tar: 8 images" in capsys.readouterr().out and len(Shards.open(tmp_path / "out", "train")) == len(NAMES)
    with pytest.raises(SystemExit, match="error: A shard cannot hold 0 samples"):
        main(["--source", str(beton), "--out", str(tmp_path / "other"), "--samples-per-shard", "0"])
