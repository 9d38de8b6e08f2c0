"""How fast does a preset train from a data set on disk, and what holds it up?

Five rates in source images a second, in turns, by the clock on the wall:

    loader                the loader alone: batches decoded and on the device
    loader + augment      the same and the views of them
    step                  the engine's step on views that stay on the device
    augment + step        the same with the views made anew in every step, from images that stay on the device
    end to end            `fastssl.engine.fit`, the loop of train.py, without its log, checkpoints and evaluations

The images that stay are a batch of the data set, so that everybody has images of its sizes.  Data stall (Mohan et al., VLDB 2021,
arXiv 2007.06775): the share of the end-to-end time that "augment + step" does not take.  A loop's own wait for data is no measure of
it, since what is queued hides stalls.  One process, or torchrun: rates are of a rank, the slowest one.
"""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from fastssl import cli
from fastssl.batch import ImageBatch
from fastssl.bench.files import write
from fastssl.bench.machine import described, device_name
from fastssl.bench.plot import BOUND, COLD, OTHERS, WARM, Bar, draw_bars
from fastssl.bench.training import Rank, collector_resting, named, one_rank, per_rank
from fastssl.checkpoint import versions
from fastssl.config import RunConfig
from fastssl.distributed import Dist, session
from fastssl.engine import State, fit, train_step
from fastssl.hooks import Hook
from loaders.build import TrainLoader, build_loader
from loaders.errors import DataError

OUT = Path("data/bench")
STEPS, WARM_UP = {"cuda": 100, "cpu": 4}, {"cuda": 20, "cpu": 1}
RATES = {"loader": COLD, "loader + augment": COLD, "step": BOUND, "augment + step": BOUND, "end to end": WARM}
"""And the colours of their bars."""
_STALLED, _NEAR = 0.1, 1.15
"""From this data stall on, data bind; up to this multiple of the end-to-end rate, the loader's own rate is what binds."""


def now(dist: Dist) -> float:
    """The clock, once every rank's device is idle."""
    if dist.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


class Window(Hook):
    """Seconds from the end of step `first` to the end of the run."""

    def __init__(self, first: int) -> None:
        self.first, self.began, self.seconds = first, 0.0, 0.0

    def after_step(self, state: State) -> None:
        if state.step == self.first:
            self.began = now(state.dist)

    def finish(self, state: State) -> None:
        self.seconds = now(state.dist) - self.began


def kept(batch: ImageBatch) -> ImageBatch:
    """A copy that the loader does not write over."""
    tensors = {f.name: t.clone() for f in fields(batch) if isinstance(t := getattr(batch, f.name), Tensor)}
    return replace(batch, **tensors)


def timed(run: Callable[[], object], dist: Dist, *, warmup: int, steps: int) -> float:
    """Seconds of so many calls."""
    for _ in range(warmup):
        run()
    start = now(dist)
    for _ in range(steps):
        run()
    return now(dist) - start


def one_round(rank: Rank, loader: TrainLoader, *, warmup: int, steps: int) -> dict[str, float]:
    """Images/s of everything once."""
    state, seconds = rank.state, {}
    with collector_resting(state) as collector:
        for name, work in {"loader": lambda batch: batch, "loader + augment": rank.augment}.items():
            with closing(loader.from_step(0)) as batches:
                # What was decoded ahead is not counted.
                seconds[name] = timed(lambda work=work: work(next(batches)), state.dist, warmup=warmup + 4, steps=steps)  # noqa: B023
        runs = {
            "step": lambda: train_step(state, [rank.views]),
            "augment + step": lambda: train_step(state, [rank.augment(rank.images)]),
        }
        for name, run in runs.items():
            seconds[name] = timed(run, state.dist, warmup=warmup, steps=steps)
        window = Window(state.step + warmup)
        state.cfg = replace(state.cfg, train=replace(state.cfg.train, max_steps=state.step + warmup + steps))
        fit(state, loader, rank.augment, [window, collector])
        seconds["end to end"] = window.seconds
    return {name: steps * rank.batch / s for name, s in seconds.items()}


