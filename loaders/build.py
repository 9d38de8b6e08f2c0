"""From a path to batches: a decoder, an order and the geometry, joined by a ring."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from fractions import Fraction
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from fastssl.batch import ImageBatch
from fastssl.views import ViewSpec
from loaders.class_folders import listed
from loaders.decoder import Decoder, StoredDecoder
from loaders.errors import DataError
from loaders.geometry import Geometry
from loaders.open import Backend, Split, open_decoder
from loaders.order import LastBatch, Order, Sampling, shard
from loaders.ring import Job, Ring
from loaders.sidecar import sha256
from loaders.subsets import select

_log = logging.getLogger(__name__)
MAX_WORKERS = 12
"""More threads than this bring a batch no earlier, and take cores from the training process."""
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


class Dist(Protocol):
    """What a loader asks of `fastssl.distributed.Dist`."""

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def local_world(self) -> int:
        """Ranks on this machine, which share its cores."""

    @property
    def device(self) -> torch.device: ...

    def gather_objects(self, value: object) -> list:
        """Every rank's picklable `value`, in rank order, on every rank."""


class TrainLoader:
    """Endless batches of one rank in a global order."""

    def __init__(
        self,
        decoder: Decoder,
        geometry: Geometry,
        order: Order,
        *,
        dist: Dist,
        accumulation_steps: int,
        prefetch: int,
        ids: np.ndarray | None,
    ) -> None:
        self._decoder, self._geometry, self._order = decoder, geometry, order
        self._dist, self._accumulation_steps, self._prefetch = dist, accumulation_steps, prefetch
        self.backend = decoder.name
        self.path = decoder.path
        self.workers = decoder.workers
        self.num_samples = order.num_samples
        """Of the data set, or of its subset."""
        self.steps_per_epoch = order.steps_per_epoch
        self.ids = np.arange(order.num_samples, dtype=np.int64) if ids is None else ids
        """int64 [num_samples]: sample ids."""
        self.smallest_batch = order.batch_size(order.steps_per_epoch - 1) // (dist.world * accumulation_steps)
        """Images per rank and micro-batch in the last step of an epoch."""
        self.labels = _part(decoder.labels, ids)
        """int64 [num_samples], or None."""
        self.classes: Sequence[str] | None = decoder.classes
        self.wait_s = 0.0
        """Seconds that the consumer has waited for batches so far."""

    @cached_property
    def digest(self) -> str:
        """What tells these samples from any others, in their order: see `_digest`."""
        return _digest(self._decoder, self.ids)

    def from_step(self, step: int) -> Iterator[ImageBatch]:
        """The batches of global step `step`, step + 1, ...: each step as `accumulation_steps` micro-batches in a row.

        The pixels of a batch are valid until the next one is asked for.
        """
        with closing(Ring(self._decoder, self._geometry, self._jobs(step), self._dist.device, self._prefetch)) as ring:
            while True:
                start = time.perf_counter()
                batch = ring.get()
                self.wait_s += time.perf_counter() - start
                yield batch

    def _jobs(self, step: int) -> Iterator[Job]:
        order, announced = self._order, self._order.window(step) - 1
        for s in count(step):
            if order.sampling == "chunks":
                while announced <= order.window(s):  # the window of this step, and the one after it
                    announced += 1
                    self._announce(announced)
            ids = order.ids(s, self._dist.rank, self._dist.world)
            micro_batches = (np.split(a, self._accumulation_steps) for a in (ids, order.keys(s, ids, self._dist.rank)))
            for micro, keys in zip(*micro_batches, strict=True):
                yield Job(micro, order.epoch(s), s, keys)

    def _announce(self, window: int) -> None:
        """Let this machine's ranks, each for its share, have a window of chunks read in long pieces instead of image by image."""
        ids = self._order.window_ids(window)
        mine = shard(len(ids), self._dist.rank % self._dist.local_world, self._dist.local_world)
        self._decoder.will_need(ids[mine.start : mine.stop])


