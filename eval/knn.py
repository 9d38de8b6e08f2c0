"""k-nearest-neighbour accuracy of frozen features, exact and the same for any number of ranks.

python -m eval.knn --checkpoint runs/lewel/checkpoint_last.pt --data data/imagenet
torchrun --nproc-per-node 8 -m eval.knn --checkpoint ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from eval import command, labels
from eval.command import open_subject
from eval.extract import FeatureArgs, Part, Recipe, banks, shown, take
from eval.protocols import KNN_PROTOCOLS, LewelMonitor, WeightedKNN
from eval.results import check_same, check_writable, publish, result_path, table_line
from eval.votes import keep_index, knn, lewel_monitor
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.models.features import Backbone
from fastssl.precision import name_of
from fastssl.views import Photometric
from loaders.build import EvalLoader
from loaders.errors import DataError


def evaluate(
    backbone: Backbone,
    data_path: str,
    *,
    dist: Dist,
    k: Sequence[int] = (10, 20),
    resize: int = 256,
    crop: int = 224,
    normalisation: Photometric | None = None,
    forward: int = 256,
    dtype: torch.dtype = torch.float32,
    subset: str = "",
    backend: str = "auto",
    workers: int = 0,
) -> dict[str, float]:
    """knn/dino of a live backbone on `data_path`'s train and val splits: {"knn<k>_top1", "knn<k>_top5"} in percent.

    Every rank calls it with the same weights on `dist.device`.  Training modes, buffers and random states stay as they are.
    normalisation: its mean and std, default ImageNet's.  subset: part of train to take as bank, a rule of `loaders.subsets`.
    forward: images per rank in one forward pass; dtype: autocast type.  DataError when a split is missing or unlabelled.
    """
    protocol = WeightedKNN(k=tuple(k), resize=resize, crop=crop)
    recipe = Recipe(
        resize=resize,
        crop=crop,
        interpolation=protocol.interpolation,
        normalisation=normalisation or Photometric(),
        dtype=name_of(dtype),
    )
    parts = {"train": ("train", subset), "val": ("val", "")}
    reading = {"forward": forward, "backend": backend, "workers": workers}
    found = banks(backbone, data_path, parts, recipe, dist=dist, check=partial(check_labels, data=data_path), **reading)
    return scores(found, protocol, dist)


def scores(found: dict[str, Part], protocol: WeightedKNN | LewelMonitor, dist: Dist) -> dict[str, float]:
    """What the protocol says of the features of train and val, or of val alone."""
    val = found["val"]
    if isinstance(protocol, LewelMonitor):
        return lewel_monitor(val.bank, val.loader.labels, protocol=protocol, dist=dist)
    num_classes = int(np.max(found["train"].loader.labels)) + 1
    options = {"k": protocol.k, "temperature": protocol.temperature, "top5_within_k": protocol.top5_within_k}
    return knn(found["train"].bank, val.bank, num_classes=num_classes, dist=dist, **options)


def check_labels(loaders: Mapping[str, EvalLoader], data: str) -> None:
    """DataError unless all have labels, and equal ones mean the same."""
    for split, loader in loaders.items():
        if loader.labels is None:
            raise DataError(f"The {split} split of {data} has no labels, and k-NN needs them. Give labelled data with --data.")
        count = len(loader.classes) if loader.classes else int(np.max(loader.labels)) + 1
        labels.check_labels(loader, count, f"The labels of the {split} split of {data}")
    if "train" in loaders:
        labels.check_same_classes(loaders["train"].classes, loaders["val"].classes, data)


def check_data(loaders: Mapping[str, EvalLoader], protocol: WeightedKNN | LewelMonitor, data: str) -> None:
    """DataError when labels are missing or wrong, or the bank lacks a class of the queries or is too small for the protocol."""
    check_labels(loaders, data)
    if isinstance(protocol, LewelMonitor):
        check_size(protocol, memory_size(protocol, loaders["val"].labels))
        return
    bank, queries = loaders["train"], loaders["val"]
    check_size(protocol, bank.num_samples)
    if len(empty := np.setdiff1d(queries.labels, bank.labels)):
        first = bank.classes[empty[0]] if bank.classes else f"class {empty[0]}"
        raise DataError(
            f"{len(empty)} classes of the images to classify have no image in the bank from {data}, {first} first: they cannot be found. "
            f"Take a larger part with --subset, or complete the data."
        )


def memory_size(protocol: LewelMonitor, labels: np.ndarray) -> int:
    """Images of the validation set, of these labels, that others are compared with."""
    return len(keep_index(labels, int(np.max(labels)) + 1, protocol.memory))


def check_size(protocol: WeightedKNN | LewelMonitor, images: int) -> None:
    if images < max(protocol.k):
        raise DataError(f"{max(protocol.k)} neighbours are asked for, and the bank has {images} images. Ask for fewer with --k.")


# ------------------------------------------------------------------------------------------------ the command line


@dataclass(frozen=True, kw_only=True)
class Args(FeatureArgs):
    """k-NN accuracy of a frozen backbone.

    An interrupted evaluation starts over; with --features the extraction, which takes the time, goes on where it was.
    """

    protocol: Literal["knn/dino", "knn/ibot", "knn/sfrik", "knn/lewel-monitor"] = "knn/dino"
    """Its settings are the defaults of k, resize and crop."""
    k: tuple[int, ...] | None = None
    """Numbers of neighbours."""
    features: Path | None = None
    """Folder to keep the features in, or to take those that are there from; default: they are not kept."""
    out: Path | None = None
    """JSON of the result; default: beside the checkpoint (none for a random backbone)."""
    picture: Path | None = None
    """PNG to draw: some queries, each with its five nearest images."""


def settings(args: Args) -> WeightedKNN | LewelMonitor:
    """The protocol with the command line's changes.  ConfigError for impossible ones."""
    args.check()
    given = {name: getattr(args, name) for name in ("k", "resize", "crop") if getattr(args, name) is not None}
    protocol = replace(KNN_PROTOCOLS[args.protocol], **given)
    if not protocol.k or min(protocol.k) < 1:
        raise ConfigError("--k must be positive numbers.")
    if "train" not in protocol.splits and (args.subset or args.queries or args.picture):
        raise ConfigError(f"{protocol.name} takes all its images from val: leave --subset out, and --queries and --picture.")
    return protocol


