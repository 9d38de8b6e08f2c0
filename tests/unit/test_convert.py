"""Class folders -> .beton: what is stored, in which order, and what the user is told when it cannot be done."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convert.write as write
from convert.encode import DamagedImage, Encoding, encode, encode_all
from convert.imagenet import convert_folder, convert_imagenet
from convert.parallel import AHEAD, in_order
from convert.progress import Progress
from convert.sources import Files, from_class_folders
from loaders.beton import JPEG, RAW, Beton
from loaders.errors import DataError

ROOT = Path(__file__).parents[2]


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def tree(root: Path, **classes: list[str]) -> Path:
    """Class folders with pictures of varied size; returns `root`."""
    for c, (name, files) in enumerate(classes.items()):
        for i, file in enumerate(files):
            path = root / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(40 + 31 * i, 60 + 13 * c, seed=10 * c + i).save(path)
    return root


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    tree(root / "train", cat=["b.jpg", "a.JPEG", "z/d.png", "a/c.png", "m/x/a.png", "m-/a.png"], dog=["1.webp", "10.bmp", "2.ppm", "3.TIF"])
    tree(root / "val", dog=["v.jpg"])
    return root


def everything_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def cli(*args: object, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "convert.imagenet", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, **kwargs)


# ------------------------------------------------------------------------------------------------ one image


@pytest.mark.parametrize(
    ("size", "stored"),
    [((800, 600), (500, 375)), ((333, 1000), (166, 500)), ((500, 20), (500, 20)), ((2000, 8), (500, 2)), ((3000, 1), (500, 1))],
)
def test_longer_side_is_at_most_500(size, stored):
    out = io.BytesIO()
    picture(*size).save(out, "PNG")
    image = encode(out.getvalue(), Encoding())
    assert (image.width, image.height) == stored == Image.open(io.BytesIO(image.data)).size
    assert image.crc32 == zlib.crc32(image.data)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA", "1"])
def test_stored_as_baseline_420_jpeg_of_the_rgb_image(mode):
    out = io.BytesIO()
    image = picture(90, 70, mode=mode)
    image.save(out, "TIFF" if mode == "CMYK" else "PNG")
    stored = encode(out.getvalue(), Encoding())
    reopened = Image.open(io.BytesIO(stored.data))
    assert reopened.mode == "RGB" and "progression" not in reopened.info
    assert [part[1:3] for part in reopened.layer] == [(2, 2), (1, 1), (1, 1)]  # sampling factors of Y, Cb, Cr
    assert b"\xff\xc0" in stored.data and b"\xff\xdd" not in stored.data  # baseline, no restart interval
    standard = io.BytesIO()
    image.convert("RGB").save(standard, "JPEG", quality=90, subsampling=2)
    assert stored.data == standard.getvalue()


def test_shrinking_is_antialiased():
    stripes = np.zeros((600, 1500, 3), np.uint8)
    stripes[:, ::2] = 255
    out = io.BytesIO()
    Image.fromarray(stripes).save(out, "PNG")
    stored = np.asarray(Image.open(io.BytesIO(encode(out.getvalue(), Encoding()).data)))
    assert np.abs(stored.astype(int) - 127).max() < 30  # without a filter: black and white


@pytest.mark.parametrize("size", [(1200, 900), (3200, 2400)])
def test_scaled_decoding_changes_nothing_to_speak_of(size):
    """Detail as fine as the stored size can show, against a full decode."""
    noise = np.random.default_rng(0).integers(0, 256, (188, 250, 3), np.uint8)
    original, expected = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise).convert("L").resize(size, Image.Resampling.BICUBIC).save(original, "JPEG", quality=95)
    Image.open(original).convert("RGB").resize((500, 375), Image.Resampling.LANCZOS).save(expected, "JPEG", quality=100)
    stored = encode(original.getvalue(), Encoding(quality=100)).data
    difference = np.asarray(Image.open(io.BytesIO(stored))).astype(int) - np.asarray(Image.open(expected))
    assert np.abs(difference).mean() < 0.5


def test_exif_orientation_and_metadata_are_dropped():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    out = io.BytesIO()
    picture(80, 40).save(out, "JPEG", exif=exif, comment=b"a remark", icc_profile=b"profile")
    stored = Image.open(io.BytesIO(encode(out.getvalue(), Encoding()).data))
    assert stored.size == (80, 40) and not stored.getexif() and not {"comment", "icc_profile"} & stored.info.keys()


@pytest.mark.parametrize(("side", "quality"), [(15, 90), (9000, 90), (500, 0), (500, 101)])
def test_impossible_encodings(side, quality):
    with pytest.raises(DataError, match="Choose --max-side from 16 to 8192 and --quality from 1 to 100"):
        Encoding(max_side=side, quality=quality)


def odd_images(tmp_path: Path) -> tuple[Path, dict]:
    """The collection's folder and what its manifest says of each file."""
    archive = Path(os.environ.get("FASTSSL_DATA", "")) / "odd_images.tar"
    if not archive.is_file():
        pytest.skip("FASTSSL_DATA has no odd_images.tar")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path / "odd_images", json.loads((tmp_path / "odd_images" / "manifest.json").read_text())["files"]


