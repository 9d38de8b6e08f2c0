"""How fast does the loader decode, and how far is that from the JPEG library alone?

Three things take turns on the same samples of one .beton with the same number of threads: the whole loader with the ffcv
back end (order, sizes, geometry, ring), the same with torchvision, and a bare loop over libjpeg-turbo with ffcv's flags.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median

import numba
import numpy as np
import torch
from numba import njit, prange

from fastssl.views import byol_asymmetric
from loaders import ffcv
from loaders.beton import JPEG, Beton
from loaders.build import TrainLoader, build_loader
from loaders.errors import DataError
from loaders.order import Order


@dataclass(frozen=True)
class _OneProcess:
    device: torch.device
    rank: int = 0
    world: int = 1
    local_world: int = 1


@njit(nogil=True, parallel=True)
def _decode_bare(data, ptr, size, ids, heights, widths, scratch):
    """Every JPEG into its thread's own scratch row: no batch is kept, nothing is checked."""
    source, target = data.ctypes.data, scratch.ctypes.data
    for b in prange(ids.shape[0]):
        i = ids[b]
        row = target + numba.get_thread_id() * scratch.shape[1]
        ffcv.imdecode(source + ptr[i], size[i], heights[i], widths[i], row, heights[i], widths[i], 0, 0, 1, 1, 0, 0)


class _Bare:
    """The ceiling: batches of the loader's order through `_decode_bare`."""

    def __init__(self, beton: Beton, batch: int, workers: int) -> None:
        self._beton, self._workers = beton, workers
        self._data = beton.data.view(np.ndarray)
        self._order = Order(len(beton), batch)
        largest = int((3 * beton.height.astype(np.int64) * beton.width).max())
        self._scratch = np.empty((numba.config.NUMBA_NUM_THREADS, largest), np.uint8)
        self._step = count()

    def one_batch(self) -> None:
        numba.set_num_threads(self._workers)
        ids, b = self._order.ids(next(self._step)), self._beton
        with numba.parallel_chunksize(1):
            _decode_bare(self._data, b.ptr, b.size, ids, b.height, b.width, self._scratch)


def _measure(one_batch: Callable[[], object], batch: int, seconds: float) -> tuple[float, float]:
    """Images per second, and milliseconds of CPU time (of all threads) per image, after one batch of warm-up."""
    one_batch()
    start, cpu, images = time.perf_counter(), time.process_time(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        one_batch()
        images += batch
    return images / elapsed, 1e3 * (time.process_time() - cpu) / images


def _through_loader(loader: TrainLoader, batch: int, seconds: float, prefetch: int) -> tuple[float, float]:
    with closing(loader.from_step(0)) as batches:
        for _ in range(prefetch):  # decoded ahead of the clock
            next(batches)
        return _measure(lambda: next(batches), batch, seconds)


def bench(path: str, batch: int = 256, seconds: float = 10.0, repeats: int = 5, workers: int = 0, out: str = "") -> None:
    """Images per second from a .beton: ffcv and torchvision through the whole loader, and bare libjpeg-turbo.

    Args:
        path: A .beton, or a folder with train.beton.
        batch: Images per batch.
        seconds: Time for each of the three, all rounds together.
        repeats: Rounds; the three take turns in each, and medians are reported.
        workers: Decoder threads; 0: all cores, at most 12.
        out: Write the numbers to this JSON file as well.
    """
    dist, prefetch = _OneProcess(torch.device("cuda" if torch.cuda.is_available() else "cpu")), 3
    if problem := ffcv.load():
        raise DataError(f"The loader bench compares with FFCV's decoder, which cannot be used: {problem}. Run `make setup`.")
    loaders = {
        name: build_loader(path, "train", byol_asymmetric(), dist=dist, batch=batch, backend=name, workers=workers, prefetch=prefetch)
        for name in ("ffcv", "torchvision")
    }
    threads = loaders["ffcv"].workers
    beton = Beton.open(loaders["ffcv"].path)
    if (beton.mode != JPEG).any():
        raise DataError(f"{beton.path} holds raw images, which bare JPEG decoding cannot be measured on. Give a .beton of JPEGs.")
    bare = _Bare(beton, batch, threads)

    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in ("ffcv", "torchvision", "bare")}
    for _ in range(repeats):
        for name, loader in loaders.items():
            rounds[name].append(_through_loader(loader, batch, seconds / repeats, prefetch))
        rounds["bare"].append(_measure(bare.one_batch, batch, seconds / repeats))
    rates = {name: [rate for rate, _ in measured] for name, measured in rounds.items()}
    rate = {name: median(values) for name, values in rates.items()}
    cpu_ms = {name: median(ms for _, ms in measured) for name, measured in rounds.items()}

    print(f"{beton.path}: {len(beton):,} JPEGs, batch {batch}, {threads} threads; medians of {repeats} alternating rounds")
    print(f"  {'':32}{'images/s':>9}  {'lowest - highest':>17}  {'of bare':>8}  {'CPU ms/image':>12}")
    for name, label in {"ffcv": "loader, ffcv", "torchvision": "loader, torchvision", "bare": "bare libjpeg-turbo, same flags"}.items():
        spread = f"{min(rates[name]):,.0f} - {max(rates[name]):,.0f}"
        print(f"  {label:32}{rate[name]:9,.0f}  {spread:>17}  {rate[name] / rate['bare']:8.1%}  {cpu_ms[name]:12.2f}")
    if out:
        result = {
            "file": beton.path.name,
            "images": len(beton),
            "mean_kb": float(beton.size.mean()) / 1e3,
            "mean_megapixels": float((beton.height.astype(np.int64) * beton.width).mean()) / 1e6,
            "batch": batch,
            "threads": threads,
            "cores": len(os.sched_getaffinity(0)),
            "device": str(dist.device),
            "machine": platform.processor() or platform.machine(),
            "images_per_second": rates,
            "median": rate,
            "cpu_ms_per_image": cpu_ms,
            "ffcv_of_bare": rate["ffcv"] / rate["bare"],
        }
        Path(out).write_text(json.dumps(result, indent=1) + "\n")
