"""Every form that images come in gives the samples, names and labels that its unpacked class folders would give."""

import io
import json
import os
import pickle
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convert.detect import detect
from convert.imagenet import convert_imagenet, next_step
from loaders.beton import RAW, Beton
from loaders.errors import DataError


def jpeg(seed: int, side: int = 40) -> bytes:
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8))
    out = io.BytesIO()
    coarse.resize((side + seed % 7, side), Image.Resampling.BICUBIC).save(out, "JPEG")
    return out.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path | None, files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            add(tar, name, data)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def converted(source: Path, out: Path, **options) -> dict[str, Beton]:
    return {r.split: Beton.open(r.path) for r in convert_imagenet(source, out, **({"workers": 1} | options))}


def same(a: Beton, b: Beton) -> bool:
    assert (a.names, a.classes) == (b.names, b.classes)
    assert a.label.tolist() == b.label.tolist()
    return all(a.sample(i).tobytes() == b.sample(i).tobytes() for i in range(len(a)))


def refuses(source: Path, out: Path, text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        convert_imagenet(source, out, workers=1)
    assert "\n" not in str(caught.value) and not out.exists()


# ------------------------------------------------------------------------------------------------ ILSVRC2012

WNIDS = ["n00000007", "n00000003", "n00000005"]
"""By ILSVRC2012 id: 1, 2, 3."""
TRUTH = [2, 1, 3, 1, 2]


def devkit(path: Path, truth: list[int] = TRUTH) -> None:
    from scipy.io import savemat

    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(i + 1, wnid, f"thing {i}", 0) for i, wnid in enumerate(WNIDS)] + [(4, "n00000001", "entity", 3)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, fields)[:, None]})
    root = "ILSVRC2012_devkit_t12/data"
    lines = "".join(f"{label}\n" for label in truth)
    files = {f"{root}/meta.mat": meta.getvalue(), f"{root}/ILSVRC2012_validation_ground_truth.txt": lines.encode()}
    write_tar(path / "ILSVRC2012_devkit_t12.tar.gz", files, "w:gz")


@pytest.fixture
def official(tmp_path: Path) -> tuple[Path, Path]:
    """The two official tars with their devkit, and their unpacked tree."""
    tars, tree = tmp_path / "tars", tmp_path / "tree"
    classes = {}
    for c, wnid in enumerate(WNIDS):  # neither classes nor images sorted
        images = {f"{wnid}_{i}.JPEG": jpeg(10 * c + i) for i in (10, 9, 1)}
        classes[f"{wnid}.tar"] = write_tar(None, images)
        for name, data in images.items():
            (tree / "train" / wnid).mkdir(parents=True, exist_ok=True)
            (tree / "train" / wnid / name).write_bytes(data)
    write_tar(tars / "ILSVRC2012_img_train.tar", classes)
    val = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(100 + i) for i in (3, 1, 2, 5, 4)}
    for name, data in val.items():
        folder = tree / "val" / WNIDS[TRUTH[int(name[15:23]) - 1] - 1]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    write_tar(tars / "ILSVRC2012_img_val.tar", val)
    devkit(tars)
    return tars, tree


@pytest.mark.parametrize("workers", [1, 2])
def test_official_tars_are_their_unpacked_tree(official, tmp_path, workers):
    tars, tree = official
    a, b = (converted(s, tmp_path / s.name / "out", workers=workers) for s in (tars, tree))
    assert a.keys() == b.keys() == {"train", "val"}
    assert all(same(a[split], b[split]) for split in a)
    assert a["train"].names[:3] == [f"n00000003/n00000003_{i}.JPEG" for i in (1, 10, 9)] and a["val"].label.tolist() == [0, 0, 1, 2, 2]
    assert (tmp_path / "tars/out/train.beton").read_bytes() == (tmp_path / "tree/out/train.beton").read_bytes()


def test_one_tar_alone_and_a_folder_with_a_tar(official, tmp_path):
    tars, tree = official
    both = converted(tree, tmp_path / "both")
    (tree / "val").rename(tree / "elsewhere")
    for name in ("ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"):
        (tree / name).write_bytes((tars / name).read_bytes())
    assert same(converted(tree, tmp_path / "mixed")["val"], both["val"])
    (tars / "ILSVRC2012_img_train.tar").rename(tmp_path / "away.tar")
    alone = converted(tars, tmp_path / "val_alone")
    assert alone.keys() == {"val"} and same(alone["val"], both["val"])
    (tmp_path / "away.tar").rename(tars / "ILSVRC2012_img_train.tar")
    (tars / "ILSVRC2012_img_val.tar").unlink()
    assert same(converted(tars, tmp_path / "train_alone")["train"], both["train"])


