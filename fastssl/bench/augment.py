"""What does augmentation cost, how far is that from the memory it must move, and what do other libraries need for the same views?

Every operation, and whole recipes, on random images of one size: our kernels, the torch reference, and whatever of torchvision,
kornia, DALI and Pillow is installed and runs on the device.  All of it takes turns, round after round; medians are reported, for
512 views.  On a CPU everything has one thread, so that rates are per core.  Our operations are fused, so each of them costs what
a crop with it takes longer than a crop without it, measured one after the other.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from fastssl.augment import Augmenter, augmenter
from fastssl.augment.draws import ColourDraws
from fastssl.batch import Views
from fastssl.bench import augment_report as report
from fastssl.bench import augment_work as work
from fastssl.bench.augment_clock import Time, clock, copy_rate
from fastssl.bench.augment_plot import save_plot
from fastssl.bench.augment_rivals import RIVALS, Unfit
from fastssl.bench.augment_step import step_share
from fastssl.bench.augment_work import SEED, Material, Run, Task, material
from fastssl.bench.files import write
from fastssl.bench.machine import one_thread
from fastssl.bench.parity import Error, parity
from fastssl.engine import resolve_dtype
from fastssl.presets import PRESETS
from fastssl.recipes import center_crop
from fastssl.views import ViewSpec
from loaders.errors import DataError

OUT = Path("data/bench")
"""Where the loader bench puts its files, too."""
STEP_PRESET = "lewel_b_eman_r50_200ep"
IMAGES = {"cuda": 256, "cpu": 8}
"""Source images of a batch; two views each make 512 on CUDA."""
LOOPED, REFERENCE_ON_CPU = 16, 2
"""Images for those who take them one by one, and for the torch operations on a CPU: more would take longer and show the same."""


# ------------------------------------------------------------------------------------------------ who takes part


@dataclass
class Contestant:
    """One implementation of one task."""

    name: str
    run: Run
    views: int
    base: Run | None = None
    """What it does besides the operation; its time is taken off."""
    times: list[Time] = field(default_factory=list)
    """One per round; of the operation alone where there is a base."""
    whole: list[Time] = field(default_factory=list)
    """The same with the base."""

    def warm_up(self) -> None:
        for run in (self.run, self.base):
            if run:
                run()

    def one_round(self, device: torch.device, seconds: float) -> None:
        base = clock(self.base, device, seconds) if self.base else Time(0.0, 0.0)
        whole = clock(self.run, device, seconds)
        self.whole.append(whole)
        self.times.append(Time(whole.ms - base.ms, whole.host_ms - base.host_ms))


def augmentation(m: Material, spec: ViewSpec, dtype: torch.dtype, *, reference: bool, draws: bool) -> tuple[str, Callable[[], Views]]:
    """Name of our implementation, and a call of it.  draws: draw the colours in every call; otherwise once, before."""
    augment, by_torch = Augmenter(spec, device=m.device, dtype=dtype, seed=SEED), ColourDraws(spec, device=m.device, seed=SEED)
    if reference:
        augment.implementation, augment.render, augment.draws = "torch", augmenter.render, by_torch
    if not draws:
        params = by_torch(0, m.batch.index)
        augment.draws = lambda epoch, index: params
    return augment.implementation, lambda: augment(m.batch)


def ours(task: Task, m: Material, dtype: torch.dtype, *, reference: bool) -> Contestant | None:
    """None where there is nothing to measure: normalisation is part of our crop."""
    if task.stages == ("finish",):
        return None
    name, run = augmentation(m, task.spec, dtype, reference=reference, draws=task.is_recipe)
    base = augmentation(m, task.base, dtype, reference=reference, draws=False)[1] if task.stages == ("colour",) else None
    return Contestant(name, run, sum(len(group.pixels) for group in run().groups), base)


@dataclass
class Row:
    """A task, and all who do it."""

    task: Task
    images: int
    views: int
    sizes: str
    read_bytes: int
    """Of the batch: images, or crops of an operation alone, as bytes; written_bytes: the views in their dtype."""
    written_bytes: int
    contestants: list[Contestant]
    """Ours first."""
    parts: list[Contestant]
    """Of our recipe: drawing the parameters; the crops without colours."""
    absent: dict[str, str]
    """Who does not take part, and why."""


def assemble(task: Task, device: torch.device, dtype: torch.dtype, images: int, others: tuple[str, ...]) -> Row:
    """Everybody who can do the task, warmed up."""
    m = material(task.spec, images, device)
    groups = augmentation(m, task.spec, dtype, reference=False, draws=False)[1]().groups
    views, pixels = sum(len(g.pixels) for g in groups), sum(g.pixels.numel() for g in groups)
    contestants, parts, absent = [], [], {}
    for reference in (False, True):
        slow = reference and device.type == "cpu"
        one = ours(task, m.first(REFERENCE_ON_CPU) if slow else m, dtype, reference=reference)
        if one and one.name not in [c.name for c in contestants]:
            contestants.append(one)
    if task.is_recipe:
        augment = Augmenter(task.spec, device=device, dtype=dtype, seed=SEED)
        crops = augmentation(m, task.base, dtype, reference=False, draws=False)[1]
        parts = [Contestant("draws", lambda: augment.draws(0, m.batch.index), views), Contestant("crops", crops, views)]
    for name in others:
        library = RIVALS[name]
        if library.cpu_only and device.type != "cpu":
            continue
        some = m.first(LOOPED) if library.by_sample else m
        try:
            one = Contestant(name, library.make(some, task.stages, dtype), len(task.spec) * len(some.batch))
            one.warm_up()
            contestants.append(one)
        except (Unfit, ImportError) as error:
            absent[name] = str(error)
        except Exception as error:  # another version of the library, or no memory for it: the others are measured all the same
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    for one in (*contestants, *parts):
        one.warm_up()
    return Row(
        task=task,
        images=images,
        views=views,
        sizes=" + ".join(f"{len(g.pixels) // images}x{g.pixels.shape[-1]}" for g in groups),
        read_bytes=pixels if task.stages in (("colour",), ("finish",)) else m.source_bytes(),
        written_bytes=pixels * dtype.itemsize,
        contestants=contestants,
        parts=parts,
        absent=absent,
    )


def measure(
    tasks: list[Task],
    device: torch.device,
    *,
    images: int,
    seconds: float,
    rounds: int,
    others: tuple[str, ...] = tuple(RIVALS),
    say: Callable[[str], None] = lambda message: None,
) -> list[Row]:
    """All rounds of every task."""
    rows = []
    for number, task in enumerate(tasks, 1):
        say(f"{number} of {len(tasks)}: {task.name}")
        row = assemble(task, device, dtype_on(device), images, others)
        for _ in range(rounds):
            for one in (*row.contestants, *row.parts):
                one.one_round(device, seconds)
        for one in (*row.contestants, *row.parts):  # what they hold is freed
            one.run = one.base = None
        rows.append(row)
    return rows


# ------------------------------------------------------------------------------------------------ the whole bench


def dtype_on(device: torch.device) -> torch.dtype:
    """Of the views: what training takes on CUDA; float32, which all libraries hand out, on a CPU."""
    return torch.float32 if device.type == "cpu" else resolve_dtype("auto", device)


def errors(device: torch.device, images: int) -> dict[str, Error]:
    """`parity` of our renderer on the device; nothing for no images."""
    if images == 0:
        return {}
    augment = Augmenter(center_crop(), device=device, dtype=torch.float32, seed=SEED)
    return parity(augment.render, device, images)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def bench(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    recipes: tuple[str, ...] = ("lewel", "dino"),
    out: Path = OUT,
    seconds: float = 0.05,
    rounds: int = 5,
    images: int = 0,
    parity: int = 200,
    step: bool = True,
) -> None:
    """Views per second of every operation and of whole recipes, next to other libraries and to the memory's bound.

    Args:
        device: Where; auto: CUDA if there is one. A CPU is measured with one thread.
        recipes: Names of fastssl.recipes.RECIPES.
        out: Folder for augment_<device>.json and .png, or the .json file itself.
        seconds: Time of one measurement, in which at least one batch is augmented.
        rounds: Turns that everything takes; medians are reported.
        images: Source images of a batch; 0: 256 on CUDA, 8 on a CPU. Results are given for 512 views.
        parity: Random images for the error against Pillow; 0: leave it out.
        step: Also time a training step of LEWEL's ResNet-50, compiled, and augmentation's share of it (CUDA only).
    """
    if seconds <= 0 or rounds < 1 or images < 0 or parity < 0:
        raise DataError("Nothing would be measured. Give --seconds above 0, --rounds of at least 1, --images and --parity of at least 0.")
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("This torch reaches no CUDA device. Take --device cpu; `make report` says what is missing.")
    where = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    images = images or IMAGES[where.type]
    tasks = [*work.operations(), *work.recipes(recipes)]
    file = report.file(out, where)
    file.parent.mkdir(parents=True, exist_ok=True)
    with one_thread(where):
        rate = copy_rate(where)
        rows = measure(tasks, where, images=images, seconds=seconds, rounds=rounds, say=_say)
        _say("comparing with Pillow")
        found = errors(where, parity)
        share = training_step(where, seconds, rounds) if step else "left out"
        setting = {"rounds": rounds, "seconds": seconds, "images": images, "threads": torch.get_num_threads()}
    command = f"python -m fastssl.bench augment --device {where.type} --recipes {shlex.join(recipes)} --seconds {seconds:g}"
    result = {
        "command": f"{command} --rounds {rounds} --images {images} --parity {parity} --{'' if step else 'no-'}step",
        **report.result(rows, found, share, where, dtype_on(where), rate, setting),
    }
    write(result, file, save_plot)
    print(report.table(result))
    print(f"\n{file}\n{file.with_suffix('.png')}")


def training_step(device: torch.device, seconds: float, rounds: int) -> dict | str:
    """`step_share` of LEWEL's ResNet-50, or why there is none."""
    if device.type == "cpu":
        return "a CPU takes minutes for one"
    try:
        return step_share(PRESETS[STEP_PRESET](), device, seconds=10 * seconds, rounds=rounds, say=_say)
    except RuntimeError as error:  # no memory, no compiler: the rest of the bench has been measured
        return f"{type(error).__name__}: {error}".splitlines()[0]