def run(args: Args, dist: Dist) -> None:
    protocol = settings(args)
    subject = open_subject(args, dist)
    recipe = args.recipe(subject, protocol)
    name = args.run_as(protocol, KNN_PROTOCOLS[args.protocol])
    out = result_path(args.checkpoint, args.out, args.protocol, subject.network, args.data, args.subset, args.queries)
    check_same(out, data=args.data, run_as=name, k=list(protocol.k), mean=subject.origin["mean"], std=subject.origin["std"])
    if args.picture is not None:
        check_writable(args.picture)
    parts = {name: args.parts[name] for name in protocol.splits}
    check = partial(check_data, protocol=protocol, data=args.data)
    found = take(args, subject, recipe, dist, parts, folder=args.features, check=check)
    result = scores(found, protocol, dist)
    if args.picture is not None:
        from eval.neighbour_sheet import draw  # Pillow's fonts are for this alone

        draw(args.picture, found["train"], found["val"], title=f"{subject.origin['checkpoint']}   {protocol.name}", dist=dist)
    sizes = {f"num_{name}": part.loader.num_samples for name, part in found.items()}
    how = {"k": list(protocol.k)} | shown(args, recipe)
    lines = [str(subject), *(f"{name}  {key} {value:.2f} %" for key, value in result.items())]
    lines += [table_line(subject.origin, f"{name}, k = {k}", f"{result[f'knn{k}_top1']:.2f}") for k in protocol.k]
    lines.append(", ".join(f"{key} {value}" for key, value in (sizes | how).items()))
    publish({"protocol": protocol.name, "run_as": name} | subject.origin | result | sizes | how, lines, out, dist)


def main(argv: Sequence[str] | None = None) -> None:
    command.main(Args, run, "eval.knn", argv)


if __name__ == "__main__":
    main()
