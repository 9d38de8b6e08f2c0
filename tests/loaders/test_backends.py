"""The back ends through the whole loader: the stored images, clear errors, the choice of a back end, no thread or buffer left in use."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from convert.detect import detect
from fastssl.recipes import center_crop
from loaders import build, dali, ffcv, torchvision_cuda
from loaders import open as opening
from loaders.beton import JPEG, Beton
from loaders.build import build_eval_loader
from loaders.decoder import CORRUPT, OK, OUTSIDE
from loaders.errors import DataError
from loaders.geometry import Geometry
from loaders.open import Found, find, has_split, open_decoder
from loaders.ring import Job, Ring
from loaders.torchvision import TorchvisionDecoder
from loaders.torchvision_cuda import TorchvisionCUDADecoder
from tests.loaders.stored import SPEC, OneMachine, assert_same, collect, decode, difference, jpeg, picture, samples, train_loader, write

NUM_SAMPLES = 30
CPU = torch.device("cpu")
BACKENDS = [
    pytest.param("ffcv", marks=pytest.mark.skipif(bool(ffcv.load()), reason=str(ffcv.load()))),
    pytest.param("dali", marks=pytest.mark.skipif(bool(dali.load()), reason=str(dali.load()))),
    "torchvision",
]

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """train.beton and val.beton with the same samples, some of them raw."""
    folder = tmp_path_factory.mktemp("betons")
    for split in ("train", "val"):
        write(folder / f"{split}.beton", samples(raw=True, count=NUM_SAMPLES))
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The same pictures as class folders, one a palette PNG, one with its ending in capitals, and stray files."""
    folder = tmp_path_factory.mktemp("folders")
    for i in range(NUM_SAMPLES):
        file = folder / "train" / f"class{i % 3}" / ("deep" if i % 2 else ".") / f"{i:03}.{'JPG' if i == 4 else 'jpeg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(picture(i)))
    Image.fromarray(picture(0)).convert("P").save(folder / "train" / "class1" / "palette.png")
    (folder / "train" / "class0" / "notes.txt").write_text("not an image")
    (folder / "train" / "class0" / "._hidden.jpeg").write_text("not an image")
    return folder


def batches(loader, step: int, count: int) -> list[dict]:
    """What `count` batches from `step` on hold."""
    found = loader.from_step(step)
    copies = collect(found, count)
    found.close()
    return copies


def ring_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "fastssl-ring"]


