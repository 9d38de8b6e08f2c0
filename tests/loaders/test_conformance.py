"""One batch whatever decodes it: every back end over the same stored sizes, any world size, workers, and resume point.

Ids, labels, sizes, boxes and flips of every batch equal what order, geometry and tables say on their own.  Pixels equal those
of the same decoder given one sample at a time, and those of the other decoders within the tolerance of JPEG decoding below.
"""

from __future__ import annotations

import functools
import os
from contextlib import closing
from dataclasses import dataclass
from itertools import combinations, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fastssl.augment.augmenter import Augmenter
from fastssl.augment.draws import ColourDraws
from fastssl.recipes import center_crop, ibot
from fastssl.views import Mask
from loaders import dali, ffcv
from loaders.beton import JPEG, RAW, Beton, BetonWriter
from loaders.build import build_eval_loader, build_loader
from loaders.class_folders import scan
from loaders.decoder import OK, Samples
from loaders.geometry import Geometry
from loaders.open import open_decoder
from loaders.order import Order
from loaders.shards import Shards
from tests.loaders.stored import (
    SEED,
    SPEC,
    OneMachine,
    assert_same,
    collect,
    decode,
    difference,
    jpeg,
    picture,
    samples,
    train_loader,
    write,
)

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")

BACKENDS = [
    pytest.param("ffcv", marks=pytest.mark.skipif(bool(ffcv.load()), reason=str(ffcv.load()))),
    pytest.param("dali", marks=pytest.mark.skipif(bool(dali.load()), reason=str(dali.load()))),
    "torchvision",
]
FORMS = ["mixed.beton", "jpegs.beton", "shards.json"]
GLOBAL_BATCH = 12
STEPS = 4
"""Of an epoch: 50 samples in batches of 12."""

MEAN, LARGEST = 2.0, 12
"""Largest mean and largest single difference of one image between two JPEG decoders, on the 0..255 scale.  FFCV takes libjpeg-turbo's
fast DCT (1.7 and 4 here, 1.15 and 10 on 200 photographs), the others its exact one (no difference at all)."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forms")
    for form in FORMS:
        write(folder / form, samples(raw=form == "mixed.beton"))
    return folder


@pytest.fixture
def four_cores(monkeypatch):
    """More workers than cores change nothing but the speed; the loader would take fewer."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))


@dataclass
class Truth:
    """What a data set's batches should be, without any loader."""

    samples: Samples
    pixels: list[np.ndarray]
    """Of each sample, by one back end, decoded alone."""

    def batch(self, step: int) -> dict:
        order = Order(len(self.samples), GLOBAL_BATCH, SEED)
        ids = order.ids(step)
        heights, widths = self.samples.height[ids], self.samples.width[ids]
        boxes, flips = Geometry(SPEC, SEED).draw(ids, order.epoch(step), heights, widths)
        arrays = {
            "index": ids,
            "key": ids,
            "label": self.samples.label[ids],
            "height": heights,
            "width": widths,
            "boxes": boxes,
            "flips": flips,
        }
        return {name: torch.from_numpy(np.array(a)) for name, a in arrays.items()} | {"epoch": order.epoch(step), "step": step}


def open_samples(path: Path) -> Samples:
    return Beton.open(path) if path.suffix == ".beton" else Shards.open(path.parent, path.stem)


@functools.cache
def alone(path: Path, backend: str) -> list[np.ndarray]:
    decoder = open_decoder(str(path), "train", backend=backend, workers=1, device=torch.device("cpu"), say=False)
    found = [decode(decoder, [i]) for i in range(len(decoder))]
    assert all((status == OK).all() for _, status in found)
    return [images[0] for images, _ in found]


