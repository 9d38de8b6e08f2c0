"""Every protocol that fits a backbone, on one data set, in fewer epochs:  python -m eval.all --checkpoint FILE --data DIR

The table shows what was shortened: its numbers compare backbones and protocols with each other, not with published ones.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from eval import finetune, knn, linear, logreg, semi, tuning_command
from eval.knn import check_writable
from eval.labels import checked_classes
from eval.linear_protocols import LINEAR_PROTOCOLS
from eval.protocols import KNN_PROTOCOLS, LogisticRegression, write_result
from eval.tuning_protocols import TUNING_PROTOCOLS, TuningProtocol
from fastssl.checkpoint import CheckpointError
from fastssl.config import ConfigError
from fastssl.distributed import Dist, session
from fastssl.models.weights import load_backbone
from fastssl.recipes import center_crop
from loaders.build import build_eval_loader
from loaders.errors import DataError

LEAST_STEPS, SMALLEST_BATCH = 16, 8
"""Batches are made smaller until an epoch has so many steps, but not smaller than that."""
IMAGENET_CLASSES = 1000
"""With so many classes the data are taken for ImageNet, whose lists of 1 % and 10 % exist."""
REPORTED = ("top1", "top1_last", "knn20_top1")
"""The number of a result, by the first name that it has: of linear and end-to-end protocols, of logistic regression, of k-NN."""
FEATURES = "features.eval-all"
"""Folder of the features that k-NN and logistic regression share; it is gone afterwards."""
NOT_COMPARED = ("transfer/mocov3-cifar100", "transfer/mocov3-flowers", "transfer/mocov3-pets")
"""transfer/mocov3 with the values of other data sets."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """All protocols on one backbone, and a table of their numbers."""

    checkpoint: str
    """A run's checkpoint_last.pt or backbone.safetensors, other projects' files, or random:ARCH[:SEED]."""
    data: str = "data/imagenet"
    """Folder with train and val: .beton files or class folders."""
    epochs: int = 5
    """At most so many, where the backbone sees every image in every epoch."""
    only: tuple[str, ...] = ()
    """Names of protocols, or of families: linear, semi; default: all that fit."""
    network: Literal["auto", "online", "target"] = "auto"
    """Which network of a training checkpoint; auto: the one its method is evaluated by."""
    resize: int | None = None
    """Shorter side of validation images before the centre crop, pixels; default: each protocol's."""
    crop: int | None = None
    """Side of all crops, pixels; default: each protocol's."""
    loader: Literal["auto", "ffcv", "dali", "torchvision", "torchvision_cuda", "folder"] = "auto"
    """Decoder, as in train.py."""
    workers: int = 0
    """Decoder threads per rank; 0: the cores divided by the ranks."""
    out: Path | None = None
    """Folder of the results; default: beside the checkpoint."""


@dataclass
class Row:
    """A line of the table."""

    protocol: str
    setting: str
    """What differs from the published settings (of k-NN also k), or why there is no number."""
    top1: float | None
    """Percent."""
    seconds: float


