"""How fast does the loader decode, how far is that from the bare libraries, and what do other loaders cost for the same images?

Every back end that can be used here, on every stored form of the images, warm and cold, next to the bare decoder or memcpy
with the same number of threads; then three loaders of others that cut 2x224 + 6x96 views per source image.  All of it takes
turns, round after round; medians are reported.  Ours delivers whole decoded images and the boxes of all views (the crops are
made on the device), theirs deliver crops: what is compared is the CPU time that a source image costs the loader.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from fastssl.bench import pagecache, recipe, report, yardsticks
from fastssl.bench.ceiling import Ceiling, ceiling
from fastssl.bench.clock import Rate, clock, cpu_seconds, settle
from fastssl.bench.data import CACHE, Material, Variant, measured_ids, prepare, stock
from fastssl.bench.files import write
from fastssl.bench.plot import save_plot
from fastssl.bench.yardsticks import Failed, Yardstick
from loaders.beton import RAW
from loaders.build import MAX_WORKERS
from loaders.decoder import Samples, StoredDecoder
from loaders.errors import DataError
from loaders.geometry import Geometry
from loaders.open import Backend, open_decoder
from loaders.order import Order
from loaders.ring import Job, Ring

PREFETCH = 3
"""Batches decoded ahead, as in training."""
_SLOW = 3
"""Times the seconds of a measurement that a yardstick gets: it yields a tenth of the images."""


@dataclass
class Loader:
    """One back end on one stored form."""

    decoder: StoredDecoder
    ids: np.ndarray
    batch: int
    device: torch.device
    warm: list[Rate] = field(default_factory=list)
    cold: list[Rate] = field(default_factory=list)
    again: list[Rate] = field(default_factory=list)
    """The same pass as `cold` right after it: from memory."""

    def _ring(self, jobs: Iterator[Job]) -> Ring:
        return Ring(self.decoder, Geometry(recipe.spec()), jobs, self.device, PREFETCH)

    def endless(self, seconds: float) -> Rate:
        """In the middle of training: as many batches as `seconds` allow, in the loader's order."""
        order = Order(len(self.ids), self.batch, 0)
        jobs = (Job(self.ids[order.ids(s)], order.epoch(s), s) for s in count())
        with closing(self._ring(jobs)) as ring:
            for _ in range(PREFETCH):  # decoded ahead of the clock
                ring.get()
            rate = clock(ring.get, self.batch, seconds)
        settle()
        return rate

    def one_pass(self, seconds: float, epoch: int) -> Rate:
        """From nothing: every sample once in random order, or as many as `seconds` allow; the first wait counts."""
        order = Order(len(self.ids), self.batch, epoch)
        jobs = (Job(self.ids[order.ids(s)], 0, s) for s in range(order.steps_per_epoch))
        start, cpu, images = time.perf_counter(), cpu_seconds(), 0
        with closing(self._ring(jobs)) as ring:
            while time.perf_counter() - start < seconds and (batch := ring.get()) is not None:
                images += len(batch)
            elapsed, used = time.perf_counter() - start, cpu_seconds() - cpu
        settle()
        return Rate(images / elapsed, 1e3 * used / images)


@dataclass
class Measured:
    """One stored form of the images, and all that is measured on it."""

    variant: Variant
    samples: Samples
    ids: np.ndarray
    batch: int
    loaders: dict[str, Loader]
    ceiling: Ceiling | str
    """Or why there is none."""
    bare: list[Rate] = field(default_factory=list)
    resident: list[float] = field(default_factory=list)
    """Share of the files still in memory after each eviction."""

    def files(self) -> list[Path]:
        return sorted({self.samples.file(int(i)) for i in self.ids})


def open_all(variant: Variant, batch: int, threads: int, device: torch.device, unusable: dict[str, str]) -> Measured:
    """Every back end that can be used, on one stored form; why the others cannot is added to `unusable`."""
    loaders, decoders = {}, {}
    for name in get_args(Backend):
        if name in ("auto", "folder"):  # auto is one of the others; folder reads no stored data
            continue
        try:
            decoders[name] = open_decoder(str(variant.path), "train", backend=name, workers=threads, device=device, say=False)
        except DataError as error:
            unusable[name] = str(error)
    if not decoders:
        raise DataError(f"No back end can read {variant.path}. {next(iter(unusable.values()))}")
    samples = next(iter(decoders.values())).samples
    ids = measured_ids(samples)
    batch = min(batch, len(ids))
    for name, decoder in decoders.items():
        loaders[name] = Loader(decoder, ids, batch, device)
    return Measured(variant, samples, ids, batch, loaders, ceiling(samples, ids, batch, threads))


def warm_up(form: Measured, seconds: float) -> None:
    """Kernels compiled, pages and buffers in memory, checksums compared: nothing of that is measured."""
    for loader in form.loaders.values():
        loader.one_pass(10 * seconds, 0)
    if isinstance(form.ceiling, Ceiling):
        form.ceiling.one_batch()


def one_round(form: Measured, seconds: float, number: int) -> None:
    """Back ends and ceiling in turn, then each back end from the disk."""
    for loader in form.loaders.values():
        loader.warm.append(loader.endless(seconds))
    if isinstance(form.ceiling, Ceiling):
        form.bare.append(clock(form.ceiling.one_batch, form.batch, seconds))
    for loader in form.loaders.values():
        for file in form.files():
            pagecache.evict(file)
        form.resident.append(max(pagecache.resident(file) for file in form.files()))
        # One permutation for both, another in each round.
        loader.cold.append(loader.one_pass(10 * seconds, number))
        loader.again.append(loader.one_pass(10 * seconds, number))


