"""Does decoding disturb training less from a process of its own?  python -m benchmarks.loader_process

A training loop spends its time in Python that launches kernels, and the product's loader decodes in a thread of the same
process.  Here the same decoder feeds the same loop from a thread (`loaders/ring.py`), from a separate process that writes
into shared memory (a prototype that lives only in this file), and not at all.  Two loops: `launches`, small torch operations
one after the other, as an eager training step launches them; `resnet18`, an eager training step of a small ResNet-18.  The
batch is chosen so that decoding keeps its threads busy for 70 % of a step.  All take turns; medians of the rounds.

Prints a table; --out writes the numbers to a folder.  Needs an otherwise idle machine with at least one core more than
--workers: where they share a core, decoding costs the loop what it costs, wherever it runs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from itertools import count
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import nn
from torchvision.models import resnet18

from fastssl.bench import recipe, report
from fastssl.bench.clock import settle
from fastssl.bench.data import measured_ids, prepare
from fastssl.bench.machine import cpu_name
from fastssl.checkpoint import versions
from loaders.geometry import Geometry
from loaders.open import open_decoder
from loaders.order import Order
from loaders.ring import Job, Ring

PREFETCH = 3
LOAD = 0.7
"""Share of a step that the decoding threads are busy."""
STEP_SECONDS = 0.05
"""Of a `launches` step: several thousand launches, as a multi-crop step has."""
BACKENDS = ("ffcv", "torchvision")
PLACES = ("none", "in process", "separate process")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------ the main loop


def launches() -> Callable[[], None]:
    """A step of small operations that takes about STEP_SECONDS."""
    x, y = torch.rand(64, device=DEVICE), torch.rand(64, device=DEVICE)

    def some(n: int) -> None:
        for _ in range(n):
            z = x * y
            z = z + x
            torch.relu(z)
        _synchronise()

    some(1000)
    start = time.perf_counter()
    some(5000)
    n = round(5000 * STEP_SECONDS / (time.perf_counter() - start))
    return lambda: some(n)


def resnet_step() -> Callable[[], None]:
    torch.manual_seed(0)
    model = resnet18(num_classes=10).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    batch, size = (32, 128) if DEVICE.type == "cuda" else (4, 64)
    images, labels = torch.randn(batch, 3, size, size, device=DEVICE), torch.randint(10, (batch,), device=DEVICE)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        _synchronise()

    return step


LOOPS = {"launches": launches, "resnet18": resnet_step}


def _synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------------ where batches come from


class Source(Protocol):
    def get(self) -> object: ...
    def close(self) -> None: ...


class Nothing:
    def get(self) -> None:
        pass

    def close(self) -> None:
        pass


def in_process(path: str, backend: str, workers: int, batch: int) -> Ring:
    """The product's ring."""
    decoder = open_decoder(path, "train", backend=backend, workers=workers, device=DEVICE, say=False)
    return Ring(decoder, Geometry(recipe.spec()), _jobs(measured_ids(decoder.samples), batch), DEVICE, PREFETCH)


def _jobs(ids: np.ndarray, batch: int) -> Iterator[Job]:
    order = Order(len(ids), batch, 0)
    return (Job(ids[order.ids(s)], order.epoch(s), s) for s in count())