def measure(cfg: RunConfig, dist: Dist, *, batch: int, rounds: int, steps: int, warmup: int, say: Callable[[str], None]) -> dict:
    """All rounds; -> the numbers."""
    e = cfg.efficiency
    loader = build_loader(
        cfg.data.path,
        "train",
        cfg.views,
        dist=dist,
        batch=batch,
        seed=cfg.train.seed,
        backend=e.loader,
        workers=e.workers,
        prefetch=e.prefetch,
    )
    with closing(loader.from_step(0)) as batches:
        images = kept(next(batches))
    say(f"building {cfg.preset}, {batch} images")
    rank = one_rank(cfg, dist, batch, images)
    found: dict[str, list[float]] = {name: [] for name in RATES}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for name, rate in one_round(rank, loader, warmup=warmup, steps=steps).items():
            found[name].append(rate)
    # within a round: the machine's drift hits both
    stall = median(1 - real / synthetic for real, synthetic in zip(found["end to end"], found["augment + step"], strict=True))
    augment = median(1 - both / alone for both, alone in zip(found["augment + step"], found["step"], strict=True))
    rates = {name: median(values) for name, values in found.items()}
    return {
        "preset": cfg.preset,
        "arch": cfg.model.arch,
        "batch": batch,
        "sizes": " + ".join(f"{len(g.views)}x{g.pixels.shape[-1]}" for g in rank.views.groups),
        "dtype": str(rank.state.dtype).removeprefix("torch."),
        "compiled": rank.state.compiled,
        "cuda_graphs": e.cuda_graphs,
        "backend": loader.backend,
        "workers": loader.workers,
        "images_per_s": rates,
        "images_per_s_rounds": found,
        "views_per_s": rates["end to end"] * rank.views_per_image,
        "images_per_s_all_ranks": rates["end to end"] * dist.world,
        "data_stall": max(0.0, stall),
        "augment_share": max(0.0, augment),
        "binds": binds(rates, max(0.0, stall), max(0.0, augment), dist.device.type),
    }


def binds(rates: dict[str, float], stall: float, augment: float, device_type: str) -> str:
    """The stage that sets the end-to-end rate."""
    if stall >= _STALLED and rates["loader"] <= _NEAR * rates["end to end"]:
        return f"the loader: alone it is hardly faster than training, which waits for data {stall:.0%} of the time"
    if stall >= _STALLED:
        shared = "the loader's threads and the step share the processor" if device_type == "cpu" else "copies and launches of the two meet"
        headroom = rates["loader"] / rates["end to end"]
        return f"both together: the loader alone is {headroom:.1f} x as fast as training, which still loses {stall:.0%}: {shared}"
    parts = {"augmentation": augment, "the step": 1 - augment}
    what = max(parts, key=parts.__getitem__)
    return f"{what}: {parts[what]:.0%} of the time of the two; data stall {stall:.0%}"


# ------------------------------------------------------------------------------------------------ the whole bench


def table(r: dict) -> str:
    """The result for a terminal."""
    ranks = f"{r['ranks']} ranks x " if r["ranks"] > 1 else ""
    how = f"{r['dtype']}{', compiled' * r['compiled']}{', CUDA graphs' * r['cuda_graphs']}"
    lines = [
        f"{r['device']}; {r['cores']} cores of {r['cpu']}; {r['preset']}: {r['arch']}, {ranks}{r['batch']} images x ({r['sizes']}), {how}",
        f"{r['path']}, loader {r['backend']} with {r['workers']} threads; medians of {r['rounds']} rounds of {r['steps']} steps",
        "",
        f"{'':20}{'images/s':>10}{'lowest - highest':>22}",
    ]
    for name, rate in r["images_per_s"].items():
        rounds = r["images_per_s_rounds"][name]
        lines.append(f"  {name:18}{rate:10,.1f}{f'{min(rounds):,.1f} - {max(rounds):,.1f}':>22}")
    lines += [
        "",
        f"Data stall {r['data_stall']:.1%}; augmentation is {r['augment_share']:.1%} of the step with it.",
        f"What binds: {r['binds']}.",
    ]
    return "\n".join(lines)