def check(path: Path, backend: str, world: int, workers: int, start: int, truth: Truth) -> None:
    """The batches of steps start, start + 1, ... to the end of the epoch and one step more."""
    count = STEPS - start + 1
    parts = []
    for rank in range(world):
        dist = OneMachine(rank, world, world)
        loader = train_loader(path, dist=dist, batch=GLOBAL_BATCH // world, backend=backend, workers=workers)
        batches = loader.from_step(start)
        parts.append(collect(batches, count))
        batches.close()
    for n in range(count):
        expected, got = truth.batch(start + n), [part[n] for part in parts]
        for name in ("index", "key", "label", "height", "width", "boxes", "flips"):
            assert torch.equal(torch.cat([g[name] for g in got]), expected[name]), name
        assert all((g["epoch"], g["step"]) == (expected["epoch"], expected["step"]) for g in got)
        images = [image for g in got for image in g["images"]]
        for image, i in zip(images, expected["index"].tolist(), strict=True):
            assert np.array_equal(image.numpy(), truth.pixels[i]), i


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("world", "workers", "start"), [(1, 1, 0), (3, 2, 0), (2, 4, 3)])
def test_a_batch_is_what_the_tables_say(folder, form, backend, world, workers, start, four_cores):
    path = folder / form
    check(path, backend, world, workers, start, Truth(open_samples(path), alone(path, backend)))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_the_full_product(folder, form, backend, world, four_cores):
    path = folder / form
    truth = Truth(open_samples(path), alone(path, backend))
    for workers in (1, 2, 3, 4):
        for start in range(STEPS + 1):
            check(path, backend, world, workers, start, truth)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_pixels_agree_across_decoders(folder, form, backend):
    """torchvision is the reference: libjpeg-turbo with its exact DCT."""
    path = folder / form
    mode, reference = open_samples(path).mode, alone(path, "torchvision")
    for i, (ours, theirs) in enumerate(zip(alone(path, backend), reference, strict=True)):
        mean, largest = difference(ours, theirs)
        assert mean <= MEAN and largest <= LARGEST, (i, mean, largest)
        assert mode[i] != RAW or largest == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_and_beton_of_the_same_jpegs_are_the_same(folder, backend):
    a, b = (alone(folder / form, backend) for form in ("jpegs.beton", "shards.json"))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["val.beton", "val.json"])
