"""What does it cost to make W2SSL's montages from the images of all ranks?

Processes of this machine, one GPU each with NCCL where there are enough, else CPUs with gloo, turn random patches into the montages
of two views in three ways, in turns: `gather` as published (float32 patches of all ranks to all ranks, then a choice), `global` the
same permutation with each patch sent only to the rank of its montage, and `rank` montages of a rank's own images.  Time: of the
slowest rank, from a barrier until the montages are there; medians.  Bytes: what arrives at a rank from others.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from math import lcm
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from fastssl.bench.files import write_json
from fastssl.bench.machine import device_name, slug
from fastssl.checkpoint import versions
from fastssl.models.montage import Routes, drawn_rows, tile
from loaders.errors import DataError

OUT = Path("data/bench")
PARTS = 2
"""Strips of an image."""
Way = Literal["gather", "global", "rank"]
WAYS: tuple[Way, ...] = get_args(Way)
_MB = 1e6


# ------------------------------------------------------------------------------------------------ the three ways


def gather(patches: Tensor, rows: Tensor, images: int) -> Tensor:
    """[R / W, 3, h, w] of this rank -> the montages of its `rows` of patch numbers; the float32 patches of all ranks reach every rank."""
    world, share = dist.get_world_size(), len(patches) // PARTS
    mine = patches.float().permute(0, 2, 3, 1).contiguous()
    everything = mine.new_empty(world * len(mine), *mine.shape[1:])
    dist.all_gather_into_tensor(everything, mine)
    part, image = rows // images, rows % images
    return tile(everything.permute(0, 3, 1, 2), image // share * len(mine) + part * share + image % share)


def montages(way: Way, views: list[Tensor], images: int, step: int) -> tuple[list[Tensor], int]:
    """The montages of both views, and the bytes that came to this rank from others for them."""
    rank, world, patch = dist.get_rank(), dist.get_world_size(), views[0][0]
    rows = drawn_rows(PARTS, images, world, seed=0, step=step, within="rank" if way == "rank" else "global")
    if way == "gather":
        own = torch.from_numpy(rows[rank]).to(patch.device)
        return [gather(x, own, images) for x in views], len(views) * (world - 1) * len(views[0]) * patch.numel() * 4
    routes = Routes.of(rows, images, rank, patch.device)
    foreign = 0 if routes.stay else sum(routes.received) - routes.received[rank]
    return [tile(routes.exchange(x), routes.place) for x in views], len(views) * foreign * patch.nbytes


# ------------------------------------------------------------------------------------------------ measured


def turns(rank: int, world: int, folder: str, images: int, size: int, rounds: int) -> None:
    """One rank; rank 0 leaves the medians in `folder`."""
    torch.set_num_threads(1)
    gpus = torch.cuda.device_count() >= world
    device = torch.device("cuda", rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if gpus else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    generator = torch.Generator(device).manual_seed(rank)
    shape = (PARTS * images // world, 3, size, size)
    views = [torch.randn(shape, device=device, generator=generator).bfloat16() for _ in range(2)]
    views = [x.contiguous(memory_format=torch.channels_last) for x in views]
    found = {way: {"ms_rounds": [], "mb_arrived": 0.0} for way in WAYS}
    for step in range(rounds + 1):
        made = {}
        for way in WAYS:
            dist.barrier()
            start = time.perf_counter()
            made[way], arrived = montages(way, views, images, step)
            if gpus:
                torch.cuda.synchronize()
            slowest = torch.tensor([1e3 * (time.perf_counter() - start), arrived / _MB], dtype=torch.float64, device=device)
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
            if step:  # the first is the warm-up
                found[way]["ms_rounds"].append(float(slowest[0]))
                found[way]["mb_arrived"] = max(found[way]["mb_arrived"], float(slowest[1]))
        if not all(torch.equal(a.bfloat16(), b) for a, b in zip(made["gather"], made["global"], strict=True)):
            raise AssertionError("Gathering and sending gave different montages of the same permutation.")
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(world: int, images: int, size: int, rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(turns, (world, folder, images, size, rounds), nprocs=world)
        found = json.loads((Path(folder) / "found.json").read_text())
    ways = {way: {"ms": median(f["ms_rounds"]), **f} for way, f in found.items()}
    return {"ranks": world, "images": images, "ways": ways}


def table(result: dict) -> str:
    """The result for a terminal."""
    lines = [
        f"{result['device']}; two views of {PARTS} patches of {result['size']} px an image, bf16; "
        f"medians of {result['rounds']} alternating rounds",
        "",
        "                    ms of the slowest rank       MB that arrive at a rank",
        "  ranks  images" + f"{'gather':>9}{'global':>9}{'rank':>9}" * 2,
    ]
    for row in result["measured"]:
        cells = "".join(f"{row['ways'][way][key]:9.1f}" for key in ("ms", "mb_arrived") for way in WAYS)
        lines.append(f"{row['ranks']:7}{row['images']:8}{cells}")
    return "\n".join(lines)


def bench(ranks: tuple[int, ...] = (2, 4), images: int = 64, size: int = 112, rounds: int = 5, out: Path = OUT) -> None:
    """Time and traffic of W2SSL's montages: gathered as published, sent where they are needed, and within a rank.

    Args:
        ranks: Numbers of processes to measure.
        images: Images of the global batch.
        size: Side of the square patches in pixels; the published strips are 112 x 112.
        rounds: Turns that all take; medians are reported.
        out: Folder for montage_<device>.json, or the .json file itself.
    """
    if not ranks or min(ranks) < 2 or rounds < 1:
        raise DataError("Nothing would be measured. Give --ranks of at least 2 and --rounds of at least 1.")
    if any(images % w or PARTS * images // w % 4 for w in ranks):
        raise DataError(
            f"{images} images do not fill montages equally on {list(ranks)} ranks. Give --images a multiple of {2 * lcm(*ranks)}."
        )
    where = torch.device("cuda" if torch.cuda.device_count() >= max(ranks) else "cpu")
    result = {
        "command": f"python -m fastssl.bench montage --ranks {' '.join(map(str, ranks))} --images {images} --size {size} --rounds {rounds}",
        "date": time.strftime("%Y-%m-%d"),
        "device": device_name(where),
        "rounds": rounds,
        "size": size,
        "measured": [measure(world, images, size, rounds) for world in ranks],
        "versions": {"python": platform.python_version(), **versions()},
    }
    file = out if out.suffix == ".json" else out / f"montage_{slug(result['device'])}.json"
    write_json(result, file)
    print(table(result))
    print(f"\n{file}")
