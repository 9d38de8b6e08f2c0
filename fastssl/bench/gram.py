"""What does SFRIK's distance to the uniform law cost, forward and backward, next to the dense formula and autograd?

`dense` is the formula as it stands: T = Z Z^T, phi(T), mean, and autograd.  `ours` is fastssl.losses.mmd on the same unit rows.
Time: both take turns, round after round; medians.  Peak memory: what one forward and backward pass needs beyond its input, the
input's gradient included: on CUDA the allocator's peak, on a CPU that of the allocations which torch's profiler records, those
inside operations included.  Then, calculated, what each rank computes, exchanges and holds when there are several.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.bench.augment_clock import clock
from fastssl.bench.files import write_json
from fastssl.bench.machine import device_name, one_thread, peak_bytes, slug
from fastssl.checkpoint import versions
from fastssl.losses.mmd import mmd_uniform
from loaders.errors import DataError

OUT = Path("data/bench")
WEIGHTS = (1.0, 40.0, 40.0)
"""The published kernel."""
PUBLISHED = {"rows": 2048, "dim": 32768, "world": 8}
"""Batch, dimension and ranks of the published run on ImageNet."""
_MIB, _TERA = 2**20, 1e12


def dense(z: Tensor) -> Tensor:
    """Mean of phi over the Gram matrix, for L = 3, as in section 2 of methods/sfrik.md."""
    t, c, d = z @ z.T, 1 / (z.shape[1] - 1), 3 / (z.shape[1] - 1)
    b1, b2, b3 = WEIGHTS
    return (b1 * t + b2 * ((1 + c) * t.square() - c) + b3 * ((1 + d) * t.pow(3) - d * t)).mean()


def ours(z: Tensor) -> Tensor:
    return mmd_uniform(z, WEIGHTS)


LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"dense": dense, "ours": ours}


# ------------------------------------------------------------------------------------------------ measured


def unit_rows(rows: int, dim: int, device: torch.device) -> Tensor:
    z = torch.randn(rows, dim, device=device, generator=torch.Generator(device).manual_seed(0))
    return F.normalize(z, dim=1, out=z).requires_grad_()


def forward_backward(loss: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """The gradient."""
    return torch.autograd.grad(loss(z), z)[0]


def measure(rows: int, dim: int, rounds: int, device: torch.device) -> dict:
    """Time and peak memory of both, and how far their gradients are apart along the sphere."""
    z = unit_rows(rows, dim, device)
    ms: dict[str, list[float]] = {name: [] for name in LOSSES}
    tangential = {}
    for name, loss in LOSSES.items():  # also the warm-up
        grad = forward_backward(loss, z)
        tangential[name] = grad - (grad * z.detach()).sum(1, keepdim=True) * z.detach()
    difference = float((tangential["ours"] - tangential["dense"]).norm() / tangential["dense"].norm())
    del tangential, grad
    peak = {name: peak_bytes(lambda loss=loss: forward_backward(loss, z), device) / _MIB for name, loss in LOSSES.items()}
    for _ in range(rounds):
        for name, loss in LOSSES.items():
            ms[name].append(clock(lambda loss=loss: forward_backward(loss, z), device, 0.0).ms)
    return {
        "rows": rows,
        "dim": dim,
        "gradients_apart": difference,
        # within a round: the machine's drift hits both
        "time_of_dense_to_ours": median(theirs / our for theirs, our in zip(ms["dense"], ms["ours"], strict=True)),
        "ms": {name: median(times) for name, times in ms.items()},
        "ms_rounds": ms,
        "peak_mib": peak,
    }


# ------------------------------------------------------------------------------------------------ calculated


def calculated(rows: int, dim: int, world: int) -> dict[str, dict[str, float]]:
    """Of one view, forward and backward, for each rank; rows: of the global batch.

    dense, as published: every rank gathers fp32 rows, computes the whole matrix in one product and its gradient in two, and the
    gather's backward pass all-reduces the gradient of all rows.  ours: two products of the rank's rows with all, rows in bf16.
    exchanged: bytes that a rank sends, with rings.  held: all rows and their gradient; ours, all rows, the rank's in bf16, and
    its gradient.
    """
    own, everything, sent = rows * dim / world, rows * dim, (world - 1) / world
    return {
        "dense": {
            "tflop": 3 * 2 * rows * everything / _TERA,
            "exchanged_mib": (4 + 2 * 4) * sent * everything / _MIB,
            "held_mib": (4 + 4) * everything / _MIB,
        },
        "ours": {
            "tflop": 2 * 2 * rows * own / _TERA,
            "exchanged_mib": 2 * sent * everything / _MIB,
            "held_mib": (2 * everything + (2 + 4) * own) / _MIB,
        },
    }


# ------------------------------------------------------------------------------------------------ the whole bench


def table(result: dict) -> str:
    """The result for a terminal."""
    threads = ", 1 thread, CPU time" if result["device_type"] == "cpu" else ""
    lines = [
        f"{result['device']}{threads}; fp32; medians of {result['rounds']} alternating rounds",
        "",
        "forward + backward of one view            ms              peak MiB    gradients",
        "     N       q      dense     ours   ratio     dense     ours  apart by",
    ]
    for row in result["measured"]:
        ms, peak = row["ms"], row["peak_mib"]
        lines.append(
            f"{row['rows']:6}{row['dim']:8}{ms['dense']:11,.0f}{ms['ours']:9,.0f}{row['time_of_dense_to_ours']:8.2f}"
            f"{peak['dense']:10,.0f}{peak['ours']:9,.0f}{row['gradients_apart']:10.1e}"
        )
    lines += [
        "",
        "calculated, per rank and view              TFLOP            MiB exchanged          MiB held",
        "     N       q   W      dense     ours     dense     ours     dense     ours",
    ]
    for row in result["calculated"]:
        cells = "".join(
            f"{row['dense'][key]:{width}{form}}{row['ours'][key]:9{form}}"
            for key, width, form in (("tflop", 11, ".3f"), ("exchanged_mib", 10, ",.0f"), ("held_mib", 10, ",.0f"))
        )
        lines.append(f"{row['rows']:6}{row['dim']:8}{row['world']:4}{cells}")
    return "\n".join(lines)


def bench(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    rows: tuple[int, ...] = (1024, 2048),
    dim: int = 8192,
    rounds: int = 3,
    out: Path = OUT,
) -> None:
    """Time and peak memory of SFRIK's MMD, forward and backward: the dense formula with autograd, and ours.

    Args:
        device: Where; auto: CUDA if there is one. A CPU is measured with one thread.
        rows: Batches N to measure.
        dim: Dimension q of the embeddings.
        rounds: Turns that both take; medians are reported.
        out: Folder for gram_<device>.json, or the .json file itself.
    """
    if not rows or min(rows) < 1 or dim < 2 or rounds < 1:
        raise DataError("Nothing would be measured. Give --rows and --rounds of at least 1 and --dim of at least 2.")
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("This torch reaches no CUDA device. Take --device cpu; `make report` says what is missing.")
    where = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    with one_thread(where):
        measured = [measure(n, dim, rounds, where) for n in rows]
    large = ({**PUBLISHED, "rows": n} for n in (PUBLISHED["rows"], 2 * PUBLISHED["rows"]))
    result = {
        "command": f"python -m fastssl.bench gram --device {where.type} --rows {' '.join(map(str, rows))} --dim {dim} --rounds {rounds}",
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(where),
        "device_type": where.type,
        "rounds": rounds,
        "measured": measured,
        "calculated": [{**size, **calculated(**size)} for size in large],
        "versions": {"python": platform.python_version(), **versions()},
    }
    file = out if out.suffix == ".json" else out / f"gram_{slug(result['device'])}.json"
    write_json(result, file)
    print(table(result))
    print(f"\n{file}")
