"""Parts of a data set: the published lists, the rules by class, names from a file, and their way through the loaders."""

import hashlib
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.datasets import ImageFolder

from fastssl.recipes import byol_asymmetric, center_crop
from loaders.beton import Beton, BetonWriter
from loaders.build import TrainLoader, build_eval_loader, build_loader
from loaders.class_folders import scan
from loaders.errors import DataError
from loaders.geometry import Geometry
from loaders.order import Order
from loaders.subsets import IMAGENET, imagenet_list, select

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")

LABELS = np.array([1, 0, 1, 0, 2, 1, 0, 2, 1, 0])
NAMES = [f"c{label}/c{label}_{i}.JPEG" for i, label in enumerate(LABELS)]
CLASSES = ["c0", "c1", "c2"]


@dataclass(frozen=True)
class OneMachine:
    rank: int = 0
    world: int = 1
    local_world: int = 1
    device: torch.device = torch.device("cpu")

    def gather_objects(self, value: object) -> list:
        return [value] * self.world


def choose(rule: str, labels=LABELS, names=NAMES, classes=CLASSES) -> list[int]:
    ids = select(rule, labels=labels, names=lambda: names, classes=classes, path=Path("data/train.beton"))
    assert ids.dtype == np.int64 and (np.diff(ids) > 0).all()
    return ids.tolist()


# ------------------------------------------------------------------------------------------------ the published lists


# Bytes with CR LF and without the last line end, as LEWEL's repository has them (methods/lewel.md, 12).
LEWEL = {
    "1percent": (12_811, 273_132, "55d9d6d810504ef36c67f29eec83ddc4141db6899ef9ec45fe0810a2f48b5972"),
    "10percent": (128_116, 2_731_282, "3450372973ff3506bc13feb4e392a4d5a4b69201b432f372a3b9378400bd260c"),
}


@pytest.mark.parametrize("name", IMAGENET)
def test_sfriks_and_lewels_lists_are_one(name):
    lines = imagenet_list(name)
    carriage_returns = "\r\n".join(lines).encode()
    assert (len(lines), len(carriage_returns), hashlib.sha256(carriage_returns).hexdigest()) == LEWEL[name]
    original = Path(os.environ.get("FASTSSL_DATA", "")) / "imagenet_subsets" / f"{name}.txt"
    if original.is_file():
        assert original.read_bytes() == carriage_returns


def test_one_percent_is_part_of_ten():
    one, ten = (imagenet_list(name) for name in IMAGENET)
    assert set(one) < set(ten)
    counts = np.unique(np.unique([n.split("_")[0] for n in one], return_counts=True)[1], return_counts=True)
    assert [c.tolist() for c in counts] == [[12, 13], [189, 811]]


@pytest.fixture(scope="module")
def imagenet() -> tuple[np.ndarray, list[str]]:
    """Labels and names of 13 made-up images in each class of the 1 % list, and the listed ones."""
    listed = imagenet_list("1percent")
    wnids = sorted({n.split("_")[0] for n in listed})
    every = sorted({*listed, *(f"{w}_0{i}.JPEG" for w in wnids for i in range(13))})
    return np.array([wnids.index(n.split("_")[0]) for n in every]), [f"{n.split('_')[0]}/{n}" for n in every]


def test_a_list_is_found_among_stored_names(imagenet):
    labels, names = imagenet
    ids = choose("1percent", labels, names, None)
    assert sorted(names[i].split("/")[1] for i in ids) == sorted(imagenet_list("1percent"))


def test_a_list_of_another_data_set_is_refused(imagenet):
    labels, names = imagenet
    without = set(imagenet_list("1percent")[:2])
    with pytest.raises(DataError, match=r"2 of the 12,811 images of the subset 1percent are not in data/train\.beton: n\d+_\d+\.JPEG, n"):
        choose("1percent", labels, [n for n in names if n.split("/")[1] not in without], None)


def test_a_damaged_list_is_refused(tmp_path, monkeypatch):
    import lzma

    from loaders import subsets

    folder = tmp_path / "imagenet_subsets"
    folder.mkdir()
    monkeypatch.setattr(subsets, "__file__", str(tmp_path / "subsets.py"))
    (folder / "1percent.txt.xz").write_bytes(lzma.compress(b"n01440764_1.JPEG\n"))
    with pytest.raises(DataError, match="its SHA-256 differs. Install"):
        imagenet_list("1percent")
    (folder / "1percent.txt.xz").write_bytes(b"cut")
    with pytest.raises(DataError, match="cannot be read"):
        imagenet_list("1percent")


# ------------------------------------------------------------------------------------------------ rules by class


