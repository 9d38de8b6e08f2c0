"""k-nearest-neighbour accuracy of frozen features, exact and the same for any number of ranks.

python -m eval.knn --checkpoint runs/lewel/checkpoint_last.pt --data data/imagenet
torchrun --nproc-per-node 8 -m eval.knn --checkpoint ...
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from eval.features import Bank, extract, load_backbone
from eval.neighbours import CHUNK, Neighbours, search
from eval.protocols import KNN_PROTOCOLS, LewelMonitor, WeightedKNN, write_result
from fastssl.augment.augmenter import Augmenter
from fastssl.checkpoint import CheckpointError
from fastssl.config import ConfigError
from fastssl.distributed import Dist, session
from fastssl.views import CenterCrop, View
from loaders.build import build_eval_loader
from loaders.errors import DataError


def votes(weight: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Sum of the weights [n, k] of each class's neighbours: [n, num_classes].  One neighbour at a time: a fixed order."""
    out = weight.new_zeros(len(weight), num_classes)
    row = torch.arange(len(weight), device=weight.device)
    for j in range(weight.shape[1]):
        out[row, label[:, j]] += weight[:, j]
    return out


NO_RANK = 2**31


def truth_rank(votes: Tensor, truth: Tensor) -> Tensor:
    """How many classes are ranked before the true one [n]: by votes, equal ones by label.  A class unknown to the bank has no rank."""
    classes = torch.arange(votes.shape[1], device=votes.device)
    known = truth < votes.shape[1]
    of_truth = votes.gather(1, torch.where(known, truth, 0)[:, None])
    before = (votes > of_truth) | ((votes == of_truth) & (classes < truth[:, None]))
    return torch.where(known, before.sum(1), NO_RANK)


def _percent(hits: Sequence[int], count: int, dist: Dist) -> list[float]:
    """Hits per hundred of all ranks' queries."""
    totals = np.sum(dist.gather_objects((*hits, count)), axis=0)
    return [100.0 * int(h) / int(totals[-1]) for h in totals[:-1]]


def knn(bank: Bank, query: Bank, *, k: Sequence[int], temperature: float, num_classes: int, dist: Dist) -> dict[str, float]:
    """Weighted k-NN accuracy (protocol knn/dino) of all ranks' queries against all ranks' banks, in percent.

    Neighbours vote with exp(cosine / temperature).  -> {"knn<k>_top1", "knn<k>_top5"} for every k; a k beyond the size of
    the bank lets the whole bank vote.  NaN where features are not finite: the network diverged.
    """
    names = [f"knn{n}_top{top}" for n in k for top in (1, 5)]
    if not all(dist.gather_objects(bool(bank.features.isfinite().all() and query.features.isfinite().all()))):
        return dict.fromkeys(names, math.nan)
    near = search(bank, query, k=max(k), dist=dist)
    hits = dict.fromkeys(names, 0)
    for value, label, truth in zip(near.value.split(CHUNK), near.label.split(CHUNK), query.labels.split(CHUNK), strict=True):
        weight = torch.exp(value / temperature)
        for n in k:
            rank = truth_rank(votes(weight[:, :n], label[:, :n], num_classes), truth)
            hits[f"knn{n}_top1"] += int((rank < 1).sum())
            hits[f"knn{n}_top5"] += int((rank < 5).sum())
    return dict(zip(names, _percent(list(hits.values()), len(query), dist), strict=True))


def keep_index(labels: np.ndarray, num_classes: int, fraction: float) -> np.ndarray:
    """Ids of the first `fraction` of each class, class by class, in file order (methods/lewel.md, 11.1).

    labels: int [n] in file order.  A class of c images keeps min(max(1, round(fraction * c)), c), halves rounded to even.
    """
    labels = np.asarray(labels)
    members = [np.flatnonzero(labels == c) for c in range(num_classes)]
    return np.concatenate([ids[: max(1, round(fraction * len(ids)))] for ids in members])


def majority_knn(memory: Bank, queries: Bank, *, k: int, num_classes: int, dist: Dist) -> tuple[Neighbours, Tensor, float]:
    """Nearest by squared L2 distance, one vote each, ties to the smallest label.

    -> neighbours and predictions [n] of this rank's queries, and the top-1 accuracy of all ranks' in percent.
    """
    near = search(memory, queries, k=k, dist=dist, squared_l2=True)
    prediction = votes(torch.ones_like(near.value), near.label, num_classes).argmax(1)
    (accuracy,) = _percent([int((prediction == queries.labels).sum())], len(queries), dist)
    return near, prediction, accuracy


