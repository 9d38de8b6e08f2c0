"""The back ends through the whole loader: one batch whatever decodes it, clear errors, no thread or buffer left in use."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from fastssl.bench.loader import bench
from fastssl.views import byol_asymmetric, center_crop
from loaders import ffcv
from loaders import open as opening
from loaders.beton import JPEG, RAW, BetonWriter
from loaders.build import build_eval_loader, build_loader
from loaders.errors import DataError
from loaders.geometry import Geometry
from loaders.open import has_split
from loaders.ring import Job, Ring

SPEC = byol_asymmetric(size=32)
SIZES = [(48, 64), (64, 48), (33, 71), (90, 90), (17, 120), (61, 40)]
NUM_SAMPLES = 30
RAW_SAMPLE = 7
BACKENDS = ["ffcv", "torchvision"]

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")


@dataclass(frozen=True)
class OneMachine:
    rank: int = 0
    world: int = 1
    local_world: int = 1
    device: torch.device = torch.device("cpu")


def picture(i: int) -> np.ndarray:
    """Smooth colours with some texture: uint8 [height, width, 3]."""
    height, width = SIZES[i % len(SIZES)]
    rng = np.random.default_rng(i)
    coarse = Image.fromarray(rng.integers(80, 176, (5, 5, 3), np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse, np.int16) + rng.integers(-8, 9, (height, width, 1)), 0, 255).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_beton(path: Path, samples: list[tuple[bytes, int, int, int]]) -> None:
    """samples: (bytes, mode, height, width); labels are i % 3."""
    with BetonWriter(path, len(samples)) as writer:
        for i, sample in enumerate(samples):
            writer.append(*sample, label=i % 3)
        writer.finish([f"class{i % 3}/{i}.jpg" for i in range(len(samples))], ["class0", "class1", "class2"], "pictures/train")


def good_samples() -> list[tuple[bytes, int, int, int]]:
    """JPEGs of several sizes, and one raw image."""
    pictures = [picture(i) for i in range(NUM_SAMPLES)]
    encoded = [(jpeg(p), JPEG, *p.shape[:2]) for p in pictures]
    encoded[RAW_SAMPLE] = (pictures[RAW_SAMPLE].tobytes(), RAW, *pictures[RAW_SAMPLE].shape[:2])
    return encoded


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """train.beton and val.beton with the same samples."""
    folder = tmp_path_factory.mktemp("betons")
    for split in ("train", "val"):
        write_beton(folder / f"{split}.beton", good_samples())
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


def train_loader(path, *, dist=None, batch=8, **options) -> build.TrainLoader:
    return build_loader(str(path), "train", SPEC, dist=dist or OneMachine(), batch=batch, seed=3, **options)


def collect(loader: build.TrainLoader, step: int, batches: int) -> list[dict]:
    """What `batches` batches hold, copied out of the ring."""
    found = []
    for batch in islice(loader.from_step(step), batches):
        images = [batch.image(i).clone() for i in range(len(batch))]
        small = {name: getattr(batch, name).clone() for name in ("index", "label", "height", "width", "boxes", "flips")}
        found.append(small | {"images": images, "epoch": batch.epoch, "step": batch.step})
    return found


def assert_same(a: list[dict], b: list[dict], pixels: bool = True) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert (x["epoch"], x["step"]) == (y["epoch"], y["step"])
        for name in ("index", "label", "height", "width", "boxes", "flips"):
            assert torch.equal(x[name], y[name]), name
        if pixels:
            assert all(torch.equal(p, q) for p, q in zip(x["images"], y["images"], strict=True))


def ring_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "fastssl-ring"]


# ------------------------------------------------------------------------------------------------ one batch for all


def test_both_back_ends_give_the_same_batches(data):
    ours, theirs = (collect(train_loader(data, backend=b), 0, 8) for b in BACKENDS)
    assert_same(ours, theirs, pixels=False)
    for x, y in zip(ours, theirs, strict=True):
        for p, q in zip(x["images"], y["images"], strict=True):
            difference = (p.int() - q.int()).abs().float()
            assert p.shape == q.shape and difference.mean() < 2.5 and difference.max() < 40  # fast against exact DCT


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_images_are_the_ones_that_were_stored(data, backend):
    for batch in collect(train_loader(data, backend=backend), 0, 4):
        for image, index, label, h, w in zip(*(batch[k] for k in ("images", "index", "label", "height", "width")), strict=True):
            original = picture(int(index)).astype(int)
            assert (int(h), int(w)) == original.shape[:2] and int(label) == int(index) % 3
            difference = np.abs(image.numpy() - original).mean()
            assert difference <= (0 if index == RAW_SAMPLE else 6), index


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_do_not_depend_on_the_number_of_workers(data, backend):
    one, two = (collect(train_loader(data, backend=backend, workers=w), 0, 5) for w in (1, 2))
    assert_same(one, two)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batch_of_one_process(data, world):
    whole = collect(train_loader(data, batch=8), 0, 7)
    ranks = [collect(train_loader(data, batch=8 // world, dist=OneMachine(r, world, world)), 0, 7) for r in range(world)]
    for step, batch in enumerate(whole):
        for name in ("index", "boxes", "flips", "height"):
            assert torch.equal(torch.cat([r[step][name] for r in ranks]), batch[name])


def test_accumulation_splits_the_step(data):
    whole, parts = collect(train_loader(data, batch=8), 1, 4), collect(train_loader(data, batch=2, accumulation_steps=4), 1, 16)
    assert [p["step"] for p in parts] == [s for s in range(1, 5) for _ in range(4)]
    for i, batch in enumerate(whole):
        for name in ("index", "boxes", "flips"):
            assert torch.equal(torch.cat([p[name] for p in parts[4 * i : 4 * i + 4]]), batch[name])


def test_a_resumed_loader_continues(data):
    straight = collect(train_loader(data), 0, 9)
    assert [b["epoch"] for b in straight] == [0] * 3 + [1] * 3 + [2] * 3
    for step in (1, 3, 5):
        assert_same(collect(train_loader(data), step, 9 - step), straight[step:])


def test_an_evaluation_sees_every_sample_once_in_order(data):
    seen = []
    for rank in range(3):
        loader = build_eval_loader(str(data), "val", center_crop(size=32, resize=36), dist=OneMachine(rank, 3), batch=4)
        sizes = [len(b) for b in loader]
        assert len(loader) == len(sizes) and set(sizes[:-1]) <= {4}
        seen += [i for b in loader for i in b.index.tolist()]
    assert seen == list(range(NUM_SAMPLES))
    assert loader.num_samples == NUM_SAMPLES and loader.labels.tolist() == [i % 3 for i in range(NUM_SAMPLES)]


def test_two_loaders_work_at_the_same_time(data):
    train = train_loader(data).from_step(0)
    for _ in range(3):
        next(train)
        evaluation = build_eval_loader(str(data), "val", center_crop(size=32, resize=36), dist=OneMachine(), batch=8)
        assert sum(len(b) for b in evaluation) == NUM_SAMPLES
    train.close()


def test_imagenet_photographs(tmp_path):
    source = Path(os.environ.get("FASTSSL_DATA", "")) / "imagenet_sample.tar"
    if not source.is_file():
        pytest.skip("FASTSSL_DATA has no imagenet_sample.tar")
    samples = []
    with tarfile.open(source) as tar:
        for member in islice((m for m in tar if m.isfile()), 24):
            image = Image.open(tar.extractfile(member)).convert("RGB")
            image.thumbnail((500, 500))
            samples.append((jpeg(np.asarray(image)), JPEG, image.height, image.width))
    write_beton(tmp_path / "train.beton", samples)
    ours, theirs = (collect(train_loader(tmp_path, batch=12, backend=b), 0, 2) for b in BACKENDS)
    assert_same(ours, theirs, pixels=False)
    for p, q in ((p, q) for x, y in zip(ours, theirs, strict=True) for p, q in zip(x["images"], y["images"], strict=True)):
        assert (p.int() - q.int()).abs().float().mean() < 2.5


# ------------------------------------------------------------------------------------------------ class folders


def test_a_tree_of_class_folders_is_read_as_image_folder_does(tree):
    loader = train_loader(tree, backend="auto")
    (tree / "train" / "class0" / "._hidden.jpeg").unlink()  # ImageFolder would list it
    theirs = ImageFolder(str(tree / "train"))
    assert loader.backend == "folder" and loader.classes == theirs.classes
    assert [(str(tree / "train" / f), y) for f, y in zip(loader._decoder.files, loader.labels, strict=True)] == theirs.samples
    for batch in collect(loader, 0, 4):
        for image, index, label in zip(batch["images"], batch["index"], batch["label"], strict=True):
            expected, target = theirs[int(index)]
            difference = np.abs(image.numpy().astype(int) - np.asarray(expected)).mean()
            assert label == target and (difference == 0 if theirs.samples[index][0].endswith("png") else difference < 1.5)


def test_a_validation_folder_uses_the_training_classes(tree):
    folder = tree / "val" / "class2"
    folder.mkdir(parents=True)
    (folder / "0.jpeg").write_bytes(jpeg(picture(0)))
    loader = build_eval_loader(str(tree), "val", center_crop(size=32, resize=36), dist=OneMachine(), batch=4)
    assert loader.labels.tolist() == [2] and loader.classes == ["class0", "class1", "class2"]


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
        collect(train_loader(tmp_path, batch=2), 0, 1)
    assert not ring_threads()


# ------------------------------------------------------------------------------------------------ bad data


def broken(samples, i: int, kind: str):
    content, mode, height, width = samples[i]
    samples[i] = {
        "cut": (content[: len(content) // 2], mode, height, width),
        "noise": (content[:2] + bytes(len(content) - 2), mode, height, width),
        "half the width": (content, mode, height, width // 2),
        "wider": (content, mode, height, width + 40),
    }[kind]
    return samples


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["cut", "noise", "half the width", "wider"])
def test_a_damaged_sample_is_an_error_that_names_it(tmp_path, backend, kind):
    write_beton(tmp_path / "train.beton", broken(good_samples(), 11, kind))
    reason = "not a complete JPEG" if kind in ("cut", "noise") else "another size"
    with pytest.raises(DataError, match=rf"sample 11 \(class2/11\.jpg\).*{reason}.*Convert again with: python -m convert\.imagenet"):
        collect(train_loader(tmp_path, backend=backend), 0, 4)
    assert not ring_threads()


def test_a_sample_outside_of_the_file_is_never_touched(data):
    decoder = ffcv.FFCVDecoder(data / "train.beton", workers=1)
    decoder.beton.ptr[2] = 2**62
    ids = np.array([1, 2])
    heights, widths = decoder.sizes(ids)
    status = decoder.decode_into(ids, heights, widths, np.array([0, 30_000]), np.empty(60_000, np.uint8))
    assert status.tolist() == [0, 3]
    assert "outside of the file" in str(decoder.error(2, 3))


def test_a_buffer_that_is_too_small_is_not_overrun(data):
    decoder = ffcv.FFCVDecoder(data / "train.beton", workers=1)
    ids = np.array([0])
    heights, widths = decoder.sizes(ids)
    buffer = np.full(3 * 48 * 64, 99, np.uint8)
    assert decoder.decode_into(ids, heights, widths, np.array([1]), buffer[:-1]) != 0
    assert (buffer == 99).all()


# ------------------------------------------------------------------------------------------------ the ring


class Counting:
    """A decoder that fills sample i with the byte i and, at sample `fails_at`, raises."""

    name, path, workers, labels, classes = "counting", Path("nowhere"), 1, None, None

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at

    def __len__(self) -> int:
        return 200

    def sizes(self, ids):
        return np.full(len(ids), 10, np.int32) + (ids % 7).astype(np.int32), np.full(len(ids), 20, np.int32)

    def decode_into(self, ids, heights, widths, offsets, buffer):
        for i, h, w, offset in zip(ids, heights, widths, offsets, strict=True):
            if i == self.fails_at:
                raise OSError("the disk is gone")
            buffer[offset : offset + 3 * h * w] = i
        return np.zeros(len(ids), np.int32)


def counting_ring(decoder, prefetch=2) -> Ring:
    jobs = (Job(np.arange(4 * s, 4 * s + 4), 0, s) for s in range(50))
    return Ring(decoder, Geometry(SPEC), jobs, torch.device("cpu"), prefetch)


@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_batch_keeps_its_pixels_until_the_next_is_asked_for(prefetch):
    ring, old = counting_ring(Counting(), prefetch), []
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


def test_an_error_of_the_decoding_thread_reaches_the_consumer():
    ring = counting_ring(Counting(fails_at=22))
    with pytest.raises(OSError, match="the disk is gone"):
        for _ in range(50):
            ring.get()
    assert not ring_threads()


@pytest.mark.parametrize("leave", ["close", "break", "error"])
def test_no_thread_outlives_its_consumer(data, leave):
    batches = train_loader(data).from_step(0)
    with pytest.raises(KeyboardInterrupt) if leave == "error" else open(os.devnull):
        for _ in batches:
            assert ring_threads()
            if leave == "error":
                raise KeyboardInterrupt
            break
    if leave == "close":
        batches.close()
    del batches
    assert not ring_threads()


def test_the_interpreter_ends_with_a_loader_running(data):
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); import torch\n"
        "from types import SimpleNamespace\nfrom loaders.build import build_loader\nfrom fastssl.views import byol_asymmetric\n"
        "dist = SimpleNamespace(rank=0, world=1, local_world=1, device=torch.device('cpu'))\n"
        "batches = build_loader(sys.argv[1], 'train', byol_asymmetric(), dist=dist, batch=8).from_step(0)\n"
        "print(len(next(batches)))\n"
    )
    root = str(Path(build.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", script, str(data), root], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "8\n", "")


def test_waiting_is_measured(data):
    loader = train_loader(data)
    batches = loader.from_step(0)
    next(batches)
    assert loader.wait_s > 0
    before = loader.wait_s
    time.sleep(0.3)
    next(batches)
    assert before < loader.wait_s < before + 0.2
    batches.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_the_batches_are_the_same(data):
    device = OneMachine(device=torch.device("cuda", 0))
    on_cpu = collect(train_loader(data), 0, 30)
    loader, kept = train_loader(data, dist=device), []
    for batch in islice(loader.from_step(0), 30):
        torch.cuda._sleep(2_000_000)  # the device falls behind: a slot that is reused too early would show
        kept.append((batch.pixels.clone(), batch))
    for expected, (pixels, batch) in zip(on_cpu, kept, strict=True):
        batch.pixels = pixels.cpu()
        assert torch.equal(batch.boxes.cpu(), expected["boxes"]) and torch.equal(batch.index.cpu(), expected["index"])
        assert all(torch.equal(batch.image(i), image) for i, image in enumerate(expected["images"]))


# ------------------------------------------------------------------------------------------------ what cannot be built


def test_missing_data_names_the_conversion(tmp_path, data, tree):
    def error(path, split="train", **options) -> str:
        with pytest.raises(DataError) as caught:
            build_eval_loader(str(path), split, SPEC, dist=OneMachine(), batch=4, **options)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    (tmp_path / "no_images" / "train" / "a").mkdir(parents=True)
    (tmp_path / "only_train").mkdir()
    write_beton(tmp_path / "only_train" / "train.beton", good_samples())
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
    assert train_loader(data, dist=OneMachine(local_world=10 * cores)).workers == 1


def test_without_ffcv_auto_takes_torchvision_and_says_so_once(data, monkeypatch, caplog):
    monkeypatch.setattr(ffcv, "load", lambda: "its library is missing")
    opening._say_once.cache_clear()
    with caplog.at_level("INFO"):
        assert [train_loader(data).backend for _ in range(2)] == ["torchvision"] * 2
    assert caplog.text.count("ffcv cannot be used: its library is missing") == 1
    with pytest.raises(DataError, match="its library is missing. Run `make setup`"):
        train_loader(data, backend="ffcv")


def test_the_bench_compares_with_bare_decoding(data, tmp_path, capsys):
    folder = tmp_path / "jpegs"
    folder.mkdir()
    write_beton(folder / "train.beton", [s for s in good_samples() if s[1] == JPEG])
    bench(str(folder), batch=8, seconds=0.3, repeats=1, out=str(tmp_path / "loader.json"))
    result = json.loads((tmp_path / "loader.json").read_text())
    assert result["ffcv_of_bare"] == pytest.approx(result["median"]["ffcv"] / result["median"]["bare"])
    assert all(value > 0 for value in result["median"].values()) and "of bare" in capsys.readouterr().out
    with pytest.raises(DataError, match="raw images"):
        bench(str(data), batch=8, seconds=0.1, repeats=1)