def test_every_odd_image_is_what_its_manifest_says(tmp_path):
    """Through the whole conversion: right pixels or bad, as documented where the manifest leaves the choice."""
    folder, manifest = odd_images(tmp_path / "set" / "all")
    (report,) = convert_imagenet(tmp_path / "set" / "all", tmp_path / "out", workers=1, raw_fraction=1.0, on_bad="skip")
    # Pixels after a lost end marker would be guesses, so such a file is bad.
    bad = {name for name, entry in manifest.items() if entry["expect"] in ("error", "error-or-partial", "decode-or-error")}
    assert {Path(name).name for name, _ in report.skipped} == bad and len(bad) == 14
    opened = Beton.open(report.path)
    names = [Path(name).name for name in opened.names]
    assert set(names) == set(manifest) - bad - {"no_extension"}  # folders are scanned by extension
    for i, name in enumerate(names):
        with Image.open(folder / name) as image:
            rgb = image.convert("RGB")
            if image.mode == "I;16":
                rgb = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
                assert len(np.unique(np.asarray(rgb))) > 16  # not clipped
        pixels = opened.sample(i).reshape(opened.height[i], opened.width[i], 3)
        if max(rgb.size) <= 500:
            np.testing.assert_array_equal(pixels, np.asarray(rgb), err_msg=name)
        else:
            smaller = rgb.resize((pixels.shape[1], pixels.shape[0]), Image.Resampling.LANCZOS)
            assert np.abs(pixels.astype(int) - np.asarray(smaller)).mean() < 3, name


def test_odd_images_with_kept_originals(tmp_path):
    """What is kept decodes as the rest: grey, CMYK, RGB-coded, progressive and 16-bit-table JPEGs are encoded anew."""
    folder, manifest = odd_images(tmp_path / "set" / "all")
    (report,) = convert_imagenet(tmp_path / "set" / "all", tmp_path / "out", workers=1, keep_original=True, on_bad="skip")
    opened = Beton.open(report.path)
    kept = {Path(n).name for i, n in enumerate(opened.names) if opened.sample(i).tobytes() == (tmp_path / "set" / "all" / n).read_bytes()}
    assert len(kept) == report.kept
    plain = {name for name in manifest if name.startswith(("exif_", "ok_baseline", "tiny", "name with", "ok_restart"))}
    assert kept == plain


# ------------------------------------------------------------------------------------------------ a data set