def save_plot(result: dict, path: Path) -> None:
    """The five rates as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 2.8), dpi=110, layout="constrained")
    bars: list[Bar] = [(name, rate, f"{rate:,.1f}", RATES.get(name, OTHERS)) for name, rate in result["images_per_s"].items()]
    where = f"{result['preset']} on {result['device']}, loader {result['backend']}, {result['workers']} threads"
    draw_bars(figure.subplots(), bars, f"source images per second of a rank: {where}; data stall {result['data_stall']:.0%}")
    figure.savefig(path, format="png")


def bench(
    preset: str,
    path: str = "",
    batch: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    cuda_graphs: bool = False,
    rounds: int = 3,
    steps: int = 0,
    warmup: int = 0,
    workers: int = 0,
    out: Path = OUT,
) -> None:
    """Images per second of a preset from a data set on disk, of its stages alone, and the stage that binds.

    Args:
        preset: Name of fastssl.presets.PRESETS.
        path: Data set, as --data.path of train.py; default: the preset's.
        batch: Images of a rank; 0: as published, where that is not known the global batch over 8 ranks; on a CPU at most 8.
        device: Where; auto: CUDA if there is one.
        dtype: As --efficiency.dtype of train.py; compile and cuda-graphs alike.
        rounds: Turns that everything takes; medians are reported.
        steps: Timed steps of a turn; 0: 100 on CUDA, 4 on a CPU.
        warmup: Steps before; 0: 20 on CUDA, 1 on a CPU.
        workers: Decoder threads of a rank; 0: its share of the cores, at most 12.
        out: Folder for train_<preset>.json and .png, or the .json file itself.
    """
    cfg = named(preset)
    if rounds < 1 or min(batch, steps, warmup, workers) < 0:
        raise DataError("Nothing would be measured. Give --rounds of at least 1, --batch, --steps, --warmup and --workers of at least 0.")
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("This torch reaches no CUDA device. Take --device cpu; `make report` says what is missing.")
    efficiency = replace(cfg.efficiency, workers=workers, dtype=dtype, compile=compile, cuda_graphs=cuda_graphs)
    cfg = replace(cfg, data=replace(cfg.data, path=path or cfg.data.path), efficiency=efficiency)
    with session(device) as dist:
        where = dist.device
        batch = batch or per_rank(cfg, where)
        steps, warmup = steps or STEPS[where.type], warmup or WARM_UP[where.type]
        cli.check(replace(cfg, train=replace(cfg.train, global_batch_size=batch * dist.world)), dist.world)
        say = (lambda message: print(message, file=sys.stderr, flush=True)) if dist.is_main else lambda message: None
        found = measure(cfg, dist, batch=batch, rounds=rounds, steps=steps, warmup=warmup, say=say)
        if not dist.is_main:
            return
        flags = f"--preset {preset} --path {shlex.quote(cfg.data.path)} --batch {batch} --device {where.type} --workers {workers}"
        flags += f" --dtype {dtype} --compile {compile}" + " --cuda-graphs" * cuda_graphs
        result = {
            "command": f"python -m fastssl.bench train {flags} --rounds {rounds} --steps {steps} --warmup {warmup}",
            "date": time.strftime("%Y-%m-%d"),
            "device": device_name(where),
            "device_type": where.type,
            **described(where),
            "threads": torch.get_num_threads(),
            "ranks": dist.world,
            "path": cfg.data.path,
            **{"rounds": rounds, "steps": steps, "warmup": warmup},
            **found,
            "versions": {"python": platform.python_version(), **versions()},
        }
        file = out if out.suffix == ".json" else out / f"train_{preset}.json"
        write(result, file, save_plot)
        print(table(result))
        print(f"\n{file}\n{file.with_suffix('.png')}")
