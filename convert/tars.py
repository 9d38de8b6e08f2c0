"""Images inside of tars, read in place: the official ILSVRC2012 archives, and WebDataset shards.

A tar is a row of headers and files; one pass over the headers gives the position of every image, and from then on a worker
reads an image like a part of any file.  Nothing is unpacked.
"""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import groupby
from pathlib import Path

import numpy as np

from convert.progress import note
from convert.sources import Source, Spans, Split, is_image
from loaders import class_folders
from loaders.errors import DataError

TRAIN_TAR, VAL_TAR, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_META, _TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
_IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
_MAX_CLASSES = 10_000_000
"""Labels from here on are ids of something else: tables of the classes would not fit into the memory."""


@contextmanager
def opened(path: Path, mode: str = "r:") -> Iterator[tarfile.TarFile]:
    """A tar whose every defect becomes a DataError."""
    try:
        with tarfile.open(path, mode) as tar:
            yield tar
    except (tarfile.TarError, zlib.error, OSError, EOFError) as e:
        kind = "a complete tar" if mode == "r:" else "a complete .tar.gz"
        raise DataError(f"{path} cannot be read as {kind} ({e}). Check its size and checksum, download it again, and convert again.") from e


# ------------------------------------------------------------------------------------------------ ILSVRC2012


def imagenet_train(folder: Path) -> Source:
    """ILSVRC2012_img_train.tar, a tar of one tar per class: as its unpacked class folders."""
    path = folder / TRAIN_TAR
    note(f"reading the index of {path}, once.")
    where: dict[str, tuple[int, int]] = {}
    wnids = set()
    with opened(path) as outer:
        for member in outer:
            if not member.isfile() or not member.name.endswith(".tar"):
                continue
            wnid = posixpath.basename(member.name).removesuffix(".tar")
            wnids.add(wnid)
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                for image in inner:
                    if image.isfile():
                        name = posixpath.normpath(f"{wnid}/{image.name}")
                        where[name] = member.offset_data + image.offset_data, image.size
    classes = sorted({name.partition("/")[0] for name in where if is_image(name)})
    if empty := sorted(wnids - set(classes)):
        raise DataError(f"{len(empty)} class tars of {path} hold no images: {class_folders.listed(empty)}. Download it again.")
    if not classes:
        raise DataError(f"{path} holds no class tars with images, so it is not ImageNet's training set. Download it again.")
    return _as_class_folders("train", folder, path, where, classes)


def imagenet_val(folder: Path, classes: Sequence[str] | None) -> Source:
    """ILSVRC2012_img_val.tar, sorted into class folders by the development kit's ground truth.

    classes: the training set's; None where there is none: those of the ground truth.
    """
    path, devkit = folder / VAL_TAR, folder / DEVKIT
    if not devkit.is_file():
        raise DataError(
            f"{folder} has {VAL_TAR}, but not the labels of its images. Put {DEVKIT} (2.5 MB, from ImageNet's download page) next to it "
            "and convert again."
        )
    truth = _ground_truth(devkit)
    with opened(path) as tar:
        members = sorted((posixpath.basename(m.name), m.offset_data, m.size) for m in tar if m.isfile() and is_image(m.name))
    if len(members) != len(truth):
        raise DataError(
            f"{path} holds {len(members):,} images, but {DEVKIT} labels {len(truth):,}. Check both downloads and convert again."
        )
    classes = sorted(set(truth)) if classes is None else list(classes)
    if strange := sorted(set(truth) - set(classes)):
        raise DataError(
            f"{path} has {len(strange)} classes that the training set has not: {class_folders.listed(strange)}. "
            "Give both splits the same classes, then try again."
        )
    where = {f"{wnid}/{name}": (offset, size) for wnid, (name, offset, size) in zip(truth, members, strict=True)}
    return _as_class_folders("val", folder, path, where, classes)


