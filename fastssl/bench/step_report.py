"""What the step bench found: numbers as JSON, a table, and in one line what binds.  Units are part of every key."""

from __future__ import annotations

import platform
import time
from statistics import median

import numpy as np
import torch

from fastssl.bench.machine import described, device_name
from fastssl.bench.roof import REACHED, Recorded, datasheet
from fastssl.bench.training import Rank
from fastssl.checkpoint import versions
from fastssl.engine import compiles

PHASES = {
    "student_forward": ("student", None),
    "target_forward": ("target", None),
    "heads_and_loss": ("forward", ("student", "target")),
    "backward": ("backward", ("forward",)),
    "communication": ("exchange", ("backward",)),
    "update": ("step", ("exchange",)),
}
"""Parts of the step: a prefix, and what is subtracted from its time.  Alone, a rank has no exchange: there it is the backward pass."""
TITLES = {"augment": "augment (beside the step)", "update": "clip + optimizer + EMA"}
_NEAR = 0.85
"""From this share of the time on, a roof binds."""
IDLE = 0.1
"""From this share of the time on in which no kernel runs, the host's launches bind."""
_MIB = 2**20

Times = dict[str, list[list[float]]]
"""ms of every call of each prefix, by round."""


# ------------------------------------------------------------------------------------------------ numbers


def phases(times: Times) -> dict[str, list[float]]:
    """ms of each part in each round; a difference that noise makes negative is 0.  The step as a whole where no parts were timed."""
    at = {name: [median(calls) for calls in rounds] for name, rounds in times.items()}
    if "backward" not in at:
        return at
    at.setdefault("exchange", at["backward"])
    parts = {"augment": at["augment"]}
    for part, (whole, less) in PHASES.items():
        parts[part] = [max(0.0, t - sum(at[name][r] for name in less or ())) for r, t in enumerate(at[whole])]
    return parts


def numbers(rank: Rank, recorded: Recorded, times: Times, *, first_step_s: float, held: int, peak: int, counts: dict) -> dict:
    """All of it that does not ask how fast the device could be.  held: bytes between steps; peak: in a step, those among them."""
    state, rounds = rank.state, phases(times)
    steps = [ms for calls in times["step"] for ms in calls]
    step_ms, augment_ms, batch = median(steps), median(rounds["augment"]), rank.batch
    moved = recorded.moved()
    return {
        "preset": state.cfg.preset,
        "method": state.cfg.method.name,
        "arch": state.cfg.model.arch,
        "norm": state.cfg.model.norm,
        "batch": batch,
        "views": rank.views_per_image,
        "sizes": " + ".join(f"{len(g.views)}x{g.pixels.shape[-1]}" for g in rank.views.groups),
        "dtype": str(state.dtype).removeprefix("torch."),
        "compiled": compiles(state.cfg, state.dist.device),
        "cuda_graphs": state.cfg.efficiency.cuda_graphs,
        "channels_last": state.cfg.efficiency.channels_last,
        "step_ms": step_ms,
        "step_ms_rounds": [median(calls) for calls in times["step"]],
        **{f"step_ms_p{p}": float(np.percentile(steps, p)) for p in (5, 95, 99)},
        "images_per_s": 1e3 * batch / step_ms,
        "views_per_s": 1e3 * batch * rank.views_per_image / step_ms,
        "images_per_s_all_ranks": 1e3 * batch * state.dist.world / step_ms,
        "images_per_s_with_augment": 1e3 * batch / (step_ms + augment_ms),
        "phases_ms": {part: median(ms) for part, ms in rounds.items()},
        "phases_ms_rounds": rounds,
        "idle_ms": max(0.0, step_ms - sum(counts["kernel_ms"].values())) if "kernel_ms" in counts else None,
        "first_step_s": first_step_s,
        "held_mib": held / _MIB,
        "peak_mib": peak / _MIB,
        "gflop_per_image": recorded.flops / batch / 1e9,
        "moved_mb_per_image": None if moved is None else moved * state.dtype.itemsize / batch / 1e6,
        **counts,
        **left_out(rank, recorded),
    }