def test_order_and_labels_are_imagefolders(source, tmp_path):
    from torchvision.datasets import ImageFolder

    (source / "train" / "cat" / "._a.JPEG").write_bytes(b"left by a file manager")
    (source / "train" / "cat" / "notes.txt").write_text("no image")
    (source / "train" / ".cache").mkdir()
    report = convert_folder(source / "train", tmp_path / "out.beton", workers=1, progress=False)
    opened = Beton.open(tmp_path / "out.beton")
    (source / "train" / "cat" / "._a.JPEG").unlink()
    (source / "train" / ".cache").rmdir()
    folder = ImageFolder(str(source / "train"), is_valid_file=lambda p: not p.endswith(".txt"))
    assert opened.names == [os.path.relpath(p, source / "train") for p, _ in folder.samples]
    assert opened.label.tolist() == [label for _, label in folder.samples]
    assert opened.classes == folder.classes and opened.source == str(source / "train")
    assert (report.images, report.classes, report.bytes) == (10, 2, (tmp_path / "out.beton").stat().st_size)
    for i, (image, _) in enumerate(folder):
        assert opened.mode[i] == JPEG and (opened.width[i], opened.height[i]) == image.size
        stored = np.asarray(Image.open(io.BytesIO(opened.sample(i).tobytes()))).astype(int)
        assert np.abs(stored - np.asarray(image)).mean() < 6
        assert zlib.crc32(opened.sample(i)) == opened.crc32[i]


def test_bytes_do_not_depend_on_the_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    folder = tree(tmp_path / "set", **{f"c{c}": [f"{i}.jpg" for i in range(7)] for c in range(6)})
    for workers in (1, 2, 3):
        convert_folder(folder, tmp_path / str(workers) / "set.beton", workers=workers, max_side=150, progress=False)
    for name in ("set.beton", "set.beton.json"):
        one, two, three = ((tmp_path / str(w) / name).read_bytes() for w in (1, 2, 3))
        assert one == two == three
    opened = Beton.open(tmp_path / "1" / "set.beton")
    assert len(opened) == 42 and max(opened.width.max(), opened.height.max()) == 150


def test_memory_stays_bounded(tmp_path):
    """No more than a window of results exists before the first is taken."""
    names = [f"{i}.jpg" for i in range(5000)]
    for name in names[:4]:
        picture(20, 20).save(tmp_path / name)
    submitted = []

    class Names(list):
        def __getitem__(self, key):
            submitted.append(key)
            return super().__getitem__(key)

    results = encode_all(Files(tmp_path, Names(names)), Encoding(), workers=2)
    assert next(results).width == 20
    assert max(submitted) < 100
    results.close()


def test_killed_worker(tmp_path):
    picture(20, 20).save(tmp_path / "0.jpg")
    results = encode_all(Files(tmp_path, ["0.jpg"] * 2000), Encoding(), workers=2)
    next(results)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(DataError, match="A worker process was killed.*fewer --workers"):
        list(results)


def test_worker_killed_in_the_middle_of_a_result():
    """More bytes than a pipe holds, and nobody reads them."""
    results = in_order(bytes, [(8 << 20,)] * 12, workers=2)
    assert len(next(results)) == 8 << 20
    time.sleep(1.0)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(DataError, match="A worker process was killed"):
        list(results)
    assert not multiprocessing.active_children()


def test_errors_of_workers_and_results_in_order():
    assert list(in_order(divmod, [(i, 3) for i in range(50)], workers=3)) == [divmod(i, 3) for i in range(50)]
    results = in_order(divmod, [(1, 1), (1, 0), (1, 1)], workers=2)
    assert next(results) == (1, 0)
    with pytest.raises(ZeroDivisionError) as raised:
        next(results)
    assert "_work" in str(raised.value.__cause__), "where it happened"
    assert not multiprocessing.active_children() and list(in_order(divmod, [], workers=2)) == []


def worker_of(waits_for: Path, makes: Path) -> int:
    while not waits_for.exists():
        time.sleep(0.01)
    makes.touch()
    return os.getpid()


def test_others_go_on_while_one_task_takes_long(tmp_path):
    """The first takes until the last that fits beside it is done; the task behind it waits, and no more."""
    now, last, other = tmp_path, tmp_path / "last", tmp_path / "other"
    tasks = [(last, other), *[(now, other)] * (2 * AHEAD - 2), (now, last)]
    pids = list(in_order(worker_of, tasks, workers=2))
    assert pids.count(pids[0]) == 2 and len(set(pids)) == 2