def _ground_truth(devkit: Path) -> list[str]:
    """Class (wnid) of every validation image, in the order of their names."""
    from scipy.io import loadmat

    with opened(devkit, "r:gz") as tar:
        files = {end: next((m for m in tar.getmembers() if m.name.endswith(end)), None) for end in (_META, _TRUTH)}
        if absent := [end for end, member in files.items() if member is None]:
            raise DataError(f"{devkit} lacks {' and '.join(absent)}, so it is not ImageNet's development kit of 2012. Download it again.")
        meta, truth = (tar.extractfile(files[end]).read() for end in (_META, _TRUTH))
    try:
        synsets = np.atleast_1d(loadmat(BytesIO(meta), squeeze_me=True)["synsets"])
        columns = [np.concatenate([np.ravel(s[key]) for s in synsets]) for key in ("ILSVRC2012_ID", "WNID")]
        wnids = {int(number): str(wnid).strip() for number, wnid in zip(*columns, strict=True)}
        numbers = [int(number) for number in truth.split()]
    except Exception as e:  # scipy raises anything for a damaged file
        raise DataError(f"{devkit} cannot be understood ({type(e).__name__}: {e}). Download it again.") from e
    if strange := sorted(set(numbers) - set(wnids)):
        raise DataError(f"{devkit} labels an image with the class {strange[0]}, which it does not describe. Download it again.")
    return [wnids[number] for number in numbers]


def _as_class_folders(split: Split, folder: Path, path: Path, where: dict[str, tuple[int, int]], classes: list[str]) -> Source:
    """`where`: offset and size by class/file."""
    folders = defaultdict(list)
    for name in where:
        directory, base = posixpath.split(name)
        folders[directory].append(base)
    names, labels = class_folders.listing([f for f in folders.items() if any(map(is_image, f[1]))], classes)
    offset, size = np.array([where[name] for name in names], np.int64).T
    return Source(split, folder, Spans([path], np.zeros(len(names), np.int32), offset, size), names, labels, classes)


# ------------------------------------------------------------------------------------------------ WebDataset


def split_of(stem: str) -> Split | None:
    """`train` or `val` where a shard's name has such a word (imagenet1k-validation-07)."""
    for split in ("val", "train"):
        if re.search(rf"(^|[^a-z]){split}", stem.lower()):
            return split
    return None


def webdataset(folder: Path) -> list[Source]:
    """Tars whose neighbouring files of one name belong together: KEY.jpg (or .jpeg, .png, .webp) and, where there are labels,
    KEY.cls or the "label" of KEY.json."""
    paths = sorted(p for p in folder.glob("*.tar") if not p.name.startswith("."))
    if all(re.fullmatch(r"n\d{8}", p.stem) for p in paths):
        raise DataError(
            f"{folder} holds the class tars of ImageNet. Unpack each into a folder of its name, or give the folder of {TRAIN_TAR} itself, "
            "which is read without unpacking."
        )
    note(f"reading the index of {len(paths)} shards in {folder}, once.")
    by_split = defaultdict(list)
    for path in paths:
        by_split[split_of(path.stem)].append(path)
    if not by_split.keys() & {"train", "val"}:
        return [_shards("train", folder, paths)]
    if other := by_split.pop(None, []):
        names = class_folders.listed([p.name for p in other])
        note(f"{len(other)} shards of {folder} are named neither train nor val and are left out: {names}.")
    return [_shards(split, folder, by_split[split]) for split in ("train", "val") if by_split[split]]


def _shards(split: Split, folder: Path, paths: Sequence[Path]) -> Source:
    names, labels, spans = [], [], []
    seen = Counter()
    for file, path in enumerate(paths):
        for key, members, label in _samples(path):
            image = next((members[ending] for ending in _IMAGE_MEMBERS if ending in members), None)
            if image is None:
                raise DataError(
                    f"Sample {key} of {path} has no image among its files ({', '.join(sorted(members))}; understood are "
                    f"{', '.join(_IMAGE_MEMBERS)}). Put all files of a sample next to each other in the shard, its image in one of these "
                    "formats, and leave out samples without one."
                )
            names.append(_distinct(f"{path.stem}/{image.name}", seen))
            labels.append(label)
            spans.append((file, image.offset_data, image.size))
    if not names:
        raise DataError(f"The shards of {folder} for {split} hold no samples. Give a folder of WebDataset shards.")
    if unlabelled := labels.count(None):
        if unlabelled < len(labels):
            example = names[labels.index(None)]
            raise DataError(
                f'{unlabelled:,} of {len(labels):,} samples of {folder} for {split} have no label (KEY.cls, or "label" in KEY.json), '
                f"for example {example}. Label all of them or none."
            )
        labels = None
    file, offset, size = np.array(spans, np.int64).T
    items = Spans(paths, file.astype(np.int32), offset, size)
    return Source(split, folder, items, names, None if labels is None else np.array(labels, np.int64), None)


