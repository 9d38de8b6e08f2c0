"""Class folders -> .beton: what is stored, in which order, and what the user is told when it cannot be done."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convert.imagenet as imagenet
from convert.encode import Bad, Encoding, encode, encode_file, encode_files
from convert.imagenet import convert_folder, convert_imagenet, scan
from convert.progress import Progress
from loaders.beton import JPEG, Beton
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
    tree(root / "train", cat=["b.jpg", "a.JPEG", "z/d.png", "a/c.png", "m/x/a.png", "m-/a.png"], dog=["1.webp", "10.bmp", "2.gif", "3.TIF"])
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
    assert (image.width, image.height) == stored == Image.open(io.BytesIO(image.jpeg)).size
    assert image.crc32 == zlib.crc32(image.jpeg)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "RGBA", "LA", "1"])
def test_stored_as_baseline_420_jpeg_of_the_rgb_image(mode):
    out = io.BytesIO()
    image = picture(90, 70, mode=mode)
    image.save(out, "TIFF" if mode == "CMYK" else "PNG")
    stored = encode(out.getvalue(), Encoding())
    reopened = Image.open(io.BytesIO(stored.jpeg))
    assert reopened.mode == "RGB" and "progression" not in reopened.info
    assert [part[1:3] for part in reopened.layer] == [(2, 2), (1, 1), (1, 1)]  # sampling factors of Y, Cb, Cr
    assert b"\xff\xc0" in stored.jpeg and b"\xff\xdd" not in stored.jpeg  # baseline, no restart interval
    standard = io.BytesIO()
    image.convert("RGB").save(standard, "JPEG", quality=90, subsampling=2)
    assert stored.jpeg == standard.getvalue()


def test_shrinking_is_antialiased():
    stripes = np.zeros((600, 1500, 3), np.uint8)
    stripes[:, ::2] = 255
    out = io.BytesIO()
    Image.fromarray(stripes).save(out, "PNG")
    stored = np.asarray(Image.open(io.BytesIO(encode(out.getvalue(), Encoding()).jpeg)))
    assert np.abs(stored.astype(int) - 127).max() < 30  # without a filter: black and white


@pytest.mark.parametrize("size", [(1200, 900), (3200, 2400)])
def test_scaled_decoding_changes_nothing_to_speak_of(size):
    """Detail as fine as the stored size can show, against a full decode."""
    noise = np.random.default_rng(0).integers(0, 256, (188, 250, 3), np.uint8)
    original, expected = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise).convert("L").resize(size, Image.Resampling.BICUBIC).save(original, "JPEG", quality=95)
    Image.open(original).convert("RGB").resize((500, 375), Image.Resampling.LANCZOS).save(expected, "JPEG", quality=100)
    stored = encode(original.getvalue(), Encoding(quality=100)).jpeg
    difference = np.asarray(Image.open(io.BytesIO(stored))).astype(int) - np.asarray(Image.open(expected))
    assert np.abs(difference).mean() < 0.5


def test_exif_orientation_and_metadata_are_dropped():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    out = io.BytesIO()
    picture(80, 40).save(out, "JPEG", exif=exif, comment=b"a remark", icc_profile=b"profile")
    stored = Image.open(io.BytesIO(encode(out.getvalue(), Encoding()).jpeg))
    assert stored.size == (80, 40) and not stored.getexif() and not {"comment", "icc_profile"} & stored.info.keys()


@pytest.mark.parametrize(("side", "quality"), [(15, 90), (9000, 90), (500, 0), (500, 101)])
def test_impossible_encodings(side, quality):
    with pytest.raises(DataError, match="Choose --max-side from 16 to 8192 and --quality from 1 to 100"):
        Encoding(max_side=side, quality=quality)


def test_odd_images(tmp_path):
    """Every file of the collection either decodes as Pillow decodes it or is called bad."""
    archive = Path(os.environ.get("FASTSSL_DATA", "")) / "odd_images.tar"
    if not archive.is_file():
        pytest.skip("FASTSSL_DATA has no odd_images.tar")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    manifest = json.loads((tmp_path / "odd_images" / "manifest.json").read_text())["files"]
    for name, entry in manifest.items():
        result = encode_file(tmp_path / "odd_images" / name, Encoding())
        assert isinstance(result, Bad) == entry["pillow"].startswith("refuses"), name
        assert isinstance(result, Bad) or max(result.height, result.width) <= 500, name


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
            submitted.append(key.stop)
            return super().__getitem__(key)

    results = encode_files(tmp_path, Names(names), Encoding(), workers=2)
    assert next(results).width == 20
    assert max(submitted) <= 100
    results.close()


def test_killed_worker(tmp_path):
    picture(20, 20).save(tmp_path / "0.jpg")
    results = encode_files(tmp_path, ["0.jpg"] * 2000, Encoding(), workers=2)
    next(results)
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(DataError, match="A conversion process was killed.*fewer --workers"):
        list(results)


def test_command_line(source, tmp_path):
    done = cli("--source", source, "--out", tmp_path / "out", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert everything_below(tmp_path / "out") == ["train.beton", "train.beton.json", "val.beton", "val.beton.json"]
    val = Beton.open(tmp_path / "out" / "val.beton")
    assert val.label.tolist() == [1] and val.classes == ["cat", "dog"]  # the training set's index
    assert "10 images of 2 classes" in done.stdout and "1 images of 1 classes" in done.stdout
    assert f"python train.py --method lewel --data.path {tmp_path / 'out'}" in done.stdout

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
    refuses(tmp_path / "empty", tmp_path / "out", "holds no class folders")


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
    (source / "train" / "dog" / "2.gif").write_bytes(b"")
    message = refuses(source, tmp_path / "out", "^3 files cannot be converted: .*Replace or remove them", workers=workers)
    for text in ("cat/b.jpg (OSError: ", "dog/1.webp (is not an image)", "dog/2.gif (is empty)"):
        assert text in message


def test_at_most_twenty_bad_files_are_collected(tmp_path):
    folder = tree(tmp_path / "set", cat=["0.jpg"])
    for i in range(1, 60):
        (folder / "cat" / f"{i}.jpg").write_text("no image")
    message = refuses(folder, tmp_path / "out", "^20 or more files cannot be converted")
    assert message.count("is not an image") == 20


def test_full_disk_is_foreseen(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(imagenet.shutil, "disk_usage", lambda _: usage(1_000_000))
    monkeypatch.setattr(imagenet, "_write", lambda *_: pytest.fail("wrote"))
    refuses(source, tmp_path / "out", r"needs about 16.8 MB, but the disk of .* has 1.0 MB free. Free space")


def test_the_estimate_is_close(tmp_path):
    folder = tree(tmp_path / "set", **{f"c{c}": [f"{i}.jpg" for i in range(40)] for c in range(3)})
    split = scan(folder, tmp_path / "x.beton")
    expected = imagenet.estimate(split, Encoding(max_side=128)) - imagenet.PAGE_SIZE
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


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_conversion_leaves_nothing(tmp_path, stop, code):
    folder = tree(tmp_path / "set", cat=["0.jpg"])
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    Image.fromarray(noise).save(folder / "cat" / "0.jpg")
    for i in range(1, 4000):
        (folder / "cat" / f"{i}.jpg").symlink_to("0.jpg")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "convert.imagenet", "--source", str(folder), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
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