@dataclass
class Asked:
    """A yardstick with one number of workers."""

    name: str
    workers: int
    rates: list[Rate] = field(default_factory=list)


class Yardsticks:
    """Those that can be measured here, and why the others cannot."""

    def __init__(self, names: tuple[str, ...], folder: Path | None, threads: int, stack: ExitStack, say: Callable[[str], None]) -> None:
        self.failed: dict[str, str] = dict.fromkeys(names, "the data set holds no JPEGs") if folder is None else {}
        self.startup: dict[str, float] = {}
        self.asked = []
        self._running = {name: stack.enter_context(closing(Yardstick(name, folder, threads))) for name in names if folder is not None}
        for name, yardstick in self._running.items():
            say(f"starting {yardsticks.TITLES[name]}")
            try:
                self.startup[name] = yardstick.ready()
            except Failed as error:
                self.failed[name] = str(error)
                continue
            counts = yardsticks.sweep(threads) if name == "pillow" else [threads]
            self.asked += [Asked(name, workers) for workers in counts]

    def one_round(self, seconds: float) -> None:
        for asked in self.asked:
            try:
                asked.rates.append(self._running[asked.name].measure(_SLOW * seconds, asked.workers))
            except Failed as error:
                self.failed[asked.name] = str(error)
        self.asked = [asked for asked in self.asked if asked.name not in self.failed]


def measure(
    material: Material,
    *,
    seconds: float,
    rounds: int,
    batch: int,
    threads: int,
    others: tuple[str, ...] = tuple(yardsticks.TITLES),
    say: Callable[[str], None] = lambda message: None,
) -> dict:
    """All rounds; -> the result as it is written to JSON (`report.result`).  `others`: the yardsticks to measure."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unusable: dict[str, str] = {}
    with ExitStack() as stack:
        forms = [open_all(variant, batch, threads, device, unusable) for variant in material.variants]
        theirs = Yardsticks(others, stack.enter_context(stock(forms[0].samples)), threads, stack, say)
        for form in forms:
            say(f"warming up on {form.variant.name}")
            warm_up(form, seconds)
        for number in range(1, rounds + 1):
            say(f"round {number} of {rounds}")
            for form in forms:
                one_round(form, seconds, number)
            theirs.one_round(seconds)
    return report.result(
        origin=material.origin,
        forms=[describe(form, threads) for form in forms],
        unusable=unusable,
        yardsticks=[report.yardstick(a.name, a.workers, a.rates, theirs.startup[a.name]) for a in theirs.asked],
        failed=theirs.failed,
        setting={"rounds": rounds, "seconds": seconds, "threads": threads, "device": str(device), "views": recipe.VIEWS},
    )


def describe(form: Measured, threads: int) -> dict:
    """The numbers of one stored form."""
    bytes_, pixels = form.samples.size[form.ids], form.samples.height[form.ids].astype(np.int64) * form.samples.width[form.ids]
    mean_bytes = float(bytes_.mean())
    dropped = max(form.resident) <= pagecache.DROPPED
    bare = report.series(form.bare, threads) if form.bare else None
    backends = {}
    for name, loader in form.loaders.items():
        warm = report.series(loader.warm, threads)
        warm["share_of_ceiling"] = warm["images_per_s"] / bare["images_per_s"] if bare else None
        backends[name] = {"warm": warm, "cold": report.cold(loader.cold, loader.again, mean_bytes, threads) if dropped else None}
    raw = form.samples.mode[form.ids] == RAW
    return {
        "name": form.variant.name,
        "file": form.samples.path.name,
        "kind": "raw" if raw.all() else "mixed" if raw.any() else "jpeg",
        "samples": len(form.ids),
        "batch": form.batch,
        "mean_kb": mean_bytes / 1e3,
        "mean_megapixels": float(pixels.mean()) / 1e6,
        "backends": backends,
        "ceiling": {"what": form.ceiling.what, **bare} if bare else None,
        "no_ceiling": form.ceiling if isinstance(form.ceiling, str) else None,
        "page_cache": {"how": pagecache.HOW, "resident_share_after": max(form.resident), "dropped": dropped},
    }


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def bench(path: str = "", out: Path = CACHE, seconds: float = 1.0, rounds: int = 5, batch: int = 256, workers: int = 0) -> None:
    """Images per second and CPU time per image of every back end, its ceiling, and three loaders of others.

    Args:
        path: A .beton, or a folder with train.beton; default: the ImageNet sample of FASTSSL_DATA, else the demo's photograph tiles.
        out: Folder for loader_<cores>cores_<cpu>.json and .png, or the .json file itself.
        seconds: Time of one measurement; the yardsticks take three times that.
        rounds: Turns that everything takes; medians are reported.
        batch: Images per batch.
        workers: Decoder threads; 0: all cores, at most 12.
    """
    if seconds <= 0 or rounds < 1 or batch < 1 or workers < 0:
        raise DataError("Nothing would be measured. Give --seconds above 0, --rounds and --batch of at least 1, --workers of at least 0.")
    cores = len(os.sched_getaffinity(0))
    threads = min(workers or min(cores, MAX_WORKERS), cores)
    file = report.file(out)
    file.parent.mkdir(parents=True, exist_ok=True)
    _say("preparing the images")
    material = prepare(path)
    command = f"python -m fastssl.bench loader --seconds {seconds:g} --rounds {rounds} --batch {batch} --workers {workers}"
    result = {
        "command": command + (f" --path {shlex.quote(path)}" if path else ""),
        **measure(material, seconds=seconds, rounds=rounds, batch=batch, threads=threads, say=_say),
    }
    write(result, file, save_plot)
    print(report.table(result))
    print(f"\n{file}\n{file.with_suffix('.png')}")