class SeparateProcess:
    """The same from a process: pixels through shared memory, all else through a pipe."""

    def __init__(self, path: str, backend: str, workers: int, batch: int) -> None:
        samples = open_decoder(path, "train", backend=backend, workers=1, device=torch.device("cpu"), say=False).samples
        ids = measured_ids(samples)
        largest = int((3 * samples.height[ids].astype(np.int64) * samples.width[ids]).max())
        self._slots = [torch.empty(batch * largest, dtype=torch.uint8).share_memory_() for _ in range(PREFETCH + 1)]
        context = mp.get_context("spawn")
        self._free, free = context.Pipe()
        self._ready, ready = context.Pipe()
        self._process = context.Process(target=_serve, args=(path, backend, workers, batch, self._slots, free, ready), daemon=True)
        self._process.start()
        for end in (free, ready):
            end.close()
        if DEVICE.type == "cuda":
            self._stream, self._copied = torch.cuda.Stream(DEVICE), torch.cuda.Event(blocking=True)
            for slot in self._slots:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(slot.data_ptr(), slot.numel(), 0))
        for number in range(len(self._slots)):
            self._free.send(number)
        self._held: int | None = None

    def get(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        if self._held is not None:
            if DEVICE.type == "cuda":
                self._copied.synchronize()
            self._free.send(self._held)
        self._held, total, arrays = self._ready.recv()
        pixels = self._slots[self._held][:total]
        with torch.cuda.stream(self._stream) if DEVICE.type == "cuda" else nullcontext():
            pixels, *small = [t.to(DEVICE, non_blocking=True) for t in (pixels, *map(torch.from_numpy, arrays))]
            if DEVICE.type == "cuda":
                self._copied.record()
        return pixels, small

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
            for slot in self._slots:
                torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(slot.data_ptr()))


def _serve(
    path: str,
    backend: str,
    workers: int,
    batch: int,
    slots: list[torch.Tensor],
    free: multiprocessing.connection.Connection,
    ready: multiprocessing.connection.Connection,
) -> None:
    """The decoding process: what the ring's thread does."""
    torch.set_num_threads(1)
    decoder = open_decoder(path, "train", backend=backend, workers=workers, device=torch.device("cpu"), say=False)
    geometry, buffers = Geometry(recipe.spec()), [slot.numpy() for slot in slots]
    for job in _jobs(measured_ids(decoder.samples), batch):
        slot = free.recv()
        heights, widths = decoder.sizes(job.ids)
        sizes = 3 * heights.astype(np.int64) * widths
        offsets = np.cumsum(sizes) - sizes
        boxes, flips = geometry.draw(job.ids, job.epoch, heights, widths)
        status = decoder.decode_into(job.ids, heights, widths, offsets, buffers[slot])
        if status.any():
            raise decoder.error(int(job.ids[np.argmax(status)]), int(status.max()))
        ready.send((slot, int(sizes.sum()), [job.ids, offsets, heights, widths, boxes, flips]))


OPEN = {"in process": in_process, "separate process": SeparateProcess}


# ------------------------------------------------------------------------------------------------ measuring


def run(source: Source, step: Callable[[], None], seconds: float) -> dict[str, float]:
    """The loop for `seconds`: rates, and how long iterations take in milliseconds."""
    for _ in range(PREFETCH + 1):
        source.get()
        step()
    total, work = [], []
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        source.get()
        got = time.perf_counter()
        step()
        stop = time.perf_counter()
        total.append(1e3 * (stop - start))
        work.append(1e3 * (stop - got))
    return {
        "iterations_per_s": 1e3 * len(total) / sum(total),
        "iteration_p99_ms": float(np.percentile(total, 99)),
        "step_median_ms": median(work),
        "step_p99_ms": float(np.percentile(work, 99)),
        "wait_mean_ms": (sum(total) - sum(work)) / len(total),
    }


def greedy(source: Source, batch: int, seconds: float) -> float:
    """Images per second when nothing else is done with them."""
    for _ in range(2 * PREFETCH):
        source.get()
    start, images = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        source.get()
        images += batch
    return images / elapsed


