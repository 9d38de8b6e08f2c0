"""What does a training step cost, part by part, and how far is that from what the device can do?

A preset's whole step, the engine's own, on random images that stay on the device.  Its parts are told apart by what longer and
longer prefixes of it take, round after round, so that the step itself is never interrupted:

    student, target forward   the passes of the backbones alone, on the inputs that the method gave them (compiled if the step is)
    heads and loss            the whole forward pass, less the two
    backward                  forward and backward without an exchange of gradients, less the forward pass
    communication             the same with the exchange, less that: what is not hidden behind the backward pass
    update                    the whole step, less that: clipping, optimizer, moving averages, centres and queues
    augment                   the batch's views from decoded images, beside the step

One process, or torchrun: the slowest rank counts.  A CPU has one thread and is measured by its own time; several ranks of CPUs by
the clock on the wall, since they wait for each other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Literal

import torch
from torch._dynamo.utils import counters

from fastssl import cli
from fastssl.bench import step_report
from fastssl.bench.augment_clock import copy_rate, samples
from fastssl.bench.augment_work import Run
from fastssl.bench.files import write
from fastssl.bench.kernels import launches
from fastssl.bench.machine import clocks, one_thread, peak_bytes
from fastssl.bench.roof import Call, Recorded, gemm_rate, record
from fastssl.bench.step_plot import save_plot
from fastssl.bench.step_report import Times
from fastssl.bench.training import Rank, collector_resting, named, one_rank, per_rank
from fastssl.config import RunConfig
from fastssl.distributed import Dist, session
from fastssl.engine import begin_pass, compile_mode, compiles, forward_backward, train_step
from fastssl.precision import autocast
from loaders.errors import DataError

OUT = Path("data/bench")
WARM_UP, STEPS = {"cuda": 50, "cpu": 1}, {"cuda": 200, "cpu": 5}
CAPTURE = 3
"""Steps after the first, which runs a graph's kernels one by one, until all are captured; of each number of hidden patches."""


# ------------------------------------------------------------------------------------------------ what is timed


def whole(rank: Rank) -> dict[str, Run]:
    turns = cycle(rank.turns)
    return {"augment": lambda: rank.augment(rank.images), "step": lambda: train_step(rank.state, [next(turns)])}


def prefixes(rank: Rank, recorded: Recorded) -> dict[str, Run]:
    """What is timed, from the shortest part to the whole step."""
    state, views = rank.state, rank.views
    sched, alone = state.schedules.at(state.step), replace(state, model=state.method)  # without DDP
    passes: dict[int, Callable] = {}
    for call in (*recorded.student, *recorded.target):
        compiled = compiles(state.cfg, state.dist.device)
        passes.setdefault(
            id(call.module), torch.compile(call.module, dynamic=False, mode=compile_mode(state.cfg)) if compiled else call.module
        )

    def replay(calls: list[Call]) -> None:
        with autocast(state.dist.device, state.dtype):
            for call in calls:
                begin_pass(state)
                with torch.set_grad_enabled(call.grad):
                    passes[id(call.module)](*call.args, **call.kwargs)

    def forward() -> None:
        begin_pass(state)
        with autocast(state.dist.device, state.dtype):
            state.method(state.method.arrange(views, sched), sched)

    def backward(which) -> None:
        forward_backward(which, iter([views]), sched)
        state.optimizer.zero_grad(set_to_none=True)

    runs = whole(rank) | {
        "student": lambda: replay(recorded.student),
        "target": lambda: replay(recorded.target),
        "forward": forward,
        "backward": lambda: backward(alone),
    }
    if state.dist.world > 1:
        runs["exchange"] = lambda: backward(state)
    return runs