def test_the_first_of_each_class_in_stored_order():
    assert choose("first:1") == [0, 1, 4]
    assert choose("first:2") == [0, 1, 2, 3, 4, 7]


def test_after_leaves_one_image_between():
    """The off-by-one of SFRIK's validation set: with --subset 1 its images are number 2 of each class, counted from 0."""
    two_classes = LABELS != 2
    labels = LABELS[two_classes]  # 1 0 1 0 1 0 1 0
    assert choose("first:1", labels) == [0, 1] and choose("after:1", labels) == [4, 5]
    many = np.repeat(np.arange(3), 600)
    first, after = choose("first:260", many), choose("after:260", many)
    assert first == [c * 600 + i for c in range(3) for i in range(260)]
    assert after == [c * 600 + i for c in range(3) for i in range(261, 521)]


def test_random_images_of_each_class():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 50))
    sets = [choose(rule, labels) for rule in ("random:7", "random:7:0", "random:7:1")]
    assert sets[0] == sets[1] != sets[2]
    for ids in sets:
        assert (np.bincount(labels[ids]) == 7).all()
    taken = np.concatenate([choose(f"random:7:{seed}", labels) for seed in range(200)])
    counts = np.bincount(taken, minlength=1000)
    assert ((counts - 28) ** 2 / (28 * 0.86)).sum() < 1000 + 5 * np.sqrt(2 * 1000)  # every image alike
    assert choose("random:2:5") != choose("first:2")


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("first:3", "1 of the 3 classes of data/train.beton are too small: c2 has 2. Choose at most first:2"),
        ("random:5", "c0 has 4, c1 has 4, c2 has 2. Choose at most random:2"),
        ("after:1", "from number 3 on, and 1 of the 3 classes of data/train.beton are too small: c2 has 2. Choose another part"),
    ],
)
def test_classes_with_too_few_images_are_named(rule, says):
    with pytest.raises(DataError) as error:
        choose(rule)
    assert says in str(error.value)


@pytest.mark.parametrize("rule", ["first:", "first:0", "first:-1", "first:2:3", "random:2:x", "after:1.5", "2percent", "no/such/file.txt"])
def test_unknown_rules_are_refused(rule):
    with pytest.raises(DataError, match=r"is no subset.*Write 1percent"):
        choose(rule)


def test_unlabelled_and_nameless_data():
    with pytest.raises(DataError, match="has no labels. Give"):
        choose("first:1", labels=None)
    with pytest.raises(DataError, match="has no sidecar"):
        choose("10percent", names=None)


# ------------------------------------------------------------------------------------------------ names from a file


