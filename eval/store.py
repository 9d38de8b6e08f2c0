"""Features on disk: memory-mapped arrays that all ranks fill, each its part, and that an extraction continues after a kill.

NAME.features.npy   float32 [N, D], in the order of the pass over the data
NAME.labels.npy     int64 [N]; absent for unlabelled images
NAME.index.npy      int64 [N], sample ids
NAME.json           the manifest: what the features are of, N and D, and the rows that are done, as [first, end) pairs
NAME.rankR.json     while rank R works: the rows it has written

All ranks write into one file, so the folder is on a disk that they share.  Rows count as done only after they are on the disk.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from eval.features import Bank
from eval.results import together, write_result
from fastssl.distributed import Dist
from loaders.build import EvalLoader
from loaders.errors import DataError
from loaders.order import shard

SAVE_SECONDS = 10.0
"""A kill loses at most the work of so long."""
ORIGIN = ("checkpoint",)
"""Of the manifest: may differ between extraction and use, the digest of the weights says that they are the same."""


@dataclass(frozen=True)
class Store:
    """The features of one pass over a data set in `folder`, under `name`."""

    folder: Path
    name: str
    of: dict[str, object]
    """What the features are of, plain values: the manifest holds them, and features of something else are refused."""

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.name}.{suffix}"

    def fill(self, loader: EvalLoader, run: Callable[[EvalLoader], Iterable[Bank]], width: int, dist: Dist) -> None:
        """Extract what is not on the disk yet.  Every rank calls it.

        run: the features of a loader, batch after batch.  DataError when the folder holds the features of something else, ConfigError
        when it cannot be written.
        """
        manifest = self._manifest(loader, width)
        dist.barrier()
        with together(dist, self.folder):
            if dist.is_main:
                self._prepare(manifest, loader, width)
        done = np.zeros(loader.num_samples, bool)
        for first, end in json.loads(self.path("json").read_text())["done"]:
            done[first:end] = True
        left = np.flatnonzero(~done)
        if not len(left):
            return
        with together(dist, self.folder):
            self._write(loader.part(left), run, loader.ids, dist)
        with together(dist, self.folder):
            if dist.is_main:
                write_result(self.path("json"), manifest | {"done": [[0, loader.num_samples]]})
                self._forget_ranks()

    def bank(self, dist: Dist | None = None) -> Bank:
        """The features; with `dist` this rank's equal share of the rows, on its device.  Read from the disk as they are used."""
        arrays = [np.load(self.path(f"{part}.npy"), mmap_mode="c") for part in ("features", "index")]
        labels = np.load(self.path("labels.npy"), mmap_mode="c") if self.path("labels.npy").exists() else None
        rows = range(len(arrays[0])) if dist is None else shard(len(arrays[0]), dist.rank, dist.world)
        device = dist.device if dist is not None else "cpu"
        features, index, labels = (None if a is None else torch.from_numpy(a[rows.start : rows.stop]).to(device) for a in (*arrays, labels))
        return Bank(features, labels, index)

    def _manifest(self, loader: EvalLoader, width: int) -> dict:
        """The manifest with what is known to be done.  Ranks only read here: they see the same."""
        manifest = self.of | {"images": loader.num_samples, "dim": width, "done": []}
        file = self.path("json")
        if not file.exists():
            return manifest
        try:
            found = json.loads(file.read_text())
            done = [pair for f in (file, *self._rank_files()) for pair in json.loads(f.read_text())["done"]]
        except (ValueError, KeyError, OSError) as error:
            raise DataError(f"{file} is no manifest of features ({error}). Delete the folder {self.folder}, or choose another.") from error
        differs = [key for key in manifest if key not in (*ORIGIN, "done") and found.get(key) != manifest[key]]
        if differs:
            what = "; ".join(f"{key}: {found.get(key)} there, {manifest[key]} here" for key in differs)
            raise DataError(f"{self.folder} holds {self.name} features of something else ({what}). Choose another folder, or delete it.")
        return manifest | {"done": done}

    def _prepare(self, manifest: dict, loader: EvalLoader, width: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.path("json").exists():
            _reserve(self.path("features.npy"), (loader.num_samples, width))
            np.save(self.path("index.npy"), loader.ids)
            self.path("labels.npy").unlink(missing_ok=True)
            if loader.labels is not None:
                np.save(self.path("labels.npy"), loader.labels.astype(np.int64))
        write_result(self.path("json"), manifest)
        self._forget_ranks()

    def _write(self, loader: EvalLoader, run: Callable[[EvalLoader], Iterable[Bank]], ids: np.ndarray, dist: Dist) -> None:
        out = np.load(self.path("features.npy"), mmap_mode="r+")
        written: list[np.ndarray] = []
        saved = time.monotonic()

        def save() -> None:
            out.flush()
            write_result(self.path(f"rank{dist.rank}.json"), {"done": pairs(np.concatenate(written))})

        for part in run(loader):
            rows = np.searchsorted(ids, part.index.cpu().numpy())
            out[rows] = part.features.cpu().numpy()
            written.append(rows)
            if time.monotonic() - saved > SAVE_SECONDS:
                save()
                saved = time.monotonic()
        if written:
            save()

    def _rank_files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.name}.rank*.json"))

    def _forget_ranks(self) -> None:
        for file in self._rank_files():
            file.unlink()


def _reserve(path: Path, shape: tuple[int, int]) -> None:
    """A float32 .npy of zeros whose blocks exist: a disk that fills up under a memory map kills the process without a word."""
    np.lib.format.open_memmap(path, "w+", np.float32, shape)
    try:
        with path.open("r+b") as f:
            os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
    except OSError:
        path.unlink()
        raise


def pairs(rows: np.ndarray) -> list[list[int]]:
    """Ascending rows as [first, end) of each unbroken run of them."""
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(rows, cuts)]