def test_command_line(source, tmp_path):
    done = cli("--source", source, "--out", tmp_path / "out", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert everything_below(tmp_path / "out") == [
        "conversion_report.json",
        "train.beton",
        "train.beton.json",
        "val.beton",
        "val.beton.json",
    ]
    val = Beton.open(tmp_path / "out" / "val.beton")
    assert val.label.tolist() == [1] and val.classes == ["cat", "dog"]  # the training set's index
    assert "10 images of 2 classes" in done.stdout and "1 images of 1 classes" in done.stdout
    assert f"python train.py --preset simclr_mini --data.path {tmp_path / 'out'}" in done.stdout

    before = (tmp_path / "out" / "train.beton").stat()
    again = cli("--source", source, "--out", tmp_path / "out")
    assert again.returncode == 1 and "exist already. Add --overwrite" in again.stderr and "Traceback" not in again.stderr
    assert (tmp_path / "out" / "train.beton").stat() == before
    replaced = cli("--source", source, "--out", tmp_path / "out", "--overwrite", "--max-side", 50, "--workers", 1)
    assert replaced.returncode == 0 and Beton.open(tmp_path / "out" / "train.beton").width.max() == 50


def test_class_folders_alone(source, tmp_path, capsys):
    (report,) = convert_imagenet(source / "train", tmp_path / "out", workers=1)
    assert report.path == tmp_path / "out" / "train.beton" and report.images == 10
    assert "has no train/ and val/: its 2 folders are taken as the classes" in capsys.readouterr().err


def test_no_val(source, tmp_path, capsys):
    (source / "val").rename(source / "test")
    assert len(convert_imagenet(source, tmp_path / "out", workers=1)) == 1
    assert "has no val/: only train.beton is written" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ options


def saved(image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def test_kept_originals_are_untouched(tmp_path):
    folder = tmp_path / "set" / "c"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "a_420.jpg": saved(picture(90, 60), quality=70, exif=exif, comment=b"a remark"),
        "b_422.jpg": saved(picture(90, 60), subsampling="4:2:2"),
        "c_444.jpg": saved(picture(90, 60), subsampling="4:4:4", restart_marker_rows=1),
        "d_large.jpg": saved(picture(600, 60)),
        "e_progressive.jpg": saved(picture(90, 60), progressive=True),
        "f_grey.jpg": saved(picture(90, 60, mode="L")),
        "g_cmyk.jpg": saved(picture(90, 60, mode="CMYK")),
        "h_rgb.jpg": saved(picture(90, 60), keep_rgb=True),
        "i_trailing.jpg": saved(picture(90, 60)) + b"junk",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    report = convert_imagenet(folder.parent, tmp_path / "out", keep_original=True, workers=1)[0]
    opened = Beton.open(report.path)
    same = [opened.sample(i).tobytes() == data for i, data in enumerate(files.values())]
    assert same == [True] * 3 + [False] * 6
    assert (report.kept, report.re_encoded, report.raw, report.resized) == (3, 6, 0, 1)
    for i, data in enumerate(files.values()):
        stored, original = (Image.open(io.BytesIO(d)).convert("RGB") for d in (opened.sample(i).tobytes(), data))
        assert np.abs(np.asarray(stored).astype(int) - np.asarray(original.resize(stored.size, Image.Resampling.LANCZOS))).mean() < 3


def test_a_kept_original_has_no_fault_at_all():
    """Fill bytes before the end marker are no damage, but not every decoder's business either."""
    clean = saved(picture(90, 60))
    padded = clean[:-2] + bytes(300) + clean[-2:]
    assert encode(clean, Encoding(keep_original=True)).kept
    stored = encode(padded, Encoding(keep_original=True))
    assert not stored.kept and stored.data == encode(clean, Encoding()).data


@pytest.mark.parametrize("progressive", [False, True])
def test_damaged_scans_are_bad(progressive):
    """libjpeg only warns of these, and Pillow decodes them."""
    clean = saved(picture(800, 600, seed=3).effect_spread(4), progressive=progressive)
    encode(clean, Encoding())
    middle = len(clean) // 2
    with pytest.raises(DamagedImage, match="Corrupt JPEG data"):
        encode(clean[:middle] + clean[middle + 400 :], Encoding())
    noise = np.random.default_rng(0).integers(0, 255, 400, np.uint8).tobytes()
    with pytest.raises(DamagedImage, match="Corrupt JPEG data"):
        encode(clean[:middle] + noise + clean[middle + 400 :], Encoding())


@pytest.mark.parametrize(("subsampling", "luma"), [("4:2:0", (2, 2)), ("4:2:2", (2, 1)), ("4:4:4", (1, 1))])
def test_subsampling(subsampling, luma):
    stored = encode(saved(picture(90, 60)), Encoding(subsampling=subsampling))
    assert [part[1:3] for part in Image.open(io.BytesIO(stored.data)).layer] == [luma, (1, 1), (1, 1)]


def test_raw_images_are_a_fixed_choice(tmp_path):
    folder = tree(tmp_path / "set", c=[f"{i:03d}.png" for i in range(30)])
    modes = {}
    for out, options in {"a": {}, "b": {"workers": 2}, "c": {"seed": 1}, "d": {"raw_fraction": 1.0}}.items():
        report = convert_imagenet(folder, tmp_path / out, **({"workers": 1, "raw_fraction": 0.4, "max_side": 64} | options))[0]
        opened = Beton.open(report.path)
        modes[out] = opened.mode.tolist()
        assert report.raw == sum(mode == RAW for mode in modes[out]) and report.raw + report.re_encoded == 30
    assert modes["a"] == modes["b"] != modes["c"]
    assert (tmp_path / "a" / "train.beton").read_bytes() == (tmp_path / "b" / "train.beton").read_bytes()
    assert set(modes["d"]) == {RAW}
    chosen = [{i for i in range(2000) if Encoding(raw_fraction=share).stores_raw(i)} for share in (0.0, 0.2, 0.5, 1.0)]
    assert chosen[0] < chosen[1] < chosen[2] < chosen[3] and len(chosen[3]) == 2000
    assert abs(len(chosen[1]) - 400) < 60 and abs(len(chosen[2]) - 1000) < 80
    with Image.open(folder / "c" / "000.png") as image:  # not resized
        np.testing.assert_array_equal(opened.sample(0).reshape(60, 40, 3), np.asarray(image))


def test_classes_by_number_and_by_list(tmp_path):
    source = tmp_path / "set"
    for split, files in (("train", ["1.jpg", "2.jpg"]), ("val", ["3.jpg"])):
        tree(source / split, ant=files, bee=files, cat=files, dog=files)
    (tmp_path / "list.txt").write_text("dog\n\nbee\n")
    for out, classes, expected in (("first", "2", ["ant", "bee"]), ("list", str(tmp_path / "list.txt"), ["bee", "dog"])):
        convert_imagenet(source, tmp_path / out, classes=classes, workers=1)
        train, val = (Beton.open(tmp_path / out / f"{split}.beton") for split in ("train", "val"))
        assert train.classes == val.classes == expected
        assert train.label.tolist() == [0, 0, 1, 1] and val.label.tolist() == [0, 1]
        assert train.names == [f"{c}/{i}.jpg" for c in expected for i in (1, 2)]
    shutil.rmtree(source / "val" / "bee")
    shutil.rmtree(source / "val" / "dog")
    refuses(source, tmp_path / "out", "None of the 2 chosen classes has an image in .*val", classes=str(tmp_path / "list.txt"))
    refuses(source, tmp_path / "out", "There are 4 classes, of which --classes 5", classes="5")
    refuses(source, tmp_path / "out", "cannot be read from .*nowhere", classes="nowhere")
    (tmp_path / "list.txt").write_text("bee\nwolf\n")
    refuses(source, tmp_path / "out", "lists 1 classes that the source does not have: wolf", classes=str(tmp_path / "list.txt"))


@pytest.mark.parametrize("workers", [1, 2])
def test_skipping_bad_images(source, tmp_path, workers):
    (source / "train" / "cat" / "b.jpg").write_text("no image")
    (source / "train" / "dog" / "1.webp").write_bytes(b"")
    reports = convert_imagenet(source, tmp_path / "out", workers=workers, on_bad="skip")
    opened = Beton.open(tmp_path / "out" / "train.beton")
    every = from_class_folders(source / "train", "train")
    good = [i for i, name in enumerate(every.names) if name not in ("cat/b.jpg", "dog/1.webp")]
    assert opened.names == [every.names[i] for i in good] and opened.label.tolist() == every.labels[good].tolist()
    for i, name in enumerate(opened.names):
        assert opened.sample(i).tobytes() == encode((source / "train" / name).read_bytes(), Encoding()).data
    skipped = [("cat/b.jpg", "is not an image"), ("dog/1.webp", "is empty")]
    assert list(reports[0].skipped) == skipped and "2 skipped: cat/b.jpg (is not an image)" in str(reports[0])
    assert opened.options["skipped"] == [list(pair) for pair in skipped]


def test_a_class_may_not_vanish(source, tmp_path):
    for file in (source / "train" / "dog").iterdir():
        file.write_text("no image")
    refuses(source, tmp_path / "out", "No image of class dog in .*train .* can be converted", on_bad="skip")


def test_the_report_has_everything(source, tmp_path):
    (source / "train" / "dog" / "2.ppm").write_text("no image")
    (source / "val" / "cat").mkdir()
    picture(900, 30).save(source / "val" / "cat" / "wide.png")
    convert_imagenet(source, tmp_path / "out", workers=1, on_bad="skip", raw_fraction=0.0, seed=3)
    content = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert content["source"] == str(source) and content["options"]["max_side"] == 500 and content["options"]["seed"] == 3
    train, val = content["splits"]["train"], content["splits"]["val"]
    assert train["per_class"] == {"min": 3, "median": 4.5, "max": 6, "counts": {"cat": 6, "dog": 3}}
    assert train["skipped"] == [{"name": "dog/2.ppm", "reason": "is not an image"}]
    assert (train["images"], train["re_encoded"], train["resized"], train["kept"], train["raw"]) == (9, 9, 0, 0, 0)
    assert (val["images"], val["resized"]) == (2, 1)


def test_shards_are_the_beton_in_another_form(source, tmp_path):
    pytest.importorskip("webdataset")
    from loaders.shards import Shards

    beton = convert_imagenet(source, tmp_path / "beton", workers=1)
    shards = convert_imagenet(source, tmp_path / "shards", workers=1, format="webdataset")
    for one, other in zip(beton, shards, strict=True):
        a, b = Beton.open(one.path), Shards.open(tmp_path / "shards", other.split)
        assert a.names == b.names and a.classes == b.classes and a.label.tolist() == b.label.tolist() and a.options == b.options
        assert [a.sample(i).tobytes() for i in range(len(a))] == [b.sample(i).tobytes() for i in range(len(b))]
    refuses(source, tmp_path / "out", "Shards hold JPEGs.*Add --raw-fraction 0", format="webdataset", raw_fraction=0.5)
    refuses(source, tmp_path / "shards", "exist already. Add --overwrite", format="webdataset")


@pytest.mark.parametrize(("first", "then", "there"), [("beton", "webdataset", "train.beton"), ("webdataset", "beton", "train.json")])
def test_no_split_in_two_formats(source, tmp_path, first, then, there, capsys):
    """Loaders would open the .beton, whichever is new."""
    pytest.importorskip("webdataset")
    out = tmp_path / "out"
    convert_imagenet(source, out, workers=1, format=first)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    refuses(source, out, f"{there} exist already .of a split in both formats .*Add --overwrite, or choose", format=then)
    whole = (source / "train" / "dog" / "2.ppm").read_bytes()
    (source / "train" / "dog" / "2.ppm").write_text("no image")
    refuses(source, out, "^1 files cannot be converted", format=then, overwrite=True)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    (source / "train" / "dog" / "2.ppm").write_bytes(whole)
    convert_imagenet(source, tmp_path / "alone", workers=1, format=then)
    convert_imagenet(source, out, workers=1, format=then, overwrite=True)
    assert everything_below(out) == everything_below(tmp_path / "alone")
    assert f"{there} is replaced by the new files and was removed" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ refusals


def refuses(source: Path, out: Path, text: str, **options) -> str:
    """One paragraph, and nothing new on the disk."""
    before = everything_below(out.parent)
    with pytest.raises(DataError, match=text) as caught:
        convert_imagenet(source, out, **{"workers": 1} | options)
    assert everything_below(out.parent) == before and "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_source(tmp_path):
    refuses(tmp_path / "nowhere", tmp_path / "out", "There is no folder .*Give the folder")


def test_empty_source(tmp_path):
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", tmp_path / "out", "holds nothing that can be converted. Understood are: .*Give the folder")


def test_images_without_class_folders(source, tmp_path):
    (source / "val" / "dog" / "v.jpg").rename(source / "val" / "v.jpg")
    (source / "val" / "dog").rmdir()
    refuses(source, tmp_path / "out", "val holds 1 images but no class folders.*sort val/ into class folders")


def test_class_without_images(source, tmp_path):
    for i in range(7):
        (source / "train" / f"empty{i}").mkdir()
    (source / "train" / "empty0" / "readme.txt").touch()
    refuses(source, tmp_path / "out", "7 class folders of .*train hold no images .*: empty0, empty1, empty2, empty3, empty4 and 2 more")


def test_val_class_that_train_has_not(source, tmp_path):
    (source / "val" / "dog").rename(source / "val" / "wolf")
    refuses(source, tmp_path / "out", "1 class folders that the training set has not: wolf")


def test_val_without_train(source, tmp_path):
    (source / "train").rename(source / "other")
    refuses(source, tmp_path / "out", "has val/ but no train/")


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_files(source, tmp_path, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    whole = (source / "train" / "cat" / "b.jpg").read_bytes()
    (source / "train" / "cat" / "b.jpg").write_bytes(whole[: len(whole) // 2])
    (source / "train" / "dog" / "1.webp").write_text("no image")
    (source / "train" / "dog" / "2.ppm").write_bytes(b"")
    message = refuses(source, tmp_path / "out", "^3 files cannot be converted: .*Replace or remove them", workers=workers)
    for text in ("cat/b.jpg (OSError: ", "dog/1.webp (is not an image)", "dog/2.ppm (is empty)"):
        assert text in message


def test_at_most_twenty_bad_files_are_collected(tmp_path):
    folder = tree(tmp_path / "set", cat=["0.jpg"])
    for i in range(1, 60):
        (folder / "cat" / f"{i}.jpg").write_text("no image")
    message = refuses(folder, tmp_path / "out", "^20 or more files cannot be converted")
    assert message.count("is not an image") == 20


def test_full_disk_is_foreseen(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1_000_000))
    monkeypatch.setattr(write, "_write", lambda *_: pytest.fail("wrote"))
    refuses(source, tmp_path / "out", r"needs about 16.8 MB, but the disk of .* has 1.0 MB free. Free space")


def test_the_estimate_is_close(tmp_path):
    folder = tree(tmp_path / "set", **{f"c{c}": [f"{i}.jpg" for i in range(40)] for c in range(3)})
    split = from_class_folders(folder, "train")
    expected = write.estimate(split, Encoding(max_side=128)) - write.PAGE_SIZE
    convert_folder(folder, tmp_path / "x.beton", max_side=128, workers=1, progress=False)
    opened = Beton.open(tmp_path / "x.beton")
    assert expected == pytest.approx(int(opened.size.sum()) + 80 * len(opened), rel=0.1)


def test_a_bad_val_image_spares_the_training_set(source, tmp_path):
    """Both files or none; and the small split goes first."""
    (source / "val" / "dog" / "v.jpg").write_text("no image")
    refuses(source, tmp_path / "out", "^1 files cannot be converted: .*v.jpg")
    (source / "val" / "dog" / "v.jpg").unlink()
    picture(50, 50).save(source / "val" / "dog" / "v.jpg")
    (source / "train" / "cat" / "b.jpg").write_text("no image")
    refuses(source, tmp_path / "out", "^1 files cannot be converted: .*b.jpg")


def test_workers(source, tmp_path, capsys, monkeypatch):
    refuses(source, tmp_path / "out", "cannot be -1 workers", workers=-1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    convert_imagenet(source, tmp_path / "out", workers=64)
    assert "64 workers asked for, but 1 cores are available: using 1" in capsys.readouterr().err


def test_errors_reach_the_shell_as_one_paragraph(tmp_path):
    done = cli("--source", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: There is no folder") and done.stderr.count("\n") == 1
    wrong = cli("--source", tmp_path, "--quallity", 3)
    assert wrong.returncode == 2 and "--quality" in wrong.stderr


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_the_terminal_cannot_show(source, tmp_path, encoding):
    os.rename(source / "train" / "dog" / "2.ppm", os.fsencode(source / "train" / "dog") + b"/caf\xe9 \xc3\xa9.ppm")
    (source / "train" / "dog" / os.fsdecode(b"caf\xe9 \xc3\xa9.ppm")).write_text("no image")
    strict = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    done = cli("--source", source, "--out", tmp_path / "out", "--workers", 1, "--on-bad", "skip", env=strict)
    assert done.returncode == 0, done.stderr
    assert f"1 skipped: dog/caf\\udce9 {'é' if encoding == 'utf-8' else chr(92) + 'xe9'}.ppm (is not an image)" in done.stdout
    assert "Complete table: " in done.stdout
    (split,) = (v for k, v in json.loads((tmp_path / "out" / "conversion_report.json").read_text())["splits"].items() if k == "train")
    assert split["skipped"][0]["name"] == "dog/caf\udce9 é.ppm"
    (source / "train" / "dog" / os.fsdecode(b"caf\xe9 \xc3\xa9.ppm")).rename(source / "train" / "dog" / os.fsdecode(b"new\xff.ppm"))
    command = [sys.executable, "-m", "convert.verify", "--beton", str(tmp_path / "out"), "--source", str(source), "--workers", "1"]
    verified = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=strict)
    assert verified.returncode == 1 and "dog/new\\udcff.ppm of the source is missing" in verified.stdout, verified.stderr


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_conversion_leaves_nothing(tmp_path, stop, code):
    folder = tree(tmp_path / "set", cat=["0.jpg"])
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cat" / "0.jpg")
    for i in range(1, 4000):
        (folder / "cat" / f"{i}.jpg").symlink_to("0.jpg")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "convert.imagenet", "--source", str(folder), "--out", str(out), "--workers", "2"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs the tests in the background may have it ignored
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=heard)
    deadline = time.monotonic() + 150
    while not (out / "train.beton.partial").exists() or (out / "train.beton.partial").stat().st_size < 9 << 20:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, stop)  # as a terminal or Slurm does: the workers get it too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in stderr
    assert not out.exists()


# ------------------------------------------------------------------------------------------------ progress


def test_progress_lines_without_a_terminal(capsys):
    with Progress("train.beton", 1000, every=0) as progress:
        for _ in range(250):
            progress.update("60.0 GB expected")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 250 and lines[-1].startswith("train.beton 250 / 1,000 images (25.0 %) | ")
    assert " img/s | " in lines[-1] and lines[-1].endswith(" left | 60.0 GB expected")
    with Progress("train.beton", 1000) as progress:
        progress.update()
    assert capsys.readouterr().err == ""  # not a line for each image


def test_progress_bar_on_a_terminal(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("val.beton", 3) as progress:
        for _ in range(3):
            progress.update("1.0 MB expected")
    assert "val.beton: 100%" in terminal.getvalue() and "3/3" in terminal.getvalue()
