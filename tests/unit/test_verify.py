"""python -m convert.verify finds whatever is not as it was written, or not as in the source."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import convert.imagenet as imagenet
from convert.imagenet import convert_imagenet
from convert.verify import verify
from loaders.beton import JPEG, Beton, BetonWriter
from loaders.errors import DataError
from loaders.sidecar import sidecar_path

ROOT = Path(__file__).parents[2]


def picture(seed: int) -> Image.Image:
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8))
    return coarse.resize((60 + seed, 50), Image.Resampling.BICUBIC)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for split, n in (("train", 6), ("val", 2)):
        for c, name in enumerate(("cat", "dog")):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(n):
                picture(10 * c + i).save(tmp_path / "set" / split / name / f"{i}.{'png' if i % 3 == 2 else 'jpg'}")
    return tmp_path / "set"


OPTIONS = {"keep_original": True, "raw_fraction": 0.3, "max_side": 64, "quality": 85, "workers": 1}


@pytest.fixture
def made(source: Path, tmp_path: Path) -> Path:
    convert_imagenet(source, tmp_path / "out", **OPTIONS)
    return tmp_path / "out"


def differences(made: Path, source: Path | None = None, split: str = "train") -> list[str]:
    return next(v for v in verify(made, source, workers=1) if v.path.stem == split).differences


def test_nothing_to_find(source, made):
    modes = Beton.open(made / "train.beton").mode.tolist()
    assert 0 < sum(modes) < 12
    for verdicts in (verify(made, workers=1), verify(made, source, workers=2)):
        assert [(v.path.name, v.images, v.differences) for v in verdicts] == [("train.beton", 12, []), ("val.beton", 4, [])]
    text = str(verdicts[0])
    assert "12 images of 2 classes, 6 to 6 images a class" in text and text.endswith(f"and are the images of {source / 'train'}.")


def test_conversion_with_verify(source, tmp_path, monkeypatch):
    checked = []
    real = imagenet.verify_set
    monkeypatch.setattr(imagenet, "verify_set", lambda path, *args: checked.append(path.name) or real(path, *args))
    convert_imagenet(source, tmp_path / "out", verify=True, **OPTIONS)
    assert sorted(checked) == ["train.beton", "val.beton"]

    def damaging(path: Path, *args):
        flip(path, 0)
        return real(path, *args)

    monkeypatch.setattr(imagenet, "verify_set", damaging)
    with pytest.raises(DataError, match="was written, but reading it again found 1 difference, first: sample 0"):
        convert_imagenet(source, tmp_path / "out", verify=True, overwrite=True, **OPTIONS)


def flip(beton: Path, i: int) -> None:
    """One bit in the middle of sample i."""
    opened = Beton.open(beton)
    at = int(opened.ptr[i]) + int(opened.size[i]) // 2
    with open(beton, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 4]))


def test_a_flipped_byte(source, made):
    flip(made / "train.beton", 7)
    found = differences(made)
    assert found == [f"sample 7 ({Beton.open(made / 'train.beton').names[7]}): its bytes are not those that were written"]
    assert differences(made, split="val") == []


def rewrite(beton: Path, *, leave_out: int | None = None, label_of: int | None = None, swap: tuple[int, int] | None = None) -> None:
    """The same file by the writer, consistent in itself, but with one sample wrong."""
    old = Beton.open(beton)
    order = [i for i in range(len(old)) if i != leave_out]
    if swap:
        a, b = swap
        order[a], order[b] = order[b], order[a]
    samples = [(old.sample(i).tobytes(), int(old.mode[i]), int(old.height[i]), int(old.width[i])) for i in order]
    labels = [int(old.label[i]) ^ (i == label_of) for i in order]
    with BetonWriter(beton, len(order)) as writer:
        for sample, label in zip(samples, labels, strict=True):
            writer.append(*sample, label)
        writer.finish([old.names[i] for i in order], old.classes, old.source, old.options)


def test_a_wrong_label(source, made):
    rewrite(made / "train.beton", label_of=2)
    assert differences(made) == []
    assert differences(made, source) == [f"sample 2 ({Beton.open(made / 'train.beton').names[2]}) has label 1, and in the source 0"]


def test_a_missing_image_and_one_too_many(source, made):
    rewrite(made / "train.beton", leave_out=3)
    assert differences(made, source) == ["cat/3.jpg of the source is missing"]
    (source / "val" / "dog" / "1.jpg").unlink()
    assert differences(made, source, "val") == ["sample 3 (dog/1.jpg) is not in the source"]


def test_another_order(source, made):
    rewrite(made / "val.beton", swap=(0, 1))
    assert differences(made, source, "val") == ["the samples are not in the source's order"]


def test_another_image_in_the_source(source, made):
    opened = Beton.open(made / "train.beton")
    raw, plain = int(np.flatnonzero(opened.mode)[0]), int(np.flatnonzero(opened.mode == JPEG)[0])
    for i in (raw, plain):
        file = source / "train" / opened.names[i]
        with Image.open(file) as image:
            size = image.size
        picture(31).resize(size).save(file)
    found = differences(made, source)
    assert len(found) == 2 and all("are not the source's" in f for f in found)
    picture(40).save(source / "train" / opened.names[plain])
    assert any("pixels, and the source gives" in f for f in differences(made, source))
    (source / "train" / opened.names[plain]).write_text("no image")
    assert any("its image in the source is not an image" in f for f in differences(made, source))


def test_another_encoder_passes_and_other_pixels_do_not(source, tmp_path):
    """JPEGs of the same pixels need not be equal byte for byte."""
    convert_imagenet(source, tmp_path / "out", workers=1)
    path = tmp_path / "out" / "train.beton"
    old = Beton.open(path)

    def encoded(i: int, change: int) -> bytes:
        with Image.open(source / "train" / old.names[i]) as image:
            pixels = np.clip(np.asarray(image.convert("RGB")).astype(int) + change, 0, 255).astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", quality=90, subsampling="4:2:0", optimize=True)
        return out.getvalue()

    for change, count in ((0, 0), (8, 1)):
        data = [encoded(i, change if i == 5 else 0) for i in range(len(old))]
        with BetonWriter(path, len(data)) as writer:
            for i, jpeg in enumerate(data):
                writer.append(jpeg, JPEG, int(old.height[i]), int(old.width[i]), int(old.label[i]))
            writer.finish(old.names, old.classes, old.source, old.options)
        found = differences(tmp_path / "out", source)
        assert len(found) == count and all("sample 5" in f and "its pixels are not the source's" in f for f in found)


def test_skipped_images_and_chosen_classes_are_known(source, tmp_path):
    (source / "train" / "cat" / "1.jpg").write_text("no image")
    convert_imagenet(source, tmp_path / "out", workers=1, on_bad="skip", classes="1")
    assert [v.differences for v in verify(tmp_path / "out", source, workers=1)] == [[], []]


def test_without_labels(tmp_path):
    (tmp_path / "flat").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "flat" / f"{i}.jpg")
    convert_imagenet(tmp_path / "flat", tmp_path / "out", workers=1)
    (verdict,) = verify(tmp_path / "out", tmp_path / "flat", workers=1)
    assert not verdict.differences and "3 images without labels" in str(verdict)


def test_labels_of_any_size(tmp_path):
    """In a file that FFCV wrote."""
    for labels, text in (([2**62, 2**62, -1, 5], "of 2 classes, 1 to 2 images a class"), ([-1, -1, -1, -1], "without labels")):
        with BetonWriter(tmp_path / "x.beton", 4) as writer:
            for label in labels:
                data = io.BytesIO()
                picture(0).save(data, "JPEG")
                writer.append(data.getvalue(), JPEG, 50, 60, label)
            writer.finish([f"{i}.jpg" for i in range(4)])
        sidecar_path(tmp_path / "x.beton").unlink()
        assert text in str(verify(tmp_path / "x.beton", workers=1)[0])


def test_shards(source, tmp_path):
    pytest.importorskip("webdataset")
    convert_imagenet(source, tmp_path / "out", workers=1, format="webdataset")
    assert [(v.path.name, v.differences) for v in verify(tmp_path / "out", source, workers=1)] == [("train.json", []), ("val.json", [])]
    tar = tmp_path / "out" / "val-000000.tar"
    data = bytearray(tar.read_bytes())
    at = data.index(b"\xff\xda") + 40
    data[at] ^= 4
    tar.write_bytes(data)
    assert differences(tmp_path / "out", split="val")[0].endswith("its bytes are not those that were written")


def test_what_cannot_be_compared(source, made, tmp_path):
    with pytest.raises(DataError, match="no .beton and no set of shards"):
        verify(tmp_path / "set")
    shutil.copy(made / "val.beton", made / "test.beton")
    shutil.copy(made / "val.beton.json", made / "test.beton.json")
    with pytest.raises(DataError, match="has no split test"):
        verify(made, source)
    (made / "val.beton.json").unlink()
    with pytest.raises(DataError, match="has no sidecar, so its images cannot be found"):
        verify(made / "val.beton", source, workers=1)


def test_command_line(source, made):
    command = [sys.executable, "-m", "convert.verify", "--workers", "1", "--source", str(source), "--beton", str(made)]
    good = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert good.returncode == 0 and good.stdout.count("\n") == 2, good.stderr
    flip(made / "train.beton", 1)
    bad = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert bad.returncode == 1 and "1 difference:\n  sample 1 (" in bad.stdout and "Traceback" not in bad.stderr
    path = sidecar_path(made / "val.beton")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_samples": 5}))
    broken = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert broken.returncode == 1 and broken.stderr.startswith("error: ") and "Convert again with" in broken.stderr