def left_out(rank: Rank, recorded: Recorded) -> dict:
    """What ranks exchange within a step besides gradients and a rank alone does not: SyncBatchNorm's statistics, counted, and samples of
    each other (losses over the global batch, shuffled BatchNorm).  Nothing where several ranks were measured."""
    alone = rank.state.dist.world == 1
    samples = rank.state.method.couples_batch or rank.state.cfg.model.norm == "shuffle"
    return {"norm_collectives_left_out": alone * recorded.norm_collectives, "samples_left_out": alone and samples}


def result(found: dict, device: torch.device, *, gemm: float, copy: float, setting: dict) -> dict:
    """All that is written to JSON but the command.  gemm: FLOP/s of a large product here; copy: bytes/s of a long copy."""
    step_s, flops = found["step_ms"] / 1e3, 1e9 * found["gflop_per_image"] * found["batch"]
    peak = datasheet(device_name(device)) if found["dtype"] != "float32" else None
    bandwidth = REACHED * 1e12 * peak.tb_per_s if peak else copy
    moved = found["moved_mb_per_image"]
    memory_ms = None if moved is None else 1e9 * moved * found["batch"] / bandwidth
    compute_ms = 1e3 * flops / (1e12 * peak.tflop_per_s if peak else gemm)
    values = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(device),
        "device_type": device.type,
        **described(device),
        **setting,
        **found,
        "tflop_per_s": flops / step_s / 1e12,
        "gemm_tflop_per_s": gemm / 1e12,
        "copy_gb_per_s": copy / 1e9,
        "datasheet": peak._asdict() if peak else None,
        "mfu": flops / step_s / 1e12 / peak.tflop_per_s if peak else None,
        "share_of_gemm": flops / step_s / gemm,
        "compute_roof_ms": compute_ms,
        "memory_roof_ms": memory_ms,
        "share_of_compute_roof": compute_ms / found["step_ms"],
        "share_of_memory_roof": None if memory_ms is None else memory_ms / found["step_ms"],
    }
    return {**values, "binds": binds(values), "versions": {"python": platform.python_version(), **versions()}}


def binds(r: dict) -> str:
    """What the step is bound by, and its three largest costs."""
    memory = r["share_of_memory_roof"]
    if host_binds(r):
        what = f"launching from the host (nothing runs for {r['idle_ms']:.1f} of {r['step_ms']:.1f} ms)"
    elif memory and memory >= _NEAR:
        what = f"memory ({memory:.0%} of its roof)"
    elif r["share_of_compute_roof"] >= _NEAR:
        what = f"arithmetic ({r['share_of_compute_roof']:.0%} of its roof)"
    else:
        what = f"no roof: {r['share_of_compute_roof']:.0%} of the compute roof" + (f", {memory:.0%} of the memory roof" if memory else "")
    return f"{what}; most of the time in {largest}" if (largest := costs(r)) else what


def host_binds(r: dict) -> bool:
    """By the device's idle time: how long the host takes is no measure, since it has to wait while 1,024 launches are queued."""
    return r["idle_ms"] is not None and r["idle_ms"] >= IDLE * r["step_ms"]


