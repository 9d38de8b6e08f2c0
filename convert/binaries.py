"""Data sets of bare pixels: STL-10's binary files, and the Python archives of CIFAR-10 and CIFAR-100."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from convert.sources import Pixels, Source, Split
from convert.tars import opened
from loaders.errors import DataError

STL10 = "stl10_binary"
_STL10_SPLITS: dict[str, Split] = {"train": "train", "test": "val", "unlabeled": "unlabeled"}
_STL10_SIDE = 96

CIFAR = {"cifar-10-batches-py": "cifar-10-python.tar.gz", "cifar-100-python": "cifar-100-python.tar.gz"}
"""Folders of the archives, and the archives."""
_CIFAR_SIDE = 32


def _source(split: Split, origin: Path, images: np.ndarray, names: list[str], labels: np.ndarray | None, classes) -> Source:
    if labels is not None:
        if len(labels) != len(images):
            raise DataError(f"{origin} has {len(images):,} images and {len(labels):,} labels for {split}. Download the data set again.")
        if labels.min() < 0 or (classes is not None and labels.max() >= len(classes)):
            raise DataError(f"{origin} has labels for {split} that name no class. Download the data set again.")
    return Source(split, origin, Pixels(images, np.arange(len(images))), names, labels, classes)


# ------------------------------------------------------------------------------------------------ STL-10


def stl10(folder: Path) -> list[Source]:
    """train_X.bin, train_y.bin, test_X.bin, test_y.bin, unlabeled_X.bin, class_names.txt, as far as they are there.

    The test images become `val`.  The files are mapped, not read: 2.7 GB of unlabelled images stay on the disk.
    """
    names = folder / "class_names.txt"
    classes = names.read_text().split() if names.is_file() else None
    sources = []
    for part, split in _STL10_SPLITS.items():
        if not (folder / f"{part}_X.bin").is_file():
            continue
        images = _stl10_images(folder / f"{part}_X.bin")
        labels = None if part == "unlabeled" else _stl10_labels(folder / f"{part}_y.bin")
        sources.append(_source(split, folder, images, [f"{part}/{i:06d}" for i in range(len(images))], labels, classes))
    return sources


def _stl10_images(path: Path) -> np.ndarray:
    """uint8 [N, 96, 96, 3], a view of the file, in which each colour is a plane and each plane lies column by column."""
    size = path.stat().st_size
    if size == 0 or size % (3 * _STL10_SIDE**2):
        raise DataError(f"{path} has {size:,} bytes, which is not a whole number of 96 x 96 images. Download STL-10 again.")
    return np.memmap(path, np.uint8, "r").reshape(-1, 3, _STL10_SIDE, _STL10_SIDE).transpose(0, 3, 2, 1)


def _stl10_labels(path: Path) -> np.ndarray:
    if not path.is_file():
        raise DataError(f"There is no {path} with the labels of the images next to it. Unpack the whole of STL-10 and convert again.")
    return np.fromfile(path, np.uint8).astype(np.int64) - 1  # counted from 1


# ------------------------------------------------------------------------------------------------ CIFAR


class _Arrays(pickle.Unpickler):
    """Reads what a CIFAR batch consists of and refuses to call anything else: a pickle from the net can name any function."""

    ALLOWED = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),  # how Python 3 writes bytes in the protocol of Python 2
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR archive needs")
        return super().find_class(module, name)


def cifar(path: Path) -> list[Source]:
    """The folder cifar-10-batches-py or cifar-100-python, or the .tar.gz of one.  The test images become `val`; CIFAR-100
    with its fine labels."""
    if path.is_dir():
        return _cifar(path, path.name, lambda name: (path / name).read_bytes())
    with opened(path, "r:gz") as tar:
        files = {Path(m.name): m for m in tar.getmembers() if m.isfile()}
        root = next((folder for folder in CIFAR if any(f.parent.name == folder for f in files)), None)
        if root is None:
            raise DataError(f"{path} holds neither {' nor '.join(CIFAR)}, so it is not a Python archive of CIFAR. Give another --source.")
        return _cifar(path, root, lambda name: _member(tar, {f.name: m for f, m in files.items() if f.parent.name == root}, name))


def _member(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], name: str) -> bytes:
    if name not in members:
        raise FileNotFoundError(f"{name} is missing")
    return tar.extractfile(members[name]).read()


def _cifar(origin: Path, folder: str, read: Callable[[str], bytes]) -> list[Source]:
    def load(name: str) -> dict:
        try:
            return _Arrays(io.BytesIO(read(name)), encoding="bytes").load()
        except FileNotFoundError as e:
            raise DataError(f"{origin} is incomplete: it lacks {name}. Unpack or download the archive again.") from e
        except Exception as e:  # a damaged pickle raises anything
            raise DataError(f"{name} of {origin} cannot be read ({type(e).__name__}: {e}). Download the archive again.") from e

    if folder == "cifar-10-batches-py":
        parts = {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]}
        meta, label_names, labels = "batches.meta", b"label_names", b"labels"
    else:
        parts = {"train": ["train"], "val": ["test"]}
        meta, label_names, labels = "meta", b"fine_label_names", b"fine_labels"
    classes = [_text(name) for name in _entry(load(meta), label_names, meta, origin)]
    return [_cifar_split(split, origin, {name: load(name) for name in batches}, labels, classes) for split, batches in parts.items()]


def _cifar_split(split: Split, origin: Path, batches: dict[str, dict], labels_key: bytes, classes: Sequence[str]) -> Source:
    images, labels, names = [], [], []
    for batch, content in batches.items():
        data = _entry(content, b"data", batch, origin)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * _CIFAR_SIDE**2:
            raise DataError(f"{batch} of {origin} does not hold 32 x 32 images. Download the archive again.")
        images.append(data.reshape(-1, 3, _CIFAR_SIDE, _CIFAR_SIDE).transpose(0, 2, 3, 1))
        labels += [int(label) for label in _entry(content, labels_key, batch, origin)]
        names += [f"{batch}/{_text(name)}" for name in _entry(content, b"filenames", batch, origin)]
    if len(names) != len(labels):
        raise DataError(f"{origin} has {len(names):,} file names and {len(labels):,} labels for {split}. Download the data set again.")
    return _source(split, origin, np.concatenate(images), names, np.array(labels, np.int64), list(classes))


def _entry(content: dict, key: bytes, name: str, origin: Path) -> Sequence:
    for k in (key, key.decode()):
        if isinstance(content, dict) and k in content:
            return content[k]
    raise DataError(f"{name} of {origin} has no {key.decode()}, so it is no batch of CIFAR. Download the archive again.")


def _text(name: bytes | str) -> str:
    return name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
