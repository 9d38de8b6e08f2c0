"""What does exact k-NN search cost as banks and queries grow, and what would ImageNet take on this device?

Measured: eval.neighbours.search on random features, time and peak of working memory at growing sizes.  Projected: time grows with
bank x queries, so the cost of a pair at the largest size measured times the pairs of 1,281,167 images against 50,000; memory is
calculated.  The forward passes that make the features come on top; `python -m eval.extract` keeps them.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from eval.features import Bank
from eval.neighbours import CHUNK, TILE, search
from fastssl.bench.files import write_json
from fastssl.bench.machine import device_name, one_thread, peak_bytes, slug
from fastssl.checkpoint import versions
from fastssl.distributed import Dist
from loaders.errors import DataError

OUT = Path("data/bench")
IMAGENET = {"bank": 1_281_167, "queries": 50_000}
K = 200
"""Of the published protocols the most."""
_MIB, _GIB = 2**20, 2**30


def bank_of(rows: int, dim: int, device: torch.device) -> Bank:
    """Random features on the device, drawn on the host."""
    features = torch.randn(rows, dim, generator=torch.Generator().manual_seed(rows))
    labels, index = torch.arange(rows) % 1000, torch.arange(rows)
    return Bank(*(t.to(device) for t in (features, labels, index)))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """CUDA: wall time of the device.  CPU: processor time of this process, which other processes do not stretch much."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for _ in range(2 if device.type == "cuda" else 1):  # the first call on a GPU also loads its libraries
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return clock() - start


def measure(bank: int, queries: int, dim: int, device: torch.device) -> dict[str, float]:
    where, asked, alone = bank_of(bank, dim, device), bank_of(queries, dim, device), Dist(0, 1, 0, 1, device)

    def run() -> None:
        search(where, asked, k=K, dist=alone)

    took = seconds(run, device)
    return {
        "bank": bank,
        "queries": queries,
        "seconds": took,
        "ns_per_pair": 1e9 * took / (bank * queries),
        "working_mib": peak_bytes(run, device) / _MIB,
        "working_mib_calculated": working_bytes(bank, queries, dim) / _MIB,
    }


def working_bytes(bank: int, queries: int, dim: int) -> int:
    """Of one chunk of queries against one tile of the bank, which is all that is held beside the features.

    The most is either the tile while it is put on the grid (28 bytes a number: float32, float64, its squares and their first sums), or
    the tile on the grid (12) with the similarities (8 each) and 2 k candidates a query, twice and sorted (150 bytes for each of k).
    It stops growing at CHUNK queries and TILE rows.
    """
    q, n = min(queries, CHUNK), min(bank, TILE)
    return 8 * q * dim + max(28 * n * dim, 12 * n * dim + 8 * q * n + 150 * q * min(K, n))


def projected(measured: dict, dim: int, world: int) -> dict[str, float]:
    """ImageNet on `world` such devices; each visits all queries with its part of the bank."""
    bank, queries = IMAGENET["bank"], IMAGENET["queries"]
    return {
        "world": world,
        "seconds": 1e-9 * measured["ns_per_pair"] * bank * queries / world,
        "features_gib_per_rank": 4 * (bank + queries) * dim / world / _GIB,
        "working_gib_per_rank": working_bytes(bank, queries, dim) / _GIB,
    }


def table(result: dict) -> str:
    lines = [
        f"k-NN search, {result['dim']} features, k = {K}, {result['device']}",
        "",
        "| bank | queries | s | ns / pair | working MiB, measured | calculated |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["measured"]:
        lines.append(
            f"| {row['bank']:,} | {row['queries']:,} | {row['seconds']:.2f} | {row['ns_per_pair']:.2f} | {row['working_mib']:.0f} | "
            f"{row['working_mib_calculated']:.0f} |"
        )
    lines += ["", f"Projected, not run: {IMAGENET['bank']:,} against {IMAGENET['queries']:,}", ""]
    for row in result["projected"]:
        lines.append(
            f"{row['world']} x: {row['seconds'] / 60:,.1f} min; features {row['features_gib_per_rank']:.1f} GiB and working memory "
            f"{row['working_gib_per_rank']:.1f} GiB a rank"
        )
    return "\n".join(lines)


def bench(
    device: Literal["auto", "cpu", "cuda"] = "auto",
    bank: tuple[int, ...] = (1000, 2000, 4000),
    queries: int = 500,
    dim: int = 2048,
    out: Path = OUT,
) -> None:
    """Time and memory of exact k-NN search at growing sizes, and a projection to ImageNet.

    Args:
        device: Where; auto: CUDA if there is one. A CPU is measured with one thread.
        bank: Sizes of the bank to measure.
        queries: Queries.
        dim: Width of the features.
        out: Folder for knn_<device>.json, or the .json file itself.
    """
    if not bank or min(*bank, queries, dim) < 1:
        raise DataError("Nothing would be measured. Give --bank, --queries and --dim of at least 1.")
    if device == "cuda" and not torch.cuda.is_available():
        raise DataError("This torch reaches no CUDA device. Take --device cpu; `make report` says what is missing.")
    where = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    with one_thread(where):
        measured = [measure(n, queries, dim, where) for n in sorted(bank)]
    result = {
        "command": f"python -m fastssl.bench knn --device {where.type} --bank {' '.join(map(str, bank))} --queries {queries} --dim {dim}",
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(where),
        "device_type": where.type,
        "dim": dim,
        "measured": measured,
        "projected": [projected(measured[-1], dim, world) for world in (1, 8)],
        "versions": {"python": platform.python_version(), **versions()},
    }
    file = out if out.suffix == ".json" else out / f"knn_{slug(result['device'])}.json"
    write_json(result, file)
    print(table(result))
    print(f"\n{file}")