class EvalLoader:
    """This rank's part of one sequential pass: every sample on exactly one rank, the last batch may be smaller."""

    def __init__(self, decoder: Decoder, geometry: Geometry, *, dist: Dist, batch: int, prefetch: int, ids: np.ndarray | None) -> None:
        self.decoder = decoder
        self._geometry, self._dist, self._batch, self._prefetch = geometry, dist, batch, prefetch
        ids = np.arange(len(decoder), dtype=np.int64) if ids is None else ids
        mine = shard(len(ids), dist.rank, dist.world)
        self._mine = ids[mine.start : mine.stop]
        self.ids = ids
        """int64 [num_samples]: sample ids of all ranks in the order of the pass."""
        self.backend = decoder.name
        self.num_samples = len(ids)
        """Of all ranks."""
        self.labels = _part(decoder.labels, ids)
        """int64 [num_samples] in the order of the pass, or None."""
        self.classes: Sequence[str] | None = decoder.classes

    @cached_property
    def digest(self) -> str:
        """As a `TrainLoader`'s."""
        return _digest(self.decoder, self.ids)

    def part(self, rows: np.ndarray) -> EvalLoader:
        """A pass over some samples of this one, by their places in it, shared by the ranks anew."""
        return EvalLoader(self.decoder, self._geometry, dist=self._dist, batch=self._batch, prefetch=self._prefetch, ids=self.ids[rows])

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self._mine) // self._batch)

    def __iter__(self) -> Iterator[ImageBatch]:
        """The pixels of a batch are valid until the next one is asked for."""
        with closing(Ring(self.decoder, self._geometry, self._jobs(), self._dist.device, self._prefetch)) as ring:
            while (batch := ring.get()) is not None:
                yield batch

    def _jobs(self) -> Iterator[Job]:
        for s in range(len(self)):
            yield Job(self._mine[s * self._batch : (s + 1) * self._batch], 0, s)


def build_loader(
    path: str,
    split: Split,
    spec: ViewSpec,
    *,
    dist: Dist,
    batch: int,
    accumulation_steps: int = 1,
    seed: int = 0,
    order: Sampling = "shuffle",
    last_batch: LastBatch = "drop",
    subset: str = "",
    backend: Backend = "auto",
    workers: int = 0,
    prefetch: int = 3,
) -> TrainLoader:
    """Training batches of `batch` images per rank and micro-batch.

    path: a folder with {train,val}.beton or {train,val}/ class folders; for training also one .beton or one tree of class
    folders.  order, last_batch: see `loaders.order`.  subset: a rule of `loaders.subsets`; "" takes every sample.  workers:
    decoder threads of this rank; 0 takes its share of the cores.  Every rank calls it.  Raises DataError when the data or the back
    end cannot be used, or the ranks do not see the same data.
    """
    decoder, ids = _open(path, split, dist, batch, subset, backend, workers, prefetch)
    share = dist.world * accumulation_steps
    positions = Order(
        len(decoder),
        batch * share,
        seed,
        sampling=order,
        last_batch=last_batch,
        ids=ids,
        labels=decoder.labels,
        multiple_of=share,
    )
    loader = TrainLoader(
        decoder, Geometry(spec, seed), positions, dist=dist, accumulation_steps=accumulation_steps, prefetch=prefetch, ids=ids
    )
    _check_same_everywhere(loader, decoder.path, dist)
    return loader


def build_eval_loader(
    path: str,
    split: Split,
    spec: ViewSpec,
    *,
    dist: Dist,
    batch: int,
    subset: str = "",
    backend: Backend = "auto",
    workers: int = 0,
    prefetch: int = 3,
) -> EvalLoader:
    """One sequential pass, shared by the ranks.  Arguments and errors as for `build_loader`."""
    decoder, ids = _open(path, split, dist, batch, subset, backend, workers, prefetch)
    loader = EvalLoader(decoder, Geometry(spec), dist=dist, batch=batch, prefetch=prefetch, ids=ids)
    _check_same_everywhere(loader, decoder.path, dist)
    return loader