# ------------------------------------------------------------------------------------------------ the stored images


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_images_are_the_ones_that_were_stored(data, backend):
    raw = Beton.open(data / "train.beton").mode != JPEG
    for batch in batches(train_loader(data, backend=backend), 0, 4):
        for image, index, label, h, w in zip(*(batch[k] for k in ("images", "index", "label", "height", "width")), strict=True):
            original = picture(int(index)).astype(int)
            assert (int(h), int(w)) == original.shape[:2] and int(label) == int(index) % 3
            off = np.abs(image.numpy() - (original if original.ndim == 3 else original[..., None])).mean()
            assert off <= (0 if raw[index] else 9), index


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_of_one_process(data, world):
    whole = batches(train_loader(data, batch=8), 0, 7)
    ranks = [batches(train_loader(data, batch=8 // world, dist=OneMachine(r, world, world)), 0, 7) for r in range(world)]
    for step, batch in enumerate(whole):
        for name in ("index", "boxes", "flips", "height"):
            assert torch.equal(torch.cat([r[step][name] for r in ranks]), batch[name])


def test_accumulation_splits_the_step(data):
    whole, parts = batches(train_loader(data, batch=8), 1, 4), batches(train_loader(data, batch=2, accumulation_steps=4), 1, 16)
    assert [p["step"] for p in parts] == [s for s in range(1, 5) for _ in range(4)]
    for i, batch in enumerate(whole):
        for name in ("index", "boxes", "flips"):
            assert torch.equal(torch.cat([p[name] for p in parts[4 * i : 4 * i + 4]]), batch[name])


def test_a_resumed_loader_continues(data):
    straight = batches(train_loader(data), 0, 9)
    assert [b["epoch"] for b in straight] == [0] * 3 + [1] * 3 + [2] * 3
    for step in (1, 3, 5):
        assert_same(batches(train_loader(data), step, 9 - step), straight[step:])


def test_two_loaders_work_at_the_same_time(data):
    train = train_loader(data).from_step(0)
    for _ in range(3):
        next(train)
        evaluation = build_eval_loader(str(data), "val", center_crop(size=32, resize=36), dist=OneMachine(), batch=8)
        assert sum(len(b) for b in evaluation) == NUM_SAMPLES
    train.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_imagenet_photographs(tmp_path, backend):
    source = Path(os.environ.get("FASTSSL_DATA", "")) / "imagenet_sample.tar"
    if not source.is_file():
        pytest.skip("FASTSSL_DATA has no imagenet_sample.tar")
    stored = []
    with tarfile.open(source) as tar:
        for member in islice((m for m in tar if m.isfile()), 24):
            image = Image.open(tar.extractfile(member)).convert("RGB")
            image.thumbnail((500, 500))
            stored.append((jpeg(np.asarray(image)), JPEG, image.height, image.width))
    write(tmp_path / "train.beton", stored)
    ours, theirs = (batches(train_loader(tmp_path, batch=12, backend=b), 0, 2) for b in (backend, "torchvision"))
    assert_same(ours, theirs, pixels=False)
    for p, q in ((p, q) for x, y in zip(ours, theirs, strict=True) for p, q in zip(x["images"], y["images"], strict=True)):
        mean, largest = difference(p.numpy(), q.numpy())
        assert mean < 1.5 and largest <= 12


# ------------------------------------------------------------------------------------------------ folders


def test_a_tree_of_class_folders_is_read_as_image_folder_does(tree):
    loader = train_loader(tree, backend="auto")
    (tree / "train" / "class0" / "._hidden.jpeg").unlink()  # ImageFolder would list it
    theirs = ImageFolder(str(tree / "train"))
    assert loader.backend == "folder" and loader.classes == theirs.classes
    assert [(str(tree / "train" / f), y) for f, y in zip(loader._decoder.files, loader.labels, strict=True)] == theirs.samples
    for batch in batches(loader, 0, 4):
        for image, index, label in zip(batch["images"], batch["index"], batch["label"], strict=True):
            expected, target = theirs[int(index)]
            off = np.abs(image.numpy().astype(int) - np.asarray(expected)).mean()
            assert label == target and (off == 0 if theirs.samples[index][0].endswith("png") else off < 1.5)


def test_a_validation_folder_uses_the_training_classes(tree):
    folder = tree / "val" / "class2"
    folder.mkdir(parents=True)
    (folder / "0.jpeg").write_bytes(jpeg(picture(0)))
    loader = build_eval_loader(str(tree), "val", center_crop(size=32, resize=36), dist=OneMachine(), batch=4)
    assert loader.labels.tolist() == [2] and loader.classes == ["class0", "class1", "class2"]


def test_a_folder_of_images_has_no_labels(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(picture(i)))
    loader = train_loader(tmp_path, batch=6)
    (batch,) = batches(loader, 0, 1)
    assert (loader.backend, loader.labels, loader.classes, batch["label"]) == ("folder", None, None, None)
    assert sorted(batch["index"].tolist()) == list(range(6))


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "absurd"])
def test_a_file_that_is_no_image_is_named(tmp_path, kind):
    good = jpeg(picture(3))
    header = good.index(b"\xff\xc0")
    content = {
        "text": b"hello",
        "empty": b"",
        "cut": good[: len(good) // 2],
        "absurd": good[: header + 5] + b"\xff\xff\xff\xff" + good[header + 9 :],
    }[kind]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "good.jpg").write_bytes(good)
    (tmp_path / "a" / "strange.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"strange\.jpg cannot be read as an image.*python -m convert\.imagenet"):
        batches(train_loader(tmp_path, batch=2), 0, 1)
    assert not ring_threads()


# ------------------------------------------------------------------------------------------------ bad data


def broken(stored, i: int, kind: str):
    content, mode, height, width = stored[i]
    stored[i] = {
        "cut": (content[: len(content) // 2], mode, height, width),
        "noise": (content[:2] + bytes(len(content) - 2), mode, height, width),
        "half the width": (content, mode, height, width // 2),
        "wider": (content, mode, height, width + 40),
    }[kind]
    return stored


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["cut", "noise", "half the width", "wider"])
def test_a_damaged_sample_is_an_error_that_names_it(tmp_path, backend, kind):
    write(tmp_path / "train.beton", broken(samples(raw=True, count=NUM_SAMPLES), 12, kind))
    reason = "not a complete JPEG" if kind in ("cut", "noise") else "another size"
    with pytest.raises(DataError, match=rf"sample 12 \(class0/12\.jpg\).*{reason}.*Convert again with: python -m convert\.imagenet"):
        batches(train_loader(tmp_path, backend=backend), 0, 4)
    assert not ring_threads()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changed_byte_is_an_error_that_names_the_sample(tmp_path, backend):
    path = write(tmp_path / "train.beton", samples(raw=True, count=NUM_SAMPLES))
    beton = Beton.open(path)
    middle = int(beton.ptr[11] + beton.size[11]) - 40
    with open(path, "r+b") as f:
        f.seek(middle)
        byte = f.read(1)[0]
        f.seek(middle)
        f.write(bytes([byte ^ 4]))
    with pytest.raises(DataError, match=r"sample 11 \(class2/11\.jpg\).*not those that were written"):
        batches(train_loader(tmp_path, backend=backend), 0, 4)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_buffer_that_is_too_small_is_not_overrun(data, backend):
    decoder = open_decoder(str(data), "train", backend=backend, workers=1, device=CPU)
    ids = np.array([0])
    heights, widths = decoder.sizes(ids)
    buffer = np.full(3 * 48 * 64, 99, np.uint8)
    assert decoder.decode_into(ids, heights, widths, np.array([1]), buffer[:-1]).tolist() == [OUTSIDE]
    assert (buffer == 99).all()
    assert "do not fit" in str(decoder.error(0, OUTSIDE))


# ------------------------------------------------------------------------------------------------ the ring


class Counting:
    """A decoder that fills sample i with the byte i and, at sample `fails_at`, raises; `calls` is what was asked of it."""

    name, path, workers, on_device, labels, classes = "counting", Path("nowhere"), 1, False, None, None

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.calls: list[tuple[str, int]] = []

    def __len__(self) -> int:
        return 200

    def sizes(self, ids):
        return np.full(len(ids), 10, np.int32) + (ids % 7).astype(np.int32), np.full(len(ids), 20, np.int32)

    def will_need(self, ids):
        self.calls.append(("will need", int(ids[0])))

    def decode_into(self, ids, heights, widths, offsets, buffer):
        self.calls.append(("decode", int(ids[0])))
        assert isinstance(buffer, torch.Tensor if self.on_device else np.ndarray)
        for i, h, w, offset in zip(ids, heights, widths, offsets, strict=True):
            if i == self.fails_at:
                raise OSError("the disk is gone")
            buffer[offset : offset + 3 * h * w] = int(i)
        return np.zeros(len(ids), np.int32)


class OnDevice(Counting):
    """One that decodes into memory of the device; the CPU stands in."""

    on_device = True


def counting_ring(decoder, prefetch=2, total=200) -> Ring:
    jobs = (Job(np.arange(s, min(s + 4, total)), 0, s // 4) for s in range(0, total, 4))
    return Ring(decoder, Geometry(SPEC), jobs, CPU, prefetch)


@pytest.mark.parametrize("kind", [Counting, OnDevice])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_batch_keeps_its_pixels_until_the_next_is_asked_for(prefetch, kind):
    ring, old = counting_ring(kind(), prefetch), []
    for s in range(50):
        batch = ring.get()
        if s % 10 == 0:
            time.sleep(0.05)  # let the thread run as far ahead as it may
        for i in range(4):
            assert (batch.image(i) == 4 * s + i).all()
        assert batch.label is None and batch.pitch.tolist() == [60] * 4
        old.append(batch)
    assert ring.get() is None and ring.get() is None
    assert [i for b in old for i in b.index.tolist()] == list(range(200))  # all but the pixels is the batch's own
    assert not ring_threads()


def test_the_last_batch_may_be_smaller():
    ring = counting_ring(Counting(), total=10)
    lengths = [len(ring.get()) for _ in range(3)]
    assert lengths == [4, 4, 2] and ring.get() is None


def test_the_next_batch_is_announced_before_one_is_decoded():
    decoder = Counting()
    ring = counting_ring(decoder, prefetch=1, total=12)
    while ring.get() is not None:
        pass
    assert decoder.calls == [("will need", 4), ("decode", 0), ("will need", 8), ("decode", 4), ("decode", 8)]


def test_it_runs_no_further_ahead_than_it_may():
    """Bounded memory: `prefetch` finished batches, one in the consumer's hands, and one announced."""
    decoder = Counting()
    ring = counting_ring(decoder, prefetch=2)
    ring.get()
    time.sleep(0.3)
    assert [i for call, i in decoder.calls if call == "decode"] == [0, 4, 8]
    assert max(i for call, i in decoder.calls if call == "will need") == 12
    ring.close()


def test_an_error_of_the_decoding_thread_reaches_the_consumer():
    ring = counting_ring(Counting(fails_at=22))
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in range(50):
            ring.get()
    assert not ring_threads()


@pytest.mark.parametrize("leave", ["close", "break", "error"])
def test_no_thread_outlives_its_consumer(data, leave):
    found = train_loader(data).from_step(0)
    with pytest.raises(KeyboardInterrupt) if leave == "error" else open(os.devnull):
        for _ in found:
            assert ring_threads()
            if leave == "error":
                raise KeyboardInterrupt
            break
    if leave == "close":
        found.close()
    del found
    assert not ring_threads()


@pytest.mark.slow
def test_the_interpreter_ends_with_loaders_running(data):
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); import torch\n"
        "from types import SimpleNamespace\nfrom loaders.build import build_loader\nfrom fastssl.recipes import byol_asymmetric\n"
        "dist = SimpleNamespace(rank=0, world=1, local_world=1, device=torch.device('cpu'), gather_objects=lambda x: [x])\n"
        "open = lambda backend: build_loader(sys.argv[1], 'train', byol_asymmetric(), dist=dist, batch=8, backend=backend)\n"
        "running = [open(backend).from_step(0) for backend in sys.argv[3:]]\n"
        "print(sum(len(next(batches)) for batches in running) // len(running))\n"
    )
    root = str(Path(build.__file__).parents[1])
    usable = [name for name, problem in (("ffcv", ffcv.load()), ("dali", dali.load()), ("torchvision", None)) if not problem]
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, str(data), root, *usable]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")


def test_waiting_is_measured(data):
    loader = train_loader(data)
    found = loader.from_step(0)
    next(found)
    assert loader.wait_s > 0
    before = loader.wait_s
    time.sleep(0.3)
    next(found)
    assert before < loader.wait_s < before + 0.2
    found.close()


# ------------------------------------------------------------------------------------------------ torchvision on the device


@pytest.fixture
def torchvision_cuda_on_the_cpu(tmp_path, monkeypatch):
    """TorchvisionCUDADecoder with the CPU in the device's place, over a data set with raw samples, grey and odd sizes."""
    monkeypatch.setattr(torchvision_cuda, "problem_on", lambda device: None)
    decoder = TorchvisionCUDADecoder(Beton.open(write(tmp_path / "train.beton", samples(raw=True, count=NUM_SAMPLES))), CPU)
    decoder.on_device = True
    return decoder


def test_the_device_path_places_every_image(torchvision_cuda_on_the_cpu):
    decoder = torchvision_cuda_on_the_cpu
    ours, status = decode(decoder, range(NUM_SAMPLES), gap=5)
    theirs, _ = decode(TorchvisionDecoder(decoder.samples, 1), range(NUM_SAMPLES))
    assert (status == OK).all() and all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
    jobs = iter([Job(np.array([3, 4, 12]), 0, 0)])
    ring = Ring(decoder, Geometry(SPEC), jobs, CPU, 1)
    batch = ring.get()
    assert all(np.array_equal(batch.image(b).numpy(), theirs[i]) for b, i in enumerate((3, 4, 12)))
    ring.close()


def test_the_device_path_finds_the_sample_at_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision_cuda, "problem_on", lambda device: None)
    stored = broken(broken(samples(raw=True, count=12), 5, "noise"), 6, "wider")
    decoder = TorchvisionCUDADecoder(Beton.open(write(tmp_path / "train.beton", stored)), CPU)
    decoder.on_device = True
    _, status = decode(decoder, range(12))
    assert status.tolist() == [0, 0, 0, 0, 0, CORRUPT, 2, 0, 0, 0, 0, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_torchvision_cuda_without_a_device_says_so(data):
    with pytest.raises(DataError, match=r"torchvision_cuda cannot be used here: .* works on cpu\. Take --efficiency\.loader auto"):
        train_loader(data, backend="torchvision_cuda")


# ------------------------------------------------------------------------------------------------ what to open, and how


def test_where_a_split_lies(tmp_path):
    def touch(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"")

    touch("both/train.beton", "both/train/a/1.jpg", "both/train-000000.tar", "shards/val-000000.tar", "shards/val.json")
    touch("flat/1.JPG", "tree/a/1.jpg", "single/unlabeled.beton")
    assert find(tmp_path / "both", "train") == Found("beton", tmp_path / "both" / "train.beton")
    assert find(tmp_path / "both", "train", prefer_folder=True) == Found("folder", tmp_path / "both" / "train")
    assert find(tmp_path / "shards", "val") == Found("shards", tmp_path / "shards" / "val.json")
    assert find(tmp_path / "shards" / "val.json", "train") == Found("shards", tmp_path / "shards" / "val.json")
    assert find(tmp_path / "flat", "train") == Found("folder", tmp_path / "flat")
    assert find(tmp_path / "tree", "train") == Found("folder", tmp_path / "tree")
    assert find(tmp_path / "single" / "unlabeled.beton", "train") == Found("beton", tmp_path / "single" / "unlabeled.beton")
    assert [has_split(str(tmp_path / name), "val") for name in ("both", "shards", "flat", "tree", "single")] == [
        False,
        True,
        False,
        False,
        False,
    ]
    with pytest.raises(DataError, match=r"no class folders and no images\. It holds unlabeled\.beton: pass such a file itself"):
        find(tmp_path / "single", "train")
    with pytest.raises(DataError, match="neither a folder nor a .beton"):
        find(tmp_path / "flat" / "1.JPG", "train")


@pytest.mark.parametrize("name", ["train", "val"])
def test_a_class_named_like_a_split_is_not_taken_for_one(tmp_path, name):
    """COCO and VOC have a class `train`; its folder alone would be a data set without labels, and the other classes left out."""
    for file in (f"{name}/1.jpg", "bus/1.jpg", "car/deep/1.jpg", "notes/a.txt", ".cache/1.jpg", "test/1.jpg"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(jpeg(picture(0)))
    for refused in (lambda: find(tmp_path, "train"), lambda: find(tmp_path, "val"), lambda: detect(tmp_path)):
        with pytest.raises(DataError, match=f"{tmp_path}/{name} may be a split without labels, or a class like bus, car beside it"):
            refused()
    assert not has_split(str(tmp_path), "val")
    with pytest.raises(DataError, match="move all class folders into one folder"):
        train_loader(tmp_path, batch=1)
    assert len(train_loader(tmp_path / name, batch=1).ids) == 1

    (tmp_path / "classes" / "train").mkdir(parents=True)
    for moved in (name, "bus", "car"):
        (tmp_path / moved).rename(tmp_path / "classes" / "train" / moved)
    assert train_loader(tmp_path / "classes", batch=1).classes == sorted(["bus", "car", name])
    assert detect(tmp_path / "classes")[0].classes == sorted(["bus", "car", name])


def test_missing_data_names_the_conversion(tmp_path, data, tree):
    def error(path, split="train", **options) -> str:
        with pytest.raises(DataError) as caught:
            build_eval_loader(str(path), split, SPEC, dist=OneMachine(), batch=4, **options)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    (tmp_path / "no_images" / "train" / "a").mkdir(parents=True)
    (tmp_path / "only_train").mkdir()
    write(tmp_path / "only_train" / "train.beton", samples(raw=True))
    assert [has_split(str(tmp_path / "only_train"), split) for split in ("train", "val")] == [True, False]
    messages = {
        "missing": error(tmp_path / "nowhere"),
        "empty": error(tmp_path / "empty"),
        "other split": error(tmp_path / "only_train", "val"),
        "one file": error(data / "train.beton", "val"),
    }
    for message in messages.values():
        assert "make convert-imagenet IMAGENET=DIR" in message and "python -m convert.imagenet" in message
    assert "nowhere" in messages["missing"] and "no class folders" in messages["empty"] and "val.beton" in messages["other split"]
    assert f"{tmp_path}/no_images/train hold no images" in error(tmp_path / "no_images")
    assert "choose --efficiency.loader folder" in error(tree, backend="ffcv")
    assert "Choose --efficiency.loader auto" in error(data, backend="folder")


def test_a_batch_larger_than_the_data_is_refused(data):
    with pytest.raises(DataError, match="at most 30"):
        train_loader(data, batch=31)


@pytest.mark.parametrize(
    ("options", "words"), [({"batch": 0}, "one image per rank"), ({"prefetch": 0}, "at least 1"), ({"workers": -1}, "or more")]
)
def test_impossible_numbers_are_refused(data, options, words):
    with pytest.raises(DataError, match=words):
        train_loader(data, **options)


def test_more_workers_than_cores_are_fewer_with_a_warning(data, caplog):
    cores = len(os.sched_getaffinity(0))
    loader = train_loader(data, workers=cores + 50)
    assert loader.workers == cores and f"taking {cores}" in caplog.text
    assert build.decoder_threads(0, OneMachine(0, 10 * cores, 10 * cores)) == 1


@pytest.mark.parametrize(
    ("masks", "quota", "expected"),
    [
        ([range(96)] * 8, "max", 12),  # unbound
        ([range(96)] * 3, "max", 32),
        ([range(12)] * 8, "max", 1),  # in a container of 12 cores of a larger machine
        ([range(12 * r, 12 * r + 12) for r in range(8)], "max", 12),  # cores of its own
        ([range(48 * (r // 4), 48 * (r // 4) + 48) for r in range(8)], "max", 12),  # a socket for four
        ([range(8), *[range(8, 96)] * 7], "max", 8),
        ([range(96)] * 8, "1600000 100000", 2),
        ([range(96)] * 8, "50000 100000", 1),
    ],
)
def test_ranks_share_the_cores_they_may_run_on(tmp_path, monkeypatch, masks, quota, expected):
    world = len(masks)
    monkeypatch.setattr(build, "MAX_WORKERS", 99)
    monkeypatch.setattr(build, "CPU_MAX", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(masks[0]))
    if quota != "max":
        (tmp_path / "cpu.max").write_text(quota)

    class SecondMachine(OneMachine):
        def gather_objects(self, value: object) -> list:
            return [set(range(999))] * world + [set(mask) for mask in masks]

    assert build.decoder_threads(0, SecondMachine(world, 2 * world, world)) == expected


def test_auto_takes_the_next_back_end_and_says_why_once(data, monkeypatch, caplog):
    monkeypatch.setattr(ffcv, "load", lambda: "its library is missing")
    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(dali, "load", lambda: "it is too old")
        opening._say_once.cache_clear()
        assert [train_loader(data).backend for _ in range(2)] == ["torchvision"] * 2
    reason = "with torchvision, because ffcv cannot be used: its library is missing (`make setup`), and dali cannot be used: it is too old"
    assert caplog.text.count(reason) == 1
    if not dali.load():
        assert train_loader(data).backend == "dali"
    with pytest.raises(DataError, match="its library is missing. Run `make setup`"):
        train_loader(data, backend="ffcv")
