"""Every protocol that fits a backbone, on one data set, in fewer epochs:  python -m eval.all --checkpoint FILE --data DIR

The table shows what was shortened: its numbers compare backbones and protocols with each other, not with published ones.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np

from eval import command, finetune, knn, linear, logreg, semi, tuning_command
from eval.command import BackboneArgs, open_subject
from eval.features import SharedFeatures
from eval.knn import memory_size
from eval.labels import checked_classes
from eval.linear_protocols import LINEAR_PROTOCOLS
from eval.protocols import KNN_PROTOCOLS, LewelMonitor, LogisticRegression
from eval.results import beside, check_writable, data_name, together, write_result
from eval.tuning_protocols import TUNING_PROTOCOLS, TuningProtocol
from fastssl.checkpoint import CheckpointError
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.models.weights import weights_digest
from fastssl.recipes import center_crop
from loaders.build import build_eval_loader
from loaders.errors import DataError

RESULT, LOG = "all.json", "all.log"
LEAST_STEPS, SMALLEST_BATCH = 16, 8
"""Batches are made smaller until an epoch has so many steps, but not smaller than that."""
IMAGENET_CLASSES = 1000
"""With so many classes the data are taken for ImageNet, whose lists of 1 % and 10 % exist."""
REPORTED = ("top1", "top1_last", "knn20_top1")
"""The number of a result, by the first name that it has: of linear and end-to-end protocols, of logistic regression, of k-NN."""
SHARED_BYTES = 2**31
"""Of features that a rank keeps in memory for linear protocols with the same batch: they see the same crops in the same order."""
FEATURES = "features.eval-all"
"""Folder of the features that k-NN and logistic regression share; it is gone afterwards."""
NOT_COMPARED = ("transfer/mocov3-cifar100", "transfer/mocov3-flowers", "transfer/mocov3-pets")
"""transfer/mocov3 with the values of other data sets."""


@dataclass(frozen=True, kw_only=True)
class Args(BackboneArgs):
    """All protocols on one backbone, and a table of their numbers.

    The table is written after each protocol.  Called again with the same settings, what is done is not done again.
    """

    epochs: int = 5
    """At most so many, where the backbone sees every image in every epoch."""
    only: tuple[str, ...] = ()
    """Names of protocols, or of families: linear, semi; default: all that fit."""
    out: Path | None = None
    """Folder of the results; default: beside the checkpoint."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    protocol: str
    setting: str
    """What differs from the published settings (of k-NN also k), or why there is no number."""
    top1: float | None
    """Percent."""
    top5: float | None
    seconds: float
    """Features that are shared count for the protocol that came first."""
    per_class: str = ""
    """The file with the accuracy of each class, if there is one."""


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


def commands(
    args: Args, folder: Path, labels: np.ndarray, val_labels: np.ndarray, num_classes: int, *, vit: bool
) -> dict[str, Callable[[Dist], None]]:
    """What writes folder/NAME.json, by the name of the protocol.  labels: of the training images."""
    common = {f.name: getattr(args, f.name) for f in fields(BackboneArgs)}

    def place(name: str) -> dict[str, object]:
        return common | {"protocol": name, "out": file_of(folder, name)}

    found: dict[str, Callable[[Dist], None]] = {}
    for name, protocol in KNN_PROTOCOLS.items():
        bank = memory_size(protocol, val_labels) if isinstance(protocol, LewelMonitor) else len(labels)
        k = tuple(n for n in protocol.k if n <= bank) or None  # the command says why none fits
        kept = {"features": folder / FEATURES} if protocol.interpolation == LogisticRegression().interpolation else {}
        found[name] = partial(knn.run, knn.Args(**place(name), k=k, **kept))
    found["logreg/sfrik"] = partial(logreg.run, logreg.Args(**place("logreg/sfrik"), features=folder / FEATURES))
    shared = SharedFeatures(SHARED_BYTES)
    for name, protocol in LINEAR_PROTOCOLS.items():
        options = {"epochs": min(args.epochs, protocol.epochs), "batch": smaller_batch(protocol.batch, len(labels))}
        found[name] = partial(linear.run, linear.Args(**place(name), **options), shared=shared)
    for name, protocol in TUNING_PROTOCOLS.items():
        if name in NOT_COMPARED and name not in args.only or protocol.vit_only and not vit:
            continue
        subset, images = part_of_labels(protocol, labels, num_classes)
        options = {"epochs": min(args.epochs, protocol.epochs), "batch": smaller_batch(protocol.batch, images), "subset": subset}
        kind = semi.Args if name.startswith("semi/") else finetune.Args
        found[name] = partial(tuning_command.run, kind(**place(name), **options))
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
    """Crops are the same in all rows: the table's title has them."""
    result = json.loads(path.read_text())
    key = next(key for key in (*REPORTED, *result) if key in result and key.startswith(("top1", "knn")))
    neighbours = f"k {key[3:].split('_')[0]}" if key.startswith("knn") else ""
    differs = [part for part in result["run_as"].split(", ")[1:] if not part.startswith(("resize ", "crop "))]
    setting = ", ".join(filter(None, (neighbours, *differs))) or "as published"
    return Row(name, setting, result[key], result.get(key.replace("top1", "top5")), seconds, path.name if "per_class" in result else "")