def _distinct(name: str, seen: Counter[str]) -> str:
    """`name`, numbered where a sample before has it: by its name a sample is found again."""
    seen[name] += 1
    root, ending = posixpath.splitext(name)
    return name if seen[name] == 1 else _distinct(f"{root}-{seen[name]}{ending}", seen)


def _samples(path: Path) -> Iterator[tuple[str, dict[str, tarfile.TarInfo], int | None]]:
    """Key, files by ending, and label of each sample: neighbours of one key, as the webdataset library groups them.  The key of
    a sample may come again further on (shards joined by `tar -A`, numbered alike): that is another sample."""
    with opened(path) as tar:
        for key, parts in groupby(_parts(tar, path), key=lambda part: part[0]):
            members: dict[str, tarfile.TarInfo] = {}
            for _, ending, member in parts:
                if ending in members:
                    raise DataError(
                        f"Sample {key} of {path} has two files {ending}, of which one would be lost. Give each sample of the shard a key "
                        "of its own."
                    )
                members[ending] = member
            yield key, members, _label_of(tar, members, path)


def _parts(tar: tarfile.TarFile, path: Path) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, ending and member of every file that belongs to a sample.  A hard link gets the place of the file it names."""
    files: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        if member.islnk() and (file := files.get(posixpath.normpath(member.linkname))):
            member.type, member.offset_data, member.size = file.type, file.offset_data, file.size
        plain = member.isfile() and not member.issparse()
        if plain:
            files[posixpath.normpath(member.name)] = member
        directory, base = posixpath.split(member.name)
        key, dot, ending = base.partition(".")
        if member.isdir() or not key or not dot:
            continue
        if not plain:
            what = f"a link to {member.linkname}" if member.linkname else "no plain file"
            raise DataError(
                f"{member.name} of {path} is {what}, and its bytes are not those of a file before it. Write the shard anew with the file "
                "itself in its place."
            )
        yield posixpath.join(directory, key), ending.lower(), member
    _check_end(tar)


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise tarfile.ReadError for data behind the end: tarfile takes a damaged header for it, and knows no tar that follows."""
    tar.fileobj.seek(tar.offset)
    while block := tar.fileobj.read(1 << 20):
        if block.strip(b"\0"):
            raise tarfile.ReadError(
                f"there is more after its end at byte {tar.offset:,}: a damaged header, or another tar, which tar -A would have joined"
            )


def _label_of(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], path: Path) -> int | None:
    for ending in ("cls", "json"):
        if member := members.get(ending):
            return _label(tar.extractfile(member).read(), ending, f"{member.name} of {path}")
    return None


def _label(content: bytes, ending: str, where: str) -> int | None:
    """The label in a .cls or .json file; None for JSON without one."""
    value: object = content.decode(errors="replace").strip()
    try:
        if ending == "cls":
            value = int(value)
        else:
            value = json.loads(value)
            value = value.get("label") if isinstance(value, dict) else None
            if value is None:
                return None
    except (ValueError, RecursionError):
        pass  # reported below
    if type(value) is not int or not 0 <= value < _MAX_CLASSES:
        raise DataError(
            f"The label in {where} is not a number from 0 to {_MAX_CLASSES - 1:,}, but {repr(value)[:80]}. Number the classes of the "
            "shards from 0 on."
        )
    return value