def test_official_tars_that_are_not_complete(official, tmp_path):
    tars, _ = official
    out = tmp_path / "out"
    kit = tars / "ILSVRC2012_devkit_t12.tar.gz"
    kit.rename(tmp_path / "kit")
    refuses(tars, out, "not the labels of its images. Put ILSVRC2012_devkit_t12.tar.gz .* next to it")
    devkit(tars, TRUTH[:4])
    refuses(tars, out, "holds 5 images, but ILSVRC2012_devkit_t12.tar.gz labels 4")
    devkit(tars, [9, *TRUTH[1:]])
    refuses(tars, out, "labels an image with the class 9, which it does not describe")
    write_tar(kit, {"data/readme.txt": b""}, "w:gz")
    refuses(tars, out, "lacks data/meta.mat and data/ILSVRC2012_validation_ground_truth.txt")
    (tmp_path / "kit").rename(kit)
    whole = (tars / "ILSVRC2012_img_train.tar").read_bytes()
    for cut in (700, len(whole) // 2):
        (tars / "ILSVRC2012_img_train.tar").write_bytes(whole[:cut])
        refuses(tars, out, "cannot be read as a complete tar")
    write_tar(tars / "ILSVRC2012_img_train.tar", {"n00000003.tar": write_tar(None, {"n00000003_1.JPEG": jpeg(0)})})
    refuses(tars, out, "has 2 classes that the training set has not: n00000005, n00000007")


# ------------------------------------------------------------------------------------------------ STL-10


def stl10_files(folder: Path, images: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    for part, pixels in images.items():
        (folder / f"{part}_X.bin").write_bytes(pixels.transpose(0, 3, 2, 1).tobytes())
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")


def test_stl10(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = {part: rng.integers(0, 256, (n, 96, 96, 3), np.uint8) for part, n in (("train", 11), ("test", 5), ("unlabeled", 19))}
    folder = tmp_path / "data" / "stl10_binary"
    stl10_files(folder, images)
    (folder / "train_y.bin").write_bytes(bytes([1, 3, 2] * 3 + [1, 1]))
    (folder / "test_y.bin").write_bytes(bytes([3, 3, 1, 2, 3]))
    (folder / "fold_indices.txt").write_text("0 1 2\n")
    reports = convert_imagenet(tmp_path / "data", tmp_path / "out", workers=2)
    assert [(r.split, r.images, r.raw) for r in reports] == [("train", 11, 11), ("val", 5, 5), ("unlabeled", 19, 19)]
    for report, part in zip(reports, images, strict=True):
        opened = Beton.open(report.path)
        stored = np.stack([opened.sample(i).reshape(96, 96, 3) for i in range(len(opened))])
        np.testing.assert_array_equal(stored, images[part])
    train, val, unlabeled = (Beton.open(r.path) for r in reports)
    assert train.label.tolist() == [0, 2, 1] * 3 + [0, 0] and val.label.tolist() == [2, 2, 0, 1, 2] and unlabeled.label is None
    assert train.classes == ["airplane", "bird", "car"] and val.names[4] == "test/000004"
    assert next_step(reports).endswith(f"--data.path {tmp_path / 'out' / 'unlabeled.beton'}")

    as_jpeg = converted(folder, tmp_path / "jpeg", raw_fraction=0.0, quality=95)  # the folder itself, and a chosen fraction
    assert not as_jpeg["train"].mode.any()
    few = converted(folder, tmp_path / "few", classes="1")
    assert few["train"].label.tolist() == [0] * 5 and len(few["unlabeled"]) == 19


def test_stl10_that_is_not_complete(tmp_path):
    folder = tmp_path / "stl10_binary"
    stl10_files(folder, {"train": np.zeros((2, 96, 96, 3), np.uint8)})
    refuses(folder, tmp_path / "out", "There is no .*train_y.bin with the labels")
    (folder / "train_y.bin").write_bytes(bytes([1]))
    refuses(folder, tmp_path / "out", "has 2 images and 1 labels for train")
    for labels in ([0, 1], [1, 4]):
        (folder / "train_y.bin").write_bytes(bytes(labels))
        refuses(folder, tmp_path / "out", "labels for train that name no class")
    (folder / "train_X.bin").write_bytes(b"\0" * 100)
    refuses(folder, tmp_path / "out", "has 100 bytes, which is not a whole number of 96 x 96 images")


def test_the_small_stl10(tmp_path):
    archive = Path(os.environ.get("FASTSSL_DATA", "")) / "stl10_mini.tar"
    if not archive.is_file():
        pytest.skip("FASTSSL_DATA has no stl10_mini.tar")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / "stl10_binary"
    stored = converted(tmp_path, tmp_path / "out")
    assert {split: len(s) for split, s in stored.items()} == {"train": 120, "val": 60, "unlabeled": 80}
    for split, part in (("train", "train"), ("val", "test"), ("unlabeled", "unlabeled")):
        planes = np.fromfile(folder / f"{part}_X.bin", np.uint8).reshape(-1, 3, 96, 96)
        for i in (0, 7, len(planes) - 1):
            pixels = stored[split].sample(i).reshape(96, 96, 3)
            assert all((pixels[:, x, c] == planes[i, c, x]).all() for c in range(3) for x in range(96))
    assert {stored["train"].classes[label] for label in stored["train"].label} == {"airplane", "car"}


# ------------------------------------------------------------------------------------------------ CIFAR


def cifar_batch(seed: int, n: int, labels: str, prefix: str, protocol: int = 2) -> tuple[bytes, np.ndarray, list[int]]:
    """A batch as the archive has it, its pixels uint8 [n, 32, 32, 3] and its labels."""
    rng = np.random.default_rng(seed)
    pixels, classes = rng.integers(0, 256, (n, 32, 32, 3), np.uint8), rng.integers(0, 3, n).tolist()
    names = [b"%s_%d.png" % (prefix.encode(), i) for i in range(n)]
    batch = {b"data": pixels.transpose(0, 3, 1, 2).reshape(n, -1).copy(), labels.encode(): classes, b"filenames": names}
    return pickle.dumps(batch, protocol=protocol), pixels, classes


@pytest.mark.parametrize("form", ["folder", "parent", "archive", "archive in a folder"])
def test_cifar10(tmp_path, form):
    batches = {f"data_batch_{i}": cifar_batch(i, 4, "labels", f"b{i}") for i in range(1, 6)} | {
        "test_batch": cifar_batch(9, 5, "labels", "t")
    }
    files = {name: batch[0] for name, batch in batches.items()}
    files["batches.meta"] = pickle.dumps({b"label_names": [b"airplane", b"automobile", b"bird"], b"num_vis": 3072}, protocol=2)
    inside = {f"cifar-10-batches-py/{name}": data for name, data in files.items()}
    if "archive" in form:
        write_tar(tmp_path / "data" / "cifar-10-python.tar.gz", inside, "w:gz")
    else:
        for name, data in inside.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    source = {"folder": "cifar-10-batches-py", "archive": "cifar-10-python.tar.gz"}.get(form, ".")
    stored = converted(tmp_path / "data" / source, tmp_path / "out")
    train, val = stored["train"], stored["val"]
    assert (len(train), len(val)) == (20, 5) and train.classes == ["airplane", "automobile", "bird"] and (train.mode == RAW).all()
    expected = np.concatenate([batches[f"data_batch_{i}"][1] for i in range(1, 6)])
    np.testing.assert_array_equal(np.stack([train.sample(i).reshape(32, 32, 3) for i in range(20)]), expected)
    assert (
        train.label.tolist() == sum((batches[f"data_batch_{i}"][2] for i in range(1, 6)), [])
        and val.label.tolist() == batches["test_batch"][2]
    )
    assert train.names[4] == "data_batch_2/b2_0.png"


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar100_with_fine_labels(tmp_path, protocol):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    batch = {name: cifar_batch(i, 6, "fine_labels", name, protocol) for i, name in enumerate(("train", "test"))}
    for name, (data, _, _) in batch.items():
        (folder / name).write_bytes(data)
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"a", b"b", b"c"], b"coarse_label_names": [b"x"]}, protocol=protocol))
    stored = converted(tmp_path, tmp_path / "out")
    assert stored["train"].label.tolist() == batch["train"][2] and stored["train"].classes == ["a", "b", "c"]
    assert stored["val"].sample(3).tobytes() == batch["test"][1][3].tobytes()
    (folder / "test").unlink()
    refuses(folder, tmp_path / "new", "is incomplete: it lacks test")
    (tmp_path / "cifar-10-batches-py").mkdir()
    refuses(tmp_path, tmp_path / "new", "holds both CIFAR-10 and CIFAR-100. Say which")


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_may_only_hold_arrays(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": Evil(tmp_path / "made")}))
    refuses(folder, tmp_path / "out", "meta of .* cannot be read .*asks for .*mkdir, which no CIFAR archive needs")
    assert not (tmp_path / "made").exists()


# ------------------------------------------------------------------------------------------------ shards, flat folders


def test_webdataset_shards(tmp_path):
    images = {i: jpeg(i) for i in range(9)}
    png = io.BytesIO()
    Image.open(io.BytesIO(images[8])).save(png, "PNG")
    shard = tmp_path / "shards"
    write_tar(
        shard / "set-train-000001.tar",
        {"b/5.cls": b"2\n", "b/5.jpg": images[5], "b/5.txt": b"a caption", "a.6.JPEG": b"", "c.png": png.getvalue(), "c.cls": b"0"},
    )
    write_tar(
        shard / "set-train-000000.tar",
        {f"k{i}.{e}": d for i in range(4) for e, d in (("jpg", images[i]), ("json", json.dumps({"label": i % 3}).encode()))},
    )
    write_tar(shard / "set-validation-000000.tar", {"v.jpeg": images[7], "v.cls": b"1"})
    with pytest.raises(DataError, match=r"Sample a of .*000001.tar has no image among its files \(6.jpeg"):
        detect(shard)
    write_tar(
        shard / "set-train-000001.tar",
        {"b/5.cls": b"2\n", "b/5.jpg": images[5], "b/5.txt": b"a caption", "c.png": png.getvalue(), "c.cls": b"0"},
    )
    stored = converted(shard, tmp_path / "out", keep_original=True)
    train, val = stored["train"], stored["val"]
    assert train.names == [f"set-train-000000/k{i}.jpg" for i in range(4)] + ["set-train-000001/b/5.jpg", "set-train-000001/c.png"]
    assert train.label.tolist() == [0, 1, 2, 0, 2, 0] and val.label.tolist() == [1] and train.classes is None
    assert [train.sample(i).tobytes() for i in range(5)] == [images[i] for i in (0, 1, 2, 3, 5)] and val.sample(0).tobytes() == images[7]
    chosen = converted(shard, tmp_path / "some", classes="2")["train"]
    assert chosen.classes == ["0", "1"] and chosen.label.tolist() == [0, 1, 0, 0]


def test_shards_with_few_labels_and_without(tmp_path):
    write_tar(tmp_path / "s" / "a.tar", {"1.jpg": jpeg(1), "2.jpg": jpeg(2)})
    write_tar(tmp_path / "s" / "b.tar", {"3.webp": jpeg(3), "3.json": b'{"url": "x"}'})
    stored = converted(tmp_path / "s", tmp_path / "out")
    assert stored.keys() == {"train"} and len(stored["train"]) == 3 and stored["train"].label is None
    write_tar(tmp_path / "s" / "b.tar", {"3.webp": jpeg(3), "3.cls": b"4"})
    refuses(tmp_path / "s", tmp_path / "new", "2 of 3 samples of .* for train have no label .* for example a/1.jpg")
    write_tar(tmp_path / "s" / "a.tar", {"1.jpg": jpeg(1), "1.cls": b"0"})
    for label in (b"dog", b"-1", b"1000000000000", b"%d" % 2**70, b"10000000", b"9" * 5000):
        for ending, content in (("cls", label), ("json", b'{"label": %s}' % label)):
            write_tar(tmp_path / "s" / "b.tar", {"3.webp": jpeg(3), f"3.{ending}": content})
            refuses(tmp_path / "s", tmp_path / "new", f"The label in 3.{ending} of .*b.tar is not a number from 0 to 9,999,999, but ")
    write_tar(tmp_path / "s" / "a.tar", {"1.jpg": jpeg(1), "2.jpg": jpeg(2)})
    (tmp_path / "s" / "b.tar").write_bytes((tmp_path / "s" / "a.tar").read_bytes()[:600])
    refuses(tmp_path / "s", tmp_path / "new", "b.tar cannot be read as a complete tar")


def test_a_key_that_comes_again_is_another_sample(tmp_path):
    """As in shards that `tar -A` joined: the library reads all four, and so do we."""
    shard = tmp_path / "s" / "all.tar"
    shard.parent.mkdir()
    kept = [jpeg(i) for i in range(4)]
    with tarfile.open(shard, "w") as tar:
        for i in range(4):
            add(tar, f"{i % 2}.jpg", kept[i])
            add(tar, f"{i % 2}.cls", b"%d" % i)
    stored = converted(tmp_path / "s", tmp_path / "out", keep_original=True, verify=True)["train"]
    assert [stored.sample(i).tobytes() for i in range(4)] == kept and stored.label.tolist() == [0, 1, 2, 3]
    assert stored.names == ["all/0.jpg", "all/1.jpg", "all/0-2.jpg", "all/1-2.jpg"]
    library = pytest.importorskip("webdataset").WebDataset(str(shard), shardshuffle=False)
    assert [(s["jpg"], int(s["cls"])) for s in library] == list(zip(kept, range(4), strict=True))


def test_nothing_of_a_shard_is_lost_in_silence(tmp_path):
    shard, out = tmp_path / "s" / "a.tar", tmp_path / "out"
    shard.parent.mkdir()

    def holds(*members: tuple[str, bytes]) -> None:
        with tarfile.open(shard, "w") as tar:
            for member in members:
                add(tar, *member)

    holds(("0.jpg", jpeg(0)), ("0.JPG", jpeg(1)))
    refuses(shard.parent, out, "Sample 0 of .*a.tar has two files jpg, of which one would be lost. Give each")
    holds(("0.jpg", jpeg(0)), ("1.jpg", jpeg(1)), ("0.cls", b"0"), ("1.cls", b"1"))
    refuses(shard.parent, out, "Sample 0 of .* has no image among its files .*Put all files of a sample next to each other")
    holds(("0.jpg", jpeg(0)))
    whole = shard.read_bytes()
    shard.write_bytes(whole + whole)
    refuses(shard.parent, out, "a.tar cannot be read as a complete tar .there is more after its end at byte")
    holds(("0.jpg", jpeg(0)), ("1.jpg", jpeg(1)))
    data = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        data[tar.getmembers()[1].offset] ^= 1
    shard.write_bytes(data)
    refuses(shard.parent, out, "a damaged header, or another tar")


def link(tar: tarfile.TarFile, name: str, to: str, kind: bytes = tarfile.LNKTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    tar.addfile(info)


def test_links_in_shards(tmp_path):
    """tar writes a file once and names it for its other links."""
    shard = tmp_path / "s" / "a.tar"
    shard.parent.mkdir()
    with tarfile.open(shard, "w") as tar:
        add(tar, "./pool", jpeg(5))
        add(tar, "./0.jpg", jpeg(0))
        add(tar, "./0.cls", b"3")
        link(tar, "./1.jpg", "./0.jpg")
        link(tar, "./1.cls", "0.cls")
        link(tar, "./2.jpg", "./1.jpg")
        add(tar, "./2.cls", b"1")
        link(tar, "./3.jpg", "pool")
        link(tar, "./3.cls", "./0.cls")
    stored = converted(shard.parent, tmp_path / "out", keep_original=True, verify=True)["train"]
    assert stored.label.tolist() == [3, 3, 1, 3]
    assert [stored.sample(i).tobytes() for i in range(4)] == [jpeg(0), jpeg(0), jpeg(0), jpeg(5)]
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        with tarfile.open(shard, "w") as tar:
            add(tar, "0.jpg", jpeg(0))
            link(tar, "1.jpg", "later.jpg", kind)
        refuses(shard.parent, tmp_path / "new", "1.jpg of .*a.tar is a link to later.jpg, and its bytes are not .* Write the shard anew")


def test_class_tars_are_not_taken_for_shards(tmp_path):
    write_tar(tmp_path / "train" / "n01440764.tar", {"n01440764_1.JPEG": jpeg(0)})
    refuses(tmp_path / "train", tmp_path / "out", "holds the class tars of ImageNet. Unpack each")


def test_damaged_image_in_a_tar(tmp_path):
    write_tar(tmp_path / "s" / "a.tar", {"1.jpg": jpeg(1), "2.jpg": jpeg(2)[:-60]})
    refuses(tmp_path / "s", tmp_path / "out", r"1 files cannot be converted: a/2.jpg in .*a.tar \(is damaged: ")


def test_flat_folder(tmp_path, capsys):
    folder = tmp_path / "flat"
    folder.mkdir()
    for i in (10, 9, 1):
        (folder / f"{i}.jpg").write_bytes(jpeg(i))
    (folder / "list.txt").touch()
    stored = converted(folder, tmp_path / "out")["train"]
    assert stored.names == ["1.jpg", "10.jpg", "9.jpg"] and stored.label is None and stored.classes is None
    assert "its 3 images are taken as a training set without labels" in capsys.readouterr().err
    with pytest.raises(DataError, match="has no labels, so --classes cannot choose"):
        convert_imagenet(folder, tmp_path / "new", classes="2", workers=1)
    (folder / "c").mkdir()
    (folder / "c" / "1.jpg").write_bytes(jpeg(1))
    assert len(converted(folder, tmp_path / "new")["train"]) == 1
    assert "3 images that lie next to the class folders of" in capsys.readouterr().err


def test_unknown_sources(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    refuses(tmp_path, tmp_path / "out", "holds nothing that can be converted. Understood are: train/ and val/ .* a flat folder")
    refuses(tmp_path / "notes.txt", tmp_path / "out", "is a file of unknown kind. Understood are")
    write_tar(tmp_path / "x.tar.gz", {"x/readme": b""}, "w:gz")
    refuses(tmp_path / "x.tar.gz", tmp_path / "out", "is not a Python archive of CIFAR")
    (tmp_path / "x.tar.gz").write_bytes(b"junk")
    refuses(tmp_path / "x.tar.gz", tmp_path / "out", "cannot be read as a complete .tar.gz")


@pytest.mark.parametrize("closed", [".", "train"])
def test_folders_that_may_not_be_read(closed):
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
        os.chmod(folder, 0o755)
        source = Path(folder, "set")
        (source / "train" / "c").mkdir(parents=True)
        (source / closed).chmod(0)
        os.seteuid(user or 65534)  # root may read everything
        try:
            refuses(source, Path(folder, "out"), f"^{source / closed} cannot be read: Permission denied. Give yourself the right")
        finally:
            os.seteuid(user)
            (source / closed).chmod(0o755)


def test_shards_are_not_written_over_while_they_are_read(tmp_path):
    pytest.importorskip("webdataset")
    write_tar(tmp_path / "s" / "train-000000.tar", {"1.jpg": jpeg(1), "1.cls": b"0"})
    before = (tmp_path / "s" / "train-000000.tar").read_bytes()
    for overwrite in (False, True):
        with pytest.raises(DataError, match="would be written over while they are read"):
            convert_imagenet(tmp_path / "s", tmp_path / "s", format="webdataset", overwrite=overwrite, workers=1)
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "s").iterdir()] == [("train-000000.tar", before)]
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "train-000000.tar").touch()
    with pytest.raises(DataError, match="train.json exists already"):
        convert_imagenet(tmp_path / "s", tmp_path / "there", format="webdataset", workers=1)
    convert_imagenet(tmp_path / "s", tmp_path / "out", format="webdataset", keep_original=True, workers=1)


def test_the_shards_that_are_read_stay(tmp_path):
    pytest.importorskip("webdataset")
    write_tar(tmp_path / "s" / "train-000000.tar", {"1.jpg": jpeg(1), "1.cls": b"0"})
    ours = tmp_path / "ours"
    convert_imagenet(tmp_path / "s", ours, format="webdataset", workers=1)
    for folder in (tmp_path / "s", ours):
        before = {p.name: p.read_bytes() for p in folder.iterdir()}
        assert len(converted(folder, folder, overwrite=True)["train"]) == 1
        assert {name: (folder / name).read_bytes() for name in before if name != "conversion_report.json"}.items() <= before.items()