def test_a_file_of_names(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_bytes(b"c1/c1_2.JPEG\r\nc0_9.JPEG\n\n  c2_4.JPEG\nc0_9.JPEG")
    assert choose(str(file)) == [2, 4, 9]
    assert choose(str(file), labels=None) == [2, 4, 9]
    file.write_text("c0_9.JPEG\nnobody.jpg\n")
    with pytest.raises(DataError, match=r"1 of the 2 images.*nobody\.jpg"):
        choose(str(file))
    file.write_text("\n")
    with pytest.raises(DataError, match="names no image"):
        choose(str(file))


def test_names_that_are_not_unique(tmp_path):
    file = tmp_path / "mine.txt"
    names = ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"]
    file.write_text("1.jpg")
    with pytest.raises(DataError, match="several images of that name.*CLASS/FILE"):
        choose(str(file), np.array([0, 0, 1]), names)
    file.write_text("dog/1.jpg\n2.jpg")
    assert choose(str(file), np.array([0, 0, 1]), names) == [1, 2]


# ------------------------------------------------------------------------------------------------ through the loaders


def loader_of(path, dist=None, **options):
    return build_loader(str(path), "train", byol_asymmetric(size=32), dist=dist or OneMachine(), batch=4, workers=1, **options)


@pytest.mark.parametrize("kind", ["beton", "folder"])
def test_training_on_a_subset(beton_data, class_folders, tmp_path, kind):
    path = beton_data if kind == "beton" else class_folders
    whole = loader_of(path)
    loader = loader_of(path, subset="first:6", order="chunks")
    assert (loader.num_samples, loader.steps_per_epoch, whole.num_samples) == (18, 4, 48)
    assert np.bincount(loader.labels).tolist() == [6, 6, 6]
    seen = [i for b in islice(loader.from_step(0), 8) for i in b.index.tolist()]
    expected = {i for i in range(48) if i % 16 < 6}
    assert set(seen) <= expected and len(set(seen[:16])) == 16
    labels = [y for b in islice(loader.from_step(2), 2) for y in b.label.tolist()]
    assert labels == [i // 16 for i in seen[8:16]]
    by_name = loader_of(path, subset=str(names_file(tmp_path, path, [5, 17, 40, 41])))
    assert sorted(next(by_name.from_step(0)).index.tolist()) == [5, 17, 40, 41]


def names_file(folder: Path, path: Path, ids: list[int]) -> Path:
    train = path / "train.beton"
    names = Beton.open(train).names if train.exists() else scan(path / "train")[0]
    file = folder / "subset.txt"
    file.write_text("\n".join(names[i] for i in ids))
    return file


def test_evaluating_a_subset_in_parts(beton_data):
    index, labels = [], []
    for rank in range(3):
        loader = build_eval_loader(
            str(beton_data), "train", center_crop(size=32, resize=36), dist=OneMachine(rank, 3), batch=4, subset="after:5", workers=1
        )
        for batch in loader:
            index += batch.index.tolist()
            labels += batch.label.tolist()
    assert index == [c * 16 + i for c in range(3) for i in range(6, 11)]
    assert loader.num_samples == 15 and loader.labels.tolist() == labels


@pytest.mark.parametrize("order", ["shuffle", "chunks", "balanced", "sequential"])
def test_orders_and_kept_batches_through_the_loader(beton_data, order):
    """48 images, global batch 20 on 2 ranks in 2 micro-batches of 5: 8 are left, 4 on each rank."""
    loaders = [
        build_loader(
            str(beton_data),
            "train",
            byol_asymmetric(size=32),
            dist=OneMachine(rank, 2, 2),
            batch=5,
            accumulation_steps=2,
            order=order,
            last_batch="keep",
            workers=1,
        )
        for rank in range(2)
    ]
    assert all((loader.steps_per_epoch, loader.smallest_batch) == (3, 2) for loader in loaders)
    batches = [list(islice(loader.from_step(0), 8)) for loader in loaders]
    assert [len(b) for b in batches[0]] == [5, 5, 5, 5, 2, 2, 5, 5] == [len(b) for b in batches[1]]
    assert [b.step for b in batches[0]] == [0, 0, 1, 1, 2, 2, 3, 3]
    if order != "balanced":
        seen = [i for rank in loaders for b in islice(rank.from_step(0), 6) for i in b.index.tolist()]
        assert sorted(seen) == list(range(48))
    resumed = next(loaders[1].from_step(2))
    assert resumed.index.tolist() == next(islice(loaders[1].from_step(0), 4, None)).index.tolist()


def test_chunks_are_announced_one_window_ahead():
    wanted: list[np.ndarray] = []
    stored = SimpleNamespace(name="ffcv", path=Path("x"), workers=1, labels=None, classes=None, will_need=wanted.append)
    order = Order(40_000, 8_000, sampling="chunks")
    dist = OneMachine(rank=5, world=8, local_world=2)  # the second rank of its machine
    loader = TrainLoader(stored, Geometry(byol_asymmetric(size=32)), order, dist=dist, accumulation_steps=1, prefetch=1, ids=None)
    jobs = loader._jobs(1)
    counts = []
    for step in (1, 2, 3, 4, 5):
        assert next(jobs).step == step
        counts.append(len(wanted))
    assert counts == [2, 3, 3, 4, 5]  # steps 1-5 end in windows 0, 1, 1, 2, 3
    for window, ids in enumerate(wanted):
        np.testing.assert_array_equal(ids, order.window_ids(window)[len(order.window_ids(window)) // 2 :])


def test_unlabelled_data(tmp_path, beton_data):
    labelled = Beton.open(beton_data / "train.beton")
    with BetonWriter(tmp_path / "train.beton", 12, labels=False) as writer:
        for i in range(12):
            writer.append(labelled.sample(i).tobytes(), int(labelled.mode[i]), int(labelled.height[i]), int(labelled.width[i]))
        writer.finish([f"{i}.jpg" for i in range(12)])
    loader = loader_of(tmp_path, order="chunks")
    assert loader.labels is None and next(loader.from_step(0)).label is None
    for options in ({"order": "balanced"}, {"subset": "first:1"}):
        with pytest.raises(DataError, match="labels"):
            loader_of(tmp_path, **options)


# ------------------------------------------------------------------------------------------------ the order of class folders


def test_files_are_listed_as_image_folder_lists_them(tmp_path):
    for name in ("b/10.jpg", "b/9.JPG", "b/sub/1.png", "b/sub-x/0.webp", "b/a.ppm", "b/notes.txt", "b/x.gif", "b-c/1.tiff", "a/z/y/1.bmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    files, labels, classes = scan(tmp_path)
    theirs = ImageFolder(str(tmp_path))
    assert [(str(tmp_path / f), y) for f, y in zip(files, labels.tolist(), strict=True)] == theirs.samples and classes == theirs.classes