def costs(r: dict) -> str:
    """The three largest, with their shares of the step: by kinds of kernels where they are known, else by the parts that were timed."""
    ms = r.get("kernel_ms") or {name: ms for name, ms in r["phases_ms"].items() if name not in ("augment", "step")}
    three = sorted(ms.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{title(name)} {part / r['step_ms']:.0%}" for name, part in three)


def title(part: str) -> str:
    return TITLES.get(part, part.replace("_", " "))


# ------------------------------------------------------------------------------------------------ the table


def table(r: dict) -> str:
    """The result for a terminal."""
    cpu = f", {r['threads']} thread{'s' * (r['threads'] > 1)}" + (", CPU time" if r["ranks"] == 1 else "")
    where = r["device"] + (cpu if r["device_type"] == "cpu" else "")
    how = f"{r['dtype']}{', compiled' * r['compiled']}{', CUDA graphs' * r['cuda_graphs']}{', channels-last' * r['channels_last']}"
    ranks = f"{r['ranks']} ranks x " if r["ranks"] > 1 else ""
    lines = [
        f"{where}; {r['preset']}: {r['arch']}, {ranks}{r['batch']} images x ({r['sizes']}), {how}",
        f"{r['steps']} steps in {r['rounds']} alternating rounds, after {r['warmup']}; the first took {r['first_step_s']:.1f} s",
        "",
        f"  step {r['step_ms']:12,.2f} ms   5 % {r['step_ms_p5']:,.2f}, 95 % {r['step_ms_p95']:,.2f}, 99 % {r['step_ms_p99']:,.2f}",
    ]
    for part, ms in r["phases_ms"].items():
        if part != "step":
            lines.append(f"  {title(part):27}{ms:12,.2f} ms{ms / r['step_ms']:8.1%}")
    rates = f"{r['images_per_s']:,.1f} images/s, {r['views_per_s']:,.1f} views/s a rank"
    lines += [
        "",
        f"{rates}; {r['images_per_s_with_augment']:,.1f} images/s when augmentation comes on top",
        f"Memory: {r['peak_mib']:,.0f} MiB at most, {r['held_mib']:,.0f} of them between steps.",
        f"Launched: {_launched(r)}.",
        *_kernels(r),
        *_roofs(r),
        *_alone(r),
        f"What binds: {r['binds']}.",
    ]
    return "\n".join(lines)


def _launched(r: dict) -> str:
    kernels = f"{r['kernels']:,} kernels and copies, {r['host_syncs']} host synchronisations, " if r["kernels"] is not None else ""
    graphs = f", {r['graphs']} graphs, {r['graph_breaks']} breaks, {r['recompiles']} compiled after the warm-up" if r["compiled"] else ""
    return f"{kernels}{r['operators']:,} operators{graphs}"


def _kernels(r: dict) -> list[str]:
    if "kernel_ms" not in r:
        return []
    kinds = ", ".join(f"{name} {ms:,.2f}" for name, ms in r["kernel_ms"].items())
    return [f"Kernels, ms: {kinds}; nothing runs for {r['idle_ms']:,.2f}."]


def _alone(r: dict) -> list[str]:
    exchanges = [f"{n} exchanges of SyncBatchNorm"] if (n := r["norm_collectives_left_out"]) else []
    exchanges += ["the samples of other ranks, which the method compares or mixes"] if r["samples_left_out"] else []
    return [f"One rank: without {' and '.join(exchanges)}."] if exchanges else []


def _roofs(r: dict) -> list[str]:
    if r["datasheet"]:
        compute, memory = f"{r['datasheet']['tflop_per_s']:g} TFLOP/s (datasheet)", f"{REACHED:g} x {r['datasheet']['tb_per_s']:g} TB/s"
    else:
        compute, memory = f"{r['gemm_tflop_per_s']:.3g} TFLOP/s (a large product here)", f"{r['copy_gb_per_s']:.3g} GB/s (a copy here)"
    share = f"{r['mfu']:.1%} MFU" if r["mfu"] is not None else f"{r['share_of_gemm']:.1%} of it"
    flops = f"{r['gflop_per_image']:,.1f} GFLOP an image, {r['tflop_per_s']:.3g} TFLOP/s"
    lines = [f"Compute roof: {flops}: {r['compute_roof_ms']:,.2f} ms at {compute}; {share}."]
    if r["memory_roof_ms"] is not None:
        moved = f"{r['moved_mb_per_image']:,.0f} MB an image (roof.Call.moved): {r['memory_roof_ms']:,.2f} ms at {memory}"
        lines.append(f"Memory roof of the backbones: {moved}; the step reaches {r['share_of_memory_roof']:.1%} of it.")
    return lines
