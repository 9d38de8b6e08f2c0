"""The folder back end: strange files decode as Pillow decodes them or are named, and folders without classes have no labels."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("simplejpeg")
from loaders.class_folders import scan  # noqa: E402
from loaders.decoder import OK  # noqa: E402
from loaders.errors import DataError  # noqa: E402
from loaders.folder import FolderDecoder  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Palette images with Transparency"),  # Pillow, asked for the reference
]


def decode(folder: Path, classes: list[str] | None = None) -> tuple[FolderDecoder, list[np.ndarray]]:
    """Every image of a folder, uint8 [height, width, 3]."""
    decoder = FolderDecoder(folder, 2, classes)
    ids = np.arange(len(decoder))
    decoder.will_need(ids)
    heights, widths = decoder.sizes(ids)
    sizes = 3 * heights.astype(np.int64) * widths
    offsets = np.cumsum(sizes) - sizes
    buffer = np.empty(int(sizes.sum()), np.uint8)
    status = decoder.decode_into(ids, heights, widths, offsets, buffer)
    for i in np.flatnonzero(status != OK):
        raise decoder.error(int(ids[i]), int(status[i]))
    return decoder, [buffer[o : o + s].reshape(h, w, 3) for o, s, h, w in zip(offsets, sizes, heights, widths, strict=True)]


def expected(file: Path) -> np.ndarray:
    """Pillow's convert("RGB"), but sixteen-bit grey keeps its upper bits."""
    image = Image.open(file)
    if image.mode == "I;16":
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    return np.asarray(image.convert("RGB"))


def picture(mode: str = "RGB") -> Image.Image:
    """Smooth, 40 x 30."""
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8))
    return coarse.resize((40, 30), Image.Resampling.BICUBIC).convert(mode)


def encoded(form: str, image: Image.Image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def transparent_palette() -> bytes:
    image = picture().quantize(16)
    return encoded("PNG", image, transparency=bytes(range(16)))


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("JPEG", picture(), exif=exif)


GOOD = {
    "rgb.jpg": lambda: encoded("JPEG", picture()),
    "grey.jpg": lambda: encoded("JPEG", picture("L")),
    "cmyk.jpg": lambda: encoded("JPEG", picture("CMYK")),
    "progressive.jpg": lambda: encoded("JPEG", picture(), progressive=True),
    "exif.jpg": turned,
    "trailing.jpg": lambda: encoded("JPEG", picture()) + b"junk" * 100,
    "stray bytes before the end.jpg": lambda: encoded("JPEG", picture())[:-2] + bytes(7) + b"\xff\xd9",
    "png named.jpeg": lambda: encoded("PNG", picture("RGBA")),
    "palette.png": lambda: encoded("PNG", picture().quantize(16)),
    "transparent palette.png": transparent_palette,
    "sixteen bit.png": lambda: encoded("PNG", Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 54)),
    "sixteen bit.tif": lambda: encoded("TIFF", Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 54)),
    "grey alpha.png": lambda: encoded("PNG", picture("LA")),
    "bilevel.png": lambda: encoded("PNG", picture("1")),
    "webp.webp": lambda: encoded("WEBP", picture(), lossless=True),
    "ünï, & code.bmp": lambda: encoded("BMP", picture()),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_pillow_decodes(tmp_path, name):
    (tmp_path / name).write_bytes(GOOD[name]())
    decoder, (image,) = decode(tmp_path)
    reference = expected(tmp_path / name)
    assert decoder.files == [name] and decoder.labels is None and decoder.classes is None and image.shape == (30, 40, 3)
    difference = np.abs(image.astype(int) - reference)
    assert difference.max() <= 3 if "jpg" in name else difference.max() == 0


def scribbled() -> bytes:
    """A good header and wrong entropy-coded data, which Pillow decodes without a word."""
    good = bytearray(encoded("JPEG", picture().resize((200, 200)), quality=95))
    middle = (good.index(b"\xff\xda") + len(good)) // 2
    good[middle : middle + 300] = np.random.default_rng(1).integers(0, 255, 300, np.uint8).tobytes()
    return bytes(good)


def bomb() -> bytes:
    """A few bytes that claim 60,000 x 60,000 pixels."""
    small = encoded("PNG", Image.new("RGB", (1, 1)))
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


BAD = {
    "empty.jpg": lambda: b"",
    "text.jpg": lambda: b"hello",
    "cut.jpg": lambda: encoded("JPEG", picture())[:-200],
    "cut progressive.jpg": lambda: encoded("JPEG", picture(), progressive=True)[:-200],
    "header.jpg": lambda: encoded("JPEG", picture())[:100],
    "scribbled.jpg": scribbled,
    "cut.png": lambda: encoded("PNG", picture())[:-60],
    "bomb.png": bomb,
    "float.tif": lambda: encoded("TIFF", Image.fromarray(np.linspace(0, 1, 1200, dtype=np.float32).reshape(30, 40))),
    "integer.tif": lambda: encoded("TIFF", Image.fromarray(np.arange(1200, dtype=np.int32).reshape(30, 40))),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_damaged_is_named(tmp_path, name, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as code of others likes to do
    (tmp_path / "a.jpg").write_bytes(GOOD["rgb.jpg"]())
    (tmp_path / name).write_bytes(BAD[name]())
    with pytest.raises(DataError, match=rf"{name} cannot be read as an image.*python -m convert\.imagenet"):
        decode(tmp_path)


def test_class_folders_have_labels_and_a_folder_of_images_has_none(tmp_path):
    for name in ("one/a/1.jpg", "one/b/2.jpg", "flat/2.jpg", "flat/10.JPG", "flat/.hidden.jpg", "flat/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(GOOD["rgb.jpg"]())
    decoder, _ = decode(tmp_path / "one", ["b", "a"])
    assert decoder.labels.tolist() == [1, 0] and decoder.classes == ["b", "a"]
    decoder, images = decode(tmp_path / "flat", ["b", "a"])
    assert decoder.labels is None and decoder.classes is None and decoder.files == ["10.JPG", "2.jpg"] and len(images) == 2


@pytest.mark.parametrize("broken", [".", "a", "a/deep/er"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, broken):
    """Instead of left out."""
    for name in ("a/1.jpg", "a/deep/er/2.jpg", "b/3.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert len(scan(tmp_path)[0]) == 3
    scandir = os.scandir

    def failing(path):
        if Path(path) == tmp_path / broken:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(DataError, match=rf"{tmp_path / broken} cannot be read: Stale file handle\..* then try again"):
        scan(tmp_path)


def test_the_archive_of_odd_files(tmp_path):
    archive = Path(os.environ.get("FASTSSL_DATA", "")) / "odd_images.tar"
    if not archive.is_file():
        pytest.skip("FASTSSL_DATA has no odd_images.tar")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    folder = tmp_path / "odd_images"
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    wrong = {}
    for name, entry in manifest.items():
        alone = tmp_path / "alone"
        alone.mkdir()
        shutil.copy(folder / name, alone)
        try:
            _, (image,) = decode(alone)
        except DataError as error:
            outcome = "error" if name in str(error) or str(alone) in str(error) else f"an error that does not name it: {error}"
        else:
            reference = expected(folder / name).astype(int)
            good = image.shape == reference.shape and np.abs(image - reference).mean() < 1.5
            outcome = "decode" if good else "wrong pixels"
        shutil.rmtree(alone)
        # What is only partly there counts as bad.
        allowed = {"decode": ("decode",), "error": ("error",), "error-or-partial": ("error",)}.get(entry["expect"], ("decode", "error"))
        if outcome not in allowed:
            wrong[name] = outcome
    assert manifest and wrong == {}