def smaller_batch(batch: int, images: int) -> int:
    """`batch`, or the largest power of two that makes LEAST_STEPS steps of so many images."""
    return min(batch, max(SMALLEST_BATCH, 1 << max(images // LEAST_STEPS, 1).bit_length() - 1))


def part_of_labels(protocol: TuningProtocol, labels: np.ndarray, num_classes: int) -> tuple[str, int]:
    """The subset that stands for the protocol's on these data, "" for its own, and the images of it."""
    share = {"1percent": 0.01, "10percent": 0.1, "": 1.0}[protocol.subset]
    if not protocol.subset or num_classes == IMAGENET_CLASSES:
        return "", round(share * len(labels))
    counts = np.bincount(labels, minlength=num_classes)
    each = min(int(counts.min()), max(1, round(share * len(labels) / num_classes)))
    return f"random:{each}", each * num_classes


def commands(args: Args, folder: Path, labels: np.ndarray, num_classes: int, *, vit: bool) -> dict[str, Callable[[Dist], None]]:
    """What writes folder/NAME.json, by the name of the protocol."""
    common = {n: getattr(args, n) for n in ("checkpoint", "data", "network", "resize", "crop", "loader", "workers")}

    def place(name: str) -> dict[str, object]:
        return common | {"out": file_of(folder, name)}

    found: dict[str, Callable[[Dist], None]] = {}
    for name, protocol in KNN_PROTOCOLS.items():
        k = tuple(n for n in protocol.k if n <= len(labels))
        kept = {"features": folder / FEATURES} if protocol.interpolation == LogisticRegression().interpolation else {}
        found[name] = partial(knn.run, knn.Args(**place(name), protocol=name, k=k, **kept))
    found["logreg/sfrik"] = partial(logreg.run, logreg.Args(**place("logreg/sfrik"), features=folder / FEATURES))
    for name, protocol in LINEAR_PROTOCOLS.items():
        options = {"epochs": min(args.epochs, protocol.epochs), "batch": smaller_batch(protocol.batch, len(labels))}
        found[name] = partial(linear.run, linear.Args(**place(name), protocol=name, **options))
    for name, protocol in TUNING_PROTOCOLS.items():
        if name in NOT_COMPARED and name not in args.only or protocol.vit_only and not vit:
            continue
        subset, images = part_of_labels(protocol, labels, num_classes)
        options = {"epochs": min(args.epochs, protocol.epochs), "batch": smaller_batch(protocol.batch, images), "subset": subset}
        kind = semi.Args if name.startswith("semi/") else finetune.Args
        found[name] = partial(tuning_command.run, kind(**place(name), protocol=name, **options), name)
    return found


def chosen(found: dict[str, Callable], only: Sequence[str]) -> dict[str, Callable]:
    """ConfigError for a name that nothing has."""
    for name in only:
        if not any(name in (p, p.split("/")[0]) for p in found):
            raise ConfigError(f"No protocol '{name}' fits this backbone. Choose --only from: {', '.join(found)}.")
    return {p: f for p, f in found.items() if not only or any(name in (p, p.split("/")[0]) for name in only)}


def file_of(folder: Path, name: str) -> Path:
    return folder / f"{name.replace('/', '-')}.json"


def read_row(path: Path, name: str, seconds: float) -> Row:
    result = json.loads(path.read_text())
    key = next(key for key in (*REPORTED, *result) if key in result and key.startswith(("top1", "knn")))
    return Row(name, setting_of(result, name, key) or "as published", result[key], seconds)


def setting_of(result: Mapping[str, object], name: str, key: str) -> str:
    """What differs from the published settings, and the number of neighbours of a k-NN."""
    if "run_as" in result:
        return str(result["run_as"]).removeprefix(name).removeprefix(", ")
    published = KNN_PROTOCOLS.get(name, LogisticRegression())
    parts = [f"{n} {result[n]} instead of {getattr(published, n)}" for n in ("resize", "crop") if result[n] != getattr(published, n)]
    return ", ".join([f"k {key[3:].split('_')[0]}", *parts] if key.startswith("knn") else parts)


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    lines = ["| protocol | setting | top-1 % | seconds |", "| --- | --- | ---: | ---: |"]
    for r in rows:
        lines.append(f"| {r.protocol} | {r.setting} | {'-' if r.top1 is None else f'{r.top1:.2f}'} | {r.seconds:.0f} |")
    return "\n".join(lines)


def run(args: Args, dist: Dist) -> None:
    if args.epochs < 1:
        raise ConfigError(f"--epochs must be a positive number, got {args.epochs}.")
    if args.out is None and args.checkpoint.startswith("random:"):
        raise ConfigError("A random backbone has no place beside it for results: say where they go with --out DIR.")
    folder = args.out or Path(args.checkpoint).with_suffix(".evaluations")
    backbone, about = load_backbone(args.checkpoint, network=args.network)
    reading = {"dist": dist, "batch": 1, "backend": args.loader, "workers": args.workers}
    train, val = (build_eval_loader(args.data, split, center_crop(), **reading) for split in ("train", "val"))
    found = commands(args, folder, train.labels, checked_classes(train, val, args.data), vit=hasattr(backbone, "blocks"))
    found = chosen(found, args.only)
    del backbone, train, val
    if dist.is_main:
        check_writable(folder)
        folder.mkdir(exist_ok=True)
        shutil.rmtree(folder / FEATURES, ignore_errors=True)  # of a killed run, perhaps of other weights
    dist.barrier()
    rows = []
    for name, command in found.items():
        start = time.perf_counter()
        try:
            command(dist)
            reason = ""
        except (CheckpointError, ConfigError, DataError) as error:
            reason = str(error)
        seconds = time.perf_counter() - start
        if dist.is_main:
            rows.append(Row(name, f"not possible: {reason}", None, seconds) if reason else read_row(file_of(folder, name), name, seconds))
    if not dist.is_main:
        return
    shutil.rmtree(folder / FEATURES, ignore_errors=True)
    write_result(
        folder / "all.json",
        {"checkpoint": args.checkpoint, "data": args.data, "processes": dist.world}
        | {name: about[name] for name in ("arch", "method", "step", "network")}
        | {"rows": [vars(row) for row in rows]},
    )
    print(f"\n{args.checkpoint} ({about['arch']}) on {args.data}\n\n{table(rows)}\n\nwritten to {folder / 'all.json'}")


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, prog="python -m eval.all", args=argv)
    try:
        with session() as dist:
            run(args, dist)
    except (CheckpointError, ConfigError, DataError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