def measure(runs: dict[str, Run], dist: Dist, *, rounds: int, steps: int) -> Times:
    """All take turns; of each call the time of the slowest rank."""
    now = time.process_time if dist.world == 1 else time.perf_counter
    times: Times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            mine = samples(run, dist.device, max(1, steps // rounds), now)
            times[name].append([max(calls) for calls in zip(*dist.gather_objects(mine), strict=True)])
    return times


# ------------------------------------------------------------------------------------------------ what is counted


def held_bytes(rank: Rank) -> int:
    """Weights, buffers and the optimizer's state: what lies there between steps."""
    state = rank.state
    tensors = [*state.method.parameters(), *state.method.buffers()]
    tensors += [t for values in state.optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


# ------------------------------------------------------------------------------------------------ the whole bench


def measured(
    cfg: RunConfig, dist: Dist, *, batch: int, parts: bool, rounds: int, steps: int, warmup: int, say: Callable[[str], None]
) -> dict:
    """Everything about one rank's step but the device's rates."""
    device = dist.device
    say(f"building {cfg.preset}, {batch} images")
    rank = one_rank(cfg, dist, batch)

    step, replayed = whole(rank)["step"], cfg.efficiency.cuda_graphs
    counters.clear()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    first_step_s = time.perf_counter() - start
    of_step = {"graphs": graphs(), "graph_breaks": sum(counters["graph_break"].values())}
    say("warming up")
    if replayed:
        besides = torch.cuda.memory_allocated() - held_bytes(rank)  # images and views
        torch.cuda.reset_peak_memory_stats()
    for _ in range(max(warmup, CAPTURE * len(rank.turns)) if replayed else warmup):
        step()
    # A replay allocates nothing: what a graph needs was allocated when it was captured, and stays its own.
    peak = torch.cuda.max_memory_allocated() - besides if replayed else None
    recorded = record(rank, inputs=parts)
    runs = prefixes(rank, recorded) if parts else whole(rank)
    for run in runs.values():
        for _ in range(min(warmup, 3)):
            run()
    before = graphs()
    say("measuring")
    with collector_resting(rank.state):
        times = measure(runs, dist, rounds=rounds, steps=steps)
    recompiles = graphs() - before
    step()  # not waited for
    at_work = clocks(device)
    say("counting")
    counted = launches(step, device)
    if peak is None:
        peak = held_bytes(rank) + peak_bytes(step, device)
    return step_report.numbers(
        rank,
        recorded,
        times,
        first_step_s=first_step_s,
        held=held_bytes(rank),
        peak=peak,
        counts={**counted, **of_step, "recompiles": recompiles, "clocks": at_work},
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def bench(
    preset: str,
    batch: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    compile: Literal["auto", "on", "off"] = "auto",
    cuda_graphs: bool = False,
    parts: bool = True,
    rounds: int = 5,
    steps: int = 0,
    warmup: int = 0,
    out: Path = OUT,
) -> None:
    """Time, memory, FLOPs and launches of a preset's training step, part by part, next to what the device can do.

    Args:
        preset: Name of fastssl.presets.PRESETS.
        batch: Images of a rank; 0: as published, where that is not known the global batch over 8 ranks; on a CPU at most 8.
        device: Where; auto: CUDA if there is one. A CPU has one thread.
        dtype: As --efficiency.dtype of train.py; compile and cuda-graphs alike.
        parts: Also time the parts; without them nothing is compiled but the step.
        rounds: Turns that the step and its prefixes take; differences are taken within a round, and their medians reported.
        steps: Timed calls of each, over all rounds; 0: 200 on CUDA, 5 on a CPU.
        warmup: Steps before; 0: 50 on CUDA, 1 on a CPU.
        out: Folder for step_<preset>.json and .png, or the .json file itself.
    """
    cfg = named(preset)
    if rounds < 1 or min(batch, steps, warmup) < 0:
        raise DataError("Nothing would be measured. Give --rounds of at least 1, --batch, --steps and --warmup of at least 0.")
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("This torch reaches no CUDA device. Take --device cpu; `make report` says what is missing.")
    cfg = replace(cfg, efficiency=replace(cfg.efficiency, dtype=dtype, compile=compile, cuda_graphs=cuda_graphs))
    with session(device) as dist, one_thread(dist.device):
        where = dist.device
        batch = batch or per_rank(cfg, where)
        cli.check(replace(cfg, train=replace(cfg.train, global_batch_size=batch * dist.world)), dist.world)
        steps, warmup = steps or STEPS[where.type], warmup or WARM_UP[where.type]
        say = _say if dist.is_main else lambda message: None
        found = measured(cfg, dist, batch=batch, parts=parts, rounds=rounds, steps=steps, warmup=warmup, say=say)
        if not dist.is_main:
            return
        flags = f"--preset {preset} --batch {batch} --device {where.type} --dtype {dtype} --compile {compile}"
        flags += " --cuda-graphs" * cuda_graphs + " --no-parts" * (not parts)
        result = step_report.result(
            found,
            where,
            gemm=gemm_rate(where, getattr(torch, found["dtype"])),
            copy=copy_rate(where),
            setting={"rounds": rounds, "steps": steps, "warmup": warmup, "threads": torch.get_num_threads(), "ranks": dist.world},
        )
        command = f"python -m fastssl.bench step {flags} --rounds {rounds} --steps {steps} --warmup {warmup}"
        result = {"command": command, **result}
        file = out if out.suffix == ".json" else out / f"step_{preset}.json"
        write(result, file, save_plot)
        print(step_report.table(result))
        print(f"\n{file}\n{file.with_suffix('.png')}")