def table(rows: Sequence[Row]) -> str:
    """In Markdown."""
    lines = ["| protocol | setting | top-1 % | top-5 % | seconds | per class |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for r in rows:
        tops = " | ".join("-" if top is None else f"{top:.2f}" for top in (r.top1, r.top5))
        lines.append(f"| {r.protocol} | {r.setting} | {tops} | {r.seconds:.0f} | {r.per_class or '-'} |")
    return "\n".join(lines)


def rows_done(folder: Path, of: Mapping[str, object]) -> dict[str, Row]:
    """Rows of an earlier call with the same settings; what is left of one with others is removed."""
    try:
        found = json.loads((folder / RESULT).read_text())
        differs = [name for name, value in of.items() if found["of"].get(name) != value]  # earlier versions had no mean and std
        rows = {row["protocol"]: Row(**row) for row in found["rows"]}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError):
        differs, rows = ["format"], {}
    if not differs:
        return {name: row for name, row in rows.items() if row.top1 is not None and file_of(folder, name).exists()}
    print(f"{folder} holds results with other settings ({', '.join(differs)}): starting over")
    shutil.rmtree(folder / FEATURES, ignore_errors=True)
    for state in folder.glob("*.state.pt"):
        state.unlink()
    return {}


def _log(folder: Path, dist: Dist) -> AbstractContextManager[TextIO]:
    return (folder / LOG).open("a") if dist.is_main else nullcontext(sys.stdout)


def settled(name: str, do: Callable[[Dist], None], folder: Path, dist: Dist) -> Row | None:
    """The row of a protocol, on rank 0; what its command says goes to folder/LOG."""
    start, reason = time.perf_counter(), ""
    with together(dist, folder):
        if dist.is_main:  # without a row it is of other settings, or the call ended before its row was written
            file_of(folder, name).unlink(missing_ok=True)
    with together(dist, folder / LOG), _log(folder, dist) as log, redirect_stdout(log):
        try:
            do(dist)
        except (CheckpointError, ConfigError, DataError) as error:
            reason = str(error)
    if not dist.is_main:
        return None
    seconds = time.perf_counter() - start
    return Row(name, f"not possible: {reason}", None, None, seconds) if reason else read_row(file_of(folder, name), name, seconds)


def run(args: Args, dist: Dist) -> None:
    if args.epochs < 1:
        raise ConfigError(f"--epochs must be a positive number, got {args.epochs}.")
    subject = open_subject(args, dist)
    folder = args.out or beside(args.checkpoint, subject.network, data_name(args.data), "evaluations")
    if folder is None:
        raise ConfigError("A random backbone has no place beside it for results: say where they go with --out DIR.")
    check_writable(folder / RESULT if folder.is_dir() else folder)
    reading = {"dist": dist, "batch": 1, "backend": args.loader, "workers": args.workers}
    train, val = (build_eval_loader(args.data, split, center_crop(), **reading) for split in ("train", "val"))
    sizes = (train.labels, val.labels, checked_classes(train, val, args.data))
    found = chosen(commands(args, folder, *sizes, vit=hasattr(subject.backbone, "blocks")), args.only)
    of = {"weights": weights_digest(subject.backbone), "images": [train.num_samples, val.num_samples], "processes": dist.world}
    of |= {name: getattr(args, name) for name in ("data", "epochs", "resize", "crop")}
    of |= {name: value and list(value) for name, value in (("mean", args.mean), ("std", args.std))}
    about, title = subject.origin, str(subject)
    del subject, train, val
    rows: dict[str, Row] = {}
    with together(dist, folder):
        if dist.is_main:
            folder.mkdir(exist_ok=True)
            rows = rows_done(folder, of)
            print(f"{title}\nThe commands' own output goes to {folder / LOG}.")
    rows = dist.broadcast_object(rows)
    for number, (name, do) in enumerate(found.items(), 1):
        known = name in rows
        if not known:
            rows[name] = settled(name, do, folder, dist)
            with together(dist, folder / RESULT):
                if dist.is_main:
                    write_result(folder / RESULT, about | {"of": of, "rows": [vars(row) for row in rows.values()]})
        if dist.is_main:
            top1 = "-" if rows[name].top1 is None else f"{rows[name].top1:.2f} %"
            print(f"{number}/{len(found)}  {name}  {top1}  {'done before' if known else f'{rows[name].seconds:.0f} s'}", flush=True)
    if dist.is_main:
        shutil.rmtree(folder / FEATURES, ignore_errors=True)
        shown = [rows[name] for name in found]
        crops = ", ".join(f"{name} {getattr(args, name) or 'as published'}" for name in ("resize", "crop"))
        print(f"\n{title.splitlines()[0]}, {crops}, {sum(row.seconds for row in shown):.0f} s\n\n{table(shown)}\n")
        print(f"written to {folder / RESULT}, and each protocol's numbers beside it")


def main(argv: Sequence[str] | None = None) -> None:
    command.main(Args, run, "eval.all", argv)


if __name__ == "__main__":
    main()