def _open(
    path: str, split: Split, dist: Dist, batch: int, subset: str, backend: Backend, workers: int, prefetch: int
) -> tuple[Decoder, np.ndarray | None]:
    """The decoder, and the ids of the subset (None: all samples)."""
    if batch < 1:
        raise DataError(f"A batch of {batch} images per rank is empty. Set a global batch size of at least one image per rank.")
    if prefetch < 1:
        raise DataError(f"{prefetch} batches cannot be decoded ahead. Set --efficiency.prefetch to at least 1.")
    decoder = open_decoder(path, split, backend=backend, workers=decoder_threads(workers, dist), device=dist.device, say=dist.rank == 0)
    if not subset:
        return decoder, None

    def names() -> Sequence[str] | None:
        return decoder.samples.names if isinstance(decoder, StoredDecoder) else decoder.files

    return decoder, select(subset, labels=decoder.labels, names=names, classes=decoder.classes, path=decoder.path)


def _part(labels: np.ndarray | None, ids: np.ndarray | None) -> np.ndarray | None:
    return labels if labels is None or ids is None else labels[ids]


def _digest(decoder: Decoder, ids: np.ndarray) -> str:
    """What tells the samples `ids` of a data set from any others: it changes with every image that is added, removed, moved to another
    place or labelled anew, and with the subset; not with the back end, the ranks, or where the data lie.

    Of a stored set: kinds, sizes, labels and, where it has a sidecar, the CRC-32 of all images.  Of a folder: names and labels of its
    files, so a file that was written anew under its name is not noticed.
    """
    if isinstance(decoder, StoredDecoder):
        s = decoder.samples
        about = [s.mode, s.height, s.width, s.size, s.crc32]
    else:
        about = ["\0".join(decoder.files).encode("utf-8", "surrogateescape")]
    columns = (np.ascontiguousarray(a) if isinstance(a, np.ndarray) else a for a in (*about, decoder.labels, ids) if a is not None)
    return sha256(columns)[:16]


def _check_same_everywhere(loader: TrainLoader | EvalLoader, path: Path, dist: Dist) -> None:
    """Raise DataError, on every rank, when some rank sees other data than rank 0: an old copy on its machine, say."""
    found = dist.gather_objects((loader.digest, loader.num_samples))
    if odd := [f"{rank} ({found[rank][1]:,} images)" for rank in range(len(found)) if found[rank] != found[0]]:
        raise DataError(
            f"{path} is not the same for all ranks: rank 0 has {found[0][1]:,} images, and these have others: {listed(odd)}. Copy the data "
            "anew to the machines of those ranks, or give all of them one --data.path that they share."
        )


def decoder_threads(asked: int, dist: Dist) -> int:
    """Threads of this rank; 0 asks for its share of the cores, and every rank asks alike.

    A core is shared by the ranks of this machine that may run on it: all of them, or the one that a launcher has bound to it.  They are
    asked, because neither the parent's cores nor the machine's tell a bound rank from a small container.
    """
    if asked < 0:
        raise DataError(
            f"There cannot be {asked} decoder threads. Set --workers (train.py: --efficiency.workers) to 0, a share of the cores, or more."
        )
    mine = os.sched_getaffinity(0)
    if asked == 0:
        first = dist.rank - dist.rank % dist.local_world
        sharing = Counter(core for cores in dist.gather_objects(set(mine))[first : first + dist.local_world] for core in cores)
        share = min(sum(Fraction(1, sharing[core]) for core in mine), _core_quota() / dist.local_world)
        return min(max(1, int(share)), MAX_WORKERS)
    cores = len(mine)
    if asked > cores:
        _log.warning("%d decoder threads were asked for, but this process may use %d cores: taking %d.", asked, cores, cores)
    return min(asked, cores)


def _core_quota() -> float:
    """Cores that this container's ranks together may keep busy; infinite without a limit (cgroup v2)."""
    try:
        quota, period = CPU_MAX.read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # "max"
        return math.inf