def test_an_evaluation_is_every_sample_once_in_order(tmp_path, form, backend, world):
    path = write(tmp_path / form, samples(raw=form == "val.beton"))
    truth, seen = alone(path, backend), []
    for rank in range(world):
        loader = build_eval_loader(
            str(tmp_path), "val", center_crop(size=32, resize=36), dist=OneMachine(rank, world), batch=4, backend=backend, workers=2
        )
        for _ in range(2):  # the second pass is as the first
            got = collect(loader, len(loader) + 1)
            ids = torch.cat([g["index"] for g in got]).tolist()
            for i, image in zip(ids, [image for g in got for image in g["images"]], strict=True):
                assert np.array_equal(image.numpy(), truth[i]), i
        seen += ids
    assert seen == list(range(len(truth)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["u.beton", "u.json"])
def test_without_labels(tmp_path, form, backend):
    path = write(tmp_path / form, samples(raw=False, count=12), labels=False)
    (batch,) = collect(train_loader(path, batch=12, backend=backend).from_step(0), 1)
    assert batch["label"] is None and sorted(batch["index"].tolist()) == list(range(12))


def test_the_folder_gives_the_batches_of_the_beton_made_of_its_files(tmp_path):
    """Of files that are stored byte by byte; a resized image would have other boxes."""
    for i in range(30):
        file = tmp_path / "tree" / f"class{i % 3}" / f"{i:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(picture(i)))
    files, labels, classes = scan(tmp_path / "tree")
    stored = [((tmp_path / "tree" / file).read_bytes(), JPEG, *picture(int(Path(file).stem)).shape[:2]) for file in files]
    with BetonWriter(tmp_path / "train.beton", len(files)) as writer:
        for sample, label in zip(stored, labels, strict=True):
            writer.append(*sample, label=int(label))
        writer.finish(files, classes)
    a = collect(train_loader(tmp_path / "tree", batch=10, backend="folder").from_step(1), 4)
    b = collect(train_loader(tmp_path / "train.beton", batch=10, backend="torchvision").from_step(1), 4)
    assert_same(a, b)


def test_an_image_that_a_step_repeats_looks_different_each_time(tmp_path):
    """Balanced, 28 images of one class and 2 of the other, each of which comes three times in a step of 12."""
    with BetonWriter(tmp_path / "train.beton", 30) as writer:
        for i, sample in enumerate(samples(raw=False, count=30)):
            writer.append(*sample, label=int(i in (0, 3)))
        writer.finish([f"{i}.jpg" for i in range(30)])
    spec = ibot(size=32, local_size=16, local_crops=1, mask=Mask(patch_size=4))
    augment = Augmenter(spec, device="cpu", dtype=torch.float32, seed=SEED)

    def seen(backend: str, world: int, start: int, **options) -> list[tuple]:
        """Of each image of two steps, in the global order: id, key, boxes, masks, and the first two views."""
        found = {}
        for rank in range(world):
            loader = build_loader(
                *(str(tmp_path), "train", spec),
                dist=OneMachine(rank, world, world),
                seed=SEED,
                backend=backend,
                order="balanced",
                **options,
            )
            with closing(loader.from_step(start)) as batches:
                for batch in islice(batches, 2 * options.get("accumulation_steps", 1)):
                    assert batch.epoch == batch.step // 2
                    views = augment(batch)
                    whole = torch.stack(views.per_view()[:2], 1)
                    of = found.setdefault((batch.step, rank), [])
                    of += zip(batch.index.tolist(), batch.key.tolist(), batch.boxes, views.masks, whole, strict=True)
        return [image for place in sorted(found) for image in found[place]]

    alone = seen("torchvision", 1, 0, batch=12)
    repeated = [image for image in alone[:12] if image[0] == 3]
    assert len(repeated) == 3
    for a, b in combinations(repeated, 2):
        assert not any(torch.equal(x, y) for x, y in zip(a[2:], b[2:], strict=True))
    colours = ColourDraws(spec, device=torch.device("cpu"), seed=SEED)(0, torch.tensor([image[1] for image in repeated]))
    assert len(set(colours.brightness[0].tolist())) == 3
    ranks = seen("torchvision", 3, 0, batch=2, accumulation_steps=2, workers=2)
    resumed = seen("torchvision", 2, 1, batch=6)
    for other, expected in ((ranks, alone), (resumed[:12], alone[12:])):
        for x, y in zip(other, expected, strict=True):
            assert x[:2] == y[:2] and all(torch.equal(p, q) for p, q in zip(x[2:], y[2:], strict=True))
    for backend in ("ffcv", "dali"):
        if not {"ffcv": ffcv, "dali": dali}[backend].load():
            for x, y in zip(seen(backend, 1, 0, batch=12), alone, strict=True):
                assert x[:2] == y[:2] and all(torch.equal(p, q) for p, q in zip(x[2:4], y[2:4], strict=True))


def test_the_digest_tells_data_apart_and_nothing_else(tmp_path, four_cores):
    """Resuming on other data is refused by it."""
    stored = samples(raw=True, count=20)

    def digest(stored=stored, at="here", **options) -> str:
        """Of a new data set."""
        path = tmp_path / at / "train.beton"
        path.parent.mkdir(exist_ok=True)
        write(path, stored)
        return train_loader(path, batch=options.pop("batch", 4), **options).digest

    first = digest()
    usable = [name for name, problem in (("ffcv", ffcv.load()), ("dali", dali.load()), ("torchvision", None)) if not problem]
    assert {digest(backend=backend) for backend in usable} == {first}
    assert {digest(at="there"), digest(order="balanced"), digest(batch=2, dist=OneMachine(1, 2, 2), workers=2)} == {first}
    swapped = [*stored[:3], stored[11], *stored[4:11], stored[3], *stored[12:]]
    assert stored[3][2:] == stored[11][2:]  # of one size
    others = [digest(stored[:-1]), digest(samples(raw=True, count=21)), digest(swapped), digest(subset="first:3"), digest(subset="first:4")]
    assert len({first, *others}) == 6

    tree = tmp_path / "tree"
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(stored[0][0])
    of_tree = [train_loader(tree, batch=1).digest]
    tree = tree.rename(tmp_path / "moved")
    assert train_loader(tree, batch=1).digest == of_tree[0]
    for old, new in (("a/2.jpg", "b/2.jpg"), ("b/2.jpg", "b/3.jpg"), ("b/3.jpg", "b/3.txt")):
        (tree / old).rename(tree / new)
        of_tree.append(train_loader(tree, batch=1).digest)
    assert len(set(of_tree)) == 4


def test_the_comparison_would_notice(folder):
    """A pixel that is off by one."""
    path = folder / "jpegs.beton"
    truth = Truth(open_samples(path), [pixels.copy() for pixels in alone(path, "torchvision")])
    check(path, "torchvision", 1, 1, 0, truth)
    truth.pixels[int(truth.batch(0)["index"][5])][0, 0, 0] ^= 1
    with pytest.raises(AssertionError):
        check(path, "torchvision", 1, 1, 0, truth)
