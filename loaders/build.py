"""From a path to batches: a decoder, an order and the geometry, joined by a ring."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import count
from typing import Protocol

import numpy as np
import torch

from fastssl.batch import ImageBatch
from fastssl.views import ViewSpec
from loaders.decoder import Decoder
from loaders.errors import DataError
from loaders.geometry import Geometry
from loaders.open import Backend, Split, open_decoder
from loaders.order import Order, shard
from loaders.ring import Job, Ring

_log = logging.getLogger(__name__)
_MAX_WORKERS = 12
"""More threads than this bring a batch no earlier, and take cores from the training process."""


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


class TrainLoader:
    """Endless shuffled batches of one rank."""

    def __init__(
        self, decoder: Decoder, geometry: Geometry, order: Order, *, dist: Dist, batch: int, accumulation_steps: int, prefetch: int
    ) -> None:
        self._decoder, self._geometry, self._order = decoder, geometry, order
        self._dist, self._batch, self._accumulation_steps, self._prefetch = dist, batch, accumulation_steps, prefetch
        self.backend = decoder.name
        self.path = decoder.path
        self.workers = decoder.workers
        self.num_samples = len(decoder)
        self.steps_per_epoch = order.steps_per_epoch
        self.labels: np.ndarray | None = decoder.labels
        """int64 [num_samples], or None."""
        self.classes: Sequence[str] | None = decoder.classes
        self.wait_s = 0.0
        """Seconds that the consumer has waited for batches so far."""

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
        for s in count(step):
            ids = self._order.ids(s, self._dist.rank, self._dist.world)
            for micro in ids.reshape(self._accumulation_steps, self._batch):
                yield Job(micro, self._order.epoch(s), s)


class EvalLoader:
    """This rank's part of one sequential pass: every sample on exactly one rank, the last batch may be smaller."""

    def __init__(self, decoder: Decoder, geometry: Geometry, *, dist: Dist, batch: int, prefetch: int) -> None:
        self._decoder, self._geometry, self._dist, self._batch, self._prefetch = decoder, geometry, dist, batch, prefetch
        self._mine = shard(len(decoder), dist.rank, dist.world)
        self.backend = decoder.name
        self.num_samples = len(decoder)
        """Of all ranks."""
        self.labels: np.ndarray | None = decoder.labels
        """int64 [num_samples], or None."""
        self.classes: Sequence[str] | None = decoder.classes

    def __len__(self) -> int:
        """Batches of this rank."""
        return -(-len(self._mine) // self._batch)

    def __iter__(self) -> Iterator[ImageBatch]:
        """The pixels of a batch are valid until the next one is asked for."""
        with closing(Ring(self._decoder, self._geometry, self._jobs(), self._dist.device, self._prefetch)) as ring:
            while (batch := ring.get()) is not None:
                yield batch

    def _jobs(self) -> Iterator[Job]:
        for s in range(len(self)):
            part = self._mine[s * self._batch : (s + 1) * self._batch]
            yield Job(np.arange(part.start, part.stop, dtype=np.int64), 0, s)


def build_loader(
    path: str,
    split: Split,
    spec: ViewSpec,
    *,
    dist: Dist,
    batch: int,
    accumulation_steps: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    backend: Backend = "auto",
    workers: int = 0,
    prefetch: int = 3,
) -> TrainLoader:
    """Training batches of `batch` images per rank and micro-batch.

    path: a folder with {train,val}.beton or {train,val}/ class folders; for training also one .beton or one tree of class
    folders.  workers: decoder threads of this rank; 0 takes its share of the cores.  Raises DataError when the data or the
    back end cannot be used.
    """
    _check(batch, prefetch)
    decoder = open_decoder(path, split, backend=backend, workers=_workers(workers, dist), say=dist.rank == 0)
    order = Order(len(decoder), batch * accumulation_steps * dist.world, seed, shuffle)
    return TrainLoader(
        decoder, Geometry(spec, seed), order, dist=dist, batch=batch, accumulation_steps=accumulation_steps, prefetch=prefetch
    )


def build_eval_loader(
    path: str, split: Split, spec: ViewSpec, *, dist: Dist, batch: int, backend: Backend = "auto", workers: int = 0, prefetch: int = 3
) -> EvalLoader:
    """One sequential pass, shared by the ranks.  Arguments and errors as for `build_loader`."""
    _check(batch, prefetch)
    decoder = open_decoder(path, split, backend=backend, workers=_workers(workers, dist), say=dist.rank == 0)
    return EvalLoader(decoder, Geometry(spec), dist=dist, batch=batch, prefetch=prefetch)


def _check(batch: int, prefetch: int) -> None:
    if batch < 1:
        raise DataError(f"A batch of {batch} images per rank is empty. Set a global batch size of at least one image per rank.")
    if prefetch < 1:
        raise DataError(f"{prefetch} batches cannot be decoded ahead. Set --efficiency.prefetch to at least 1.")


def _workers(asked: int, dist: Dist) -> int:
    if asked < 0:
        raise DataError(f"There cannot be {asked} decoder threads. Set --efficiency.workers to 0 (a share of the cores) or more.")
    cores = len(os.sched_getaffinity(0))
    if asked == 0:
        return min(max(1, cores // dist.local_world), _MAX_WORKERS)
    if asked > cores:
        _log.warning("%d decoder threads were asked for, but this process may use %d cores: taking %d.", asked, cores, cores)
    return min(asked, cores)