def measure(path: str, workers: int, seconds: float, rounds: int) -> list[dict]:
    """One row per loop, back end and place."""
    steps = {name: make() for name, make in LOOPS.items()}
    rows = []
    for backend in BACKENDS:
        with closing(in_process(path, backend, workers, 64)) as ring:
            per_image = 1 / greedy(ring, 64, seconds)
        for name, step in steps.items():
            alone = run(Nothing(), step, seconds)["step_median_ms"] / 1e3
            batch = max(1, int(LOAD * alone / per_image))
            rows += [{"loop": name, "backend": backend, "place": place, "batch": batch, "rounds": []} for place in PLACES]
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        for row in rows:
            with closing(_open(row, path, workers)) as source:
                # First what also compares every sample with its checksum, so that the loop is not measured beside that.
                alone = 0.0 if row["place"] == "none" else greedy(source, row["batch"], seconds)
                found = run(source, steps[row["loop"]], seconds)
                images = 0.0 if row["place"] == "none" else row["batch"] * found["iterations_per_s"]
                row["rounds"].append({**found, "images_per_s": images, "images_per_s_alone": alone})
            settle()
    for row in rows:
        row["median"] = {key: median(r[key] for r in row["rounds"]) for key in row["rounds"][0]}
        none = next(r for r in rows if (r["loop"], r["backend"], r["place"]) == (row["loop"], row["backend"], "none"))
        pairs = zip(row["rounds"], none["rounds"], strict=True)
        row["rate_of_no_loader"] = median(r["iterations_per_s"] / n["iterations_per_s"] for r, n in pairs)
    return rows


def _open(row: dict, path: str, workers: int) -> Source:
    return Nothing() if row["place"] == "none" else OPEN[row["place"]](path, row["backend"], workers, row["batch"])


# ------------------------------------------------------------------------------------------------ the report


def table(rows: list[dict]) -> str:
    lines = ["| loop | decoder | where | batch | steps/s | of no loader | iteration p99 ms | step p50 / p99 ms | images/s | loader alone |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        m = row["median"]
        step = f"{m['step_median_ms']:.1f} / {m['step_p99_ms']:.1f}"
        loader = "- | -" if row["place"] == "none" else f"{m['images_per_s']:,.0f} | {m['images_per_s_alone']:,.0f}"
        lines.append(
            f"| {row['loop']} | {row['backend']} | {row['place']} | {row['batch']} | {m['iterations_per_s']:.1f} | "
            f"{row['rate_of_no_loader']:.1%} | {m['iteration_p99_ms']:.1f} | {step} | {loader} |"
        )
    return "\n".join(lines)


def verdict(rows: list[dict]) -> str:
    """One sentence per loop and decoder."""
    by = {(r["loop"], r["backend"], r["place"]): r for r in rows}
    lines = []
    for loop, backend in dict.fromkeys((r["loop"], r["backend"]) for r in rows):
        none, thread, process = (by[loop, backend, place] for place in PLACES)
        lines.append(
            f"{loop}, {backend}: the loop keeps {thread['rate_of_no_loader']:.1%} of its rate beside a decoding thread and "
            f"{process['rate_of_no_loader']:.1%} beside a decoding process; 99th percentile of an iteration "
            f"{thread['median']['iteration_p99_ms']:.1f} and {process['median']['iteration_p99_ms']:.1f} ms, without a loader "
            f"{none['median']['iteration_p99_ms']:.1f} ms."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="", help="a .beton; default: what python -m fastssl.bench loader takes")
    parser.add_argument("--workers", type=int, default=1, help="decoder threads")
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement")
    parser.add_argument("--rounds", type=int, default=5, help="turns that everything takes")
    parser.add_argument("--out", type=Path, help="folder for loader_process_<cores>cores_<cpu>.json")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if args.workers >= cores:
        parser.error(
            f"{args.workers} decoder threads leave no core of {cores} to the main loop; give --workers {max(1, cores - 1)} or fewer"
        )
    torch.set_num_threads(1)  # the main loop is one thread, as a process that launches kernels is
    material = prepare(args.path)
    rows = measure(str(material.variants[0].path), args.workers, args.seconds, args.rounds)
    print(f"\n{table(rows)}\n\n{verdict(rows)}")
    if args.out:
        name = report.file(args.out).name.replace("loader_", "loader_process_", 1)
        setting = {"workers": args.workers, "seconds": args.seconds, "data": material.origin, "form": material.variants[0].name}
        machine = {"cpu": cpu_name(), "cores": cores, "device": str(DEVICE), "versions": versions()}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / name).write_text(json.dumps({**setting, **machine, "rows": rows}, indent=1) + "\n")
        print(args.out / name)


if __name__ == "__main__":
    main()