def lewel_monitor(bank: Bank, labels: np.ndarray, *, protocol: LewelMonitor, dist: Dist) -> dict[str, float]:
    """LEWEL's monitor (protocol knn/lewel-monitor) from this rank's features of the validation set.

    labels: those of the whole set in file order.  -> {"knn<k>_top1"} in percent; NaN where features are not finite.
    """
    num_classes = int(np.max(labels)) + 1
    if not all(dist.gather_objects(bool(bank.features.isfinite().all()))):
        return {f"knn{k}_top1": math.nan for k in protocol.k}

    def first(fraction: float) -> Bank:
        return bank[torch.isin(bank.index, torch.as_tensor(keep_index(labels, num_classes, fraction), device=bank.index.device))]

    memory, queries = first(protocol.memory), first(protocol.queries)
    return {f"knn{k}_top1": majority_knn(memory, queries, k=k, num_classes=num_classes, dist=dist)[2] for k in protocol.k}


# ------------------------------------------------------------------------------------------------ from data to numbers


def evaluate(
    backbone: nn.Module,
    data_path: str,
    *,
    dist: Dist,
    k: Sequence[int] = (10, 20),
    resize: int = 256,
    crop: int = 224,
    batch: int = 256,
    dtype: torch.dtype = torch.float32,
    subset: str = "",
    backend: str = "auto",
    workers: int = 0,
) -> dict[str, float]:
    """knn/dino of a live backbone on `data_path`'s train and val splits: {"knn<k>_top1", "knn<k>_top5"} in percent.

    Every rank calls it with the same weights on `dist.device`.  Training modes, buffers and random states stay as they are.
    subset: part of train to take as bank, a rule of `loaders.subsets`.  batch: images per rank; dtype: autocast type.  DataError when
    a split is missing or unlabelled.
    """
    protocol = WeightedKNN(k=tuple(k), resize=resize, crop=crop)
    options = {"subset": subset, "batch": batch, "dtype": dtype, "backend": backend, "workers": workers}
    result = measure(backbone, data_path, protocol, dist=dist, **options)
    return {name: value for name, value in result.items() if name.startswith("knn")}


def measure(
    backbone: nn.Module,
    data_path: str,
    protocol: WeightedKNN | LewelMonitor,
    *,
    dist: Dist,
    subset: str,
    batch: int,
    dtype: torch.dtype,
    backend: str,
    workers: int,
) -> dict[str, float]:
    """Scores of `protocol` and the numbers of images they come from.  Arguments as for `evaluate`."""
    spec = (View(crop=CenterCrop(size=protocol.crop, resize=protocol.resize, interpolation=protocol.interpolation)),)
    parts = {"train": subset, "val": ""}
    reading = {"dist": dist, "batch": batch, "backend": backend, "workers": workers}
    loaders = {s: build_eval_loader(data_path, s, spec, subset=parts[s], **reading) for s in protocol.splits}
    for split, loader in loaders.items():
        if loader.labels is None:
            raise DataError(f"The {split} split of {data_path} has no labels, and k-NN needs them. Give labelled data with --data.")
    names = [list(loader.classes) for loader in loaders.values() if loader.classes is not None]
    if len(names) == 2 and names[0] != names[1]:
        raise DataError(
            f"The classes of train and val in {data_path} differ ({len(names[0])} and {len(names[1])} names), so equal labels do not "
            f"mean the same. Make both from class folders of the same names."
        )
    augment = Augmenter(spec, device=dist.device, dtype=dtype, seed=0)
    banks = {s: extract(backbone, loader, augment, dtype, what=f"features of {s}") for s, loader in loaders.items()}
    sizes = {f"num_{s}": loader.num_samples for s, loader in loaders.items()}
    if isinstance(protocol, LewelMonitor):
        return lewel_monitor(banks["val"], loaders["val"].labels, protocol=protocol, dist=dist) | sizes
    num_classes = int(np.max(loaders["train"].labels)) + 1
    options = {"k": protocol.k, "temperature": protocol.temperature, "num_classes": num_classes}
    return knn(banks["train"], banks["val"], **options, dist=dist) | sizes


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Args:
    """k-NN accuracy of a frozen backbone."""

    checkpoint: str
    """A run's checkpoint_last.pt or backbone.safetensors, a torchvision state dict, or random:ARCH[:SEED]."""
    data: str = "data/imagenet"
    """Folder with train and val: .beton files or class folders."""
    subset: str = ""
    """Part of train to take as bank, as --data.subset of train.py: 1percent, 10percent, first:N, after:N, random:N or a file of names."""
    protocol: Literal["knn/dino", "knn/lewel-monitor"] = "knn/dino"
    """The settings below default to the protocol's."""
    network: Literal["auto", "online", "target"] = "auto"
    """Which network of a training checkpoint; auto: the one its method is evaluated by (DINO, SCFS: the target, that is the teacher)."""
    k: tuple[int, ...] | None = None
    """Numbers of neighbours."""
    resize: int | None = None
    """Shorter side before the centre crop, pixels."""
    crop: int | None = None
    """Side of the centre crop, pixels."""
    batch: int = 256
    """Images per rank in one forward pass."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the forward pass."""
    loader: Literal["auto", "ffcv", "dali", "torchvision", "torchvision_cuda", "folder"] = "auto"
    """Decoder, as in train.py."""
    workers: int = 0
    """Decoder threads per rank; 0: the cores divided by the ranks."""
    out: Path | None = None
    """JSON of the result; default: beside the checkpoint (none for a random backbone)."""


def settings(args: Args) -> WeightedKNN | LewelMonitor:
    """The protocol with the command line's changes.  ConfigError for impossible ones."""
    given = {name: getattr(args, name) for name in ("k", "resize", "crop") if getattr(args, name) is not None}
    protocol = replace(KNN_PROTOCOLS[args.protocol], **given)
    if not protocol.k or min((*protocol.k, args.batch, protocol.crop)) < 1:
        raise ConfigError("--k, --crop and --batch must be positive numbers.")
    if protocol.crop > protocol.resize:
        raise ConfigError(
            f"A centre crop of {protocol.crop} does not fit in images resized to {protocol.resize}: lower --crop or raise --resize."
        )
    if args.subset and "train" not in protocol.splits:
        raise ConfigError(f"{protocol.name} takes its memory from val: leave --subset out.")
    return protocol


def result_path(args: Args) -> Path | None:
    """Where the JSON goes.  ConfigError when nothing can be written there."""
    out = args.out
    if out is None and not args.checkpoint.startswith("random:"):
        checkpoint = Path(args.checkpoint)
        name = args.protocol + (f"-{args.subset}" if args.subset else "")
        out = checkpoint.with_name(f"{checkpoint.stem}.{name.replace('/', '-').replace(':', '-')}.json")
    if out is not None and not os.access(out.parent, os.W_OK):
        raise ConfigError(
            f"The result cannot be written to {out}: its folder is missing or read-only. Choose another with --out FILE.json."
        )
    return out


def run(args: Args, dist: Dist) -> None:
    protocol = settings(args)
    backbone, about = load_backbone(args.checkpoint, network=args.network)
    out = result_path(args)
    backbone = backbone.to(dist.device, memory_format=torch.channels_last)
    scores = measure(
        backbone,
        args.data,
        protocol,
        dist=dist,
        subset=args.subset,
        batch=args.batch,
        dtype=DTYPES[args.dtype],
        backend=args.loader,
        workers=args.workers,
    )
    if any(math.isnan(v) for v in scores.values()):
        raise CheckpointError(f"{args.checkpoint} gives features that are not finite: the run diverged. Evaluate an earlier checkpoint.")
    if not dist.is_main:
        return
    origin = {name: about[name] for name in ("arch", "method", "step", "network")}
    shown = {name: getattr(protocol, name) for name in ("resize", "crop", "interpolation")} | {"dtype": args.dtype}
    shown |= {"subset": args.subset} if args.subset else {}
    if out is not None:
        write_result(out, {"protocol": protocol.name, "checkpoint": args.checkpoint} | scores | origin | shown)
    print(f"{args.checkpoint} ({', '.join(f'{n} {v}' for n, v in origin.items() if v is not None)})")
    if about["dropped"]:
        print(f"not used: {', '.join(about['dropped'])}")
    for name, value in scores.items():
        print(f"{protocol.name}  {name} {value:.2f} %" if name.startswith("knn") else f"{name} {value}")
    print(", ".join(f"{n} {v}" for n, v in shown.items()) + (f"; written to {out}" if out is not None else ""))


def main() -> None:
    args = tyro.cli(Args, prog="python -m eval.knn")
    try:
        with session() as dist:
            run(args, dist)
    except (CheckpointError, ConfigError, DataError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
