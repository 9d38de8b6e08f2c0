"""Features of a frozen backbone, in memory or kept in a folder:  python -m eval.extract --checkpoint FILE --data DIR --out FEATURES

torchrun shares the work between ranks; a killed extraction goes on where it was.  eval.knn and eval.logreg take the folder with
--features, and extract into it what is not there.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from eval.features import Bank, check_kind, extract, extracted, width
from eval.store import Store
from fastssl.augment.augmenter import Augmenter
from fastssl.checkpoint import CheckpointError
from fastssl.config import ConfigError
from fastssl.distributed import Dist, session
from fastssl.models.features import Backbone
from fastssl.models.official import left_out
from fastssl.models.weights import load_backbone, output_checksum, weights_digest
from fastssl.views import CenterCrop, Interpolation, Photometric, View
from loaders.build import EvalLoader, build_eval_loader
from loaders.errors import DataError
from loaders.open import Backend

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How features are taken of images: all that changes them beside the weights."""

    resize: int
    crop: int
    interpolation: Interpolation
    normalisation: Photometric = field(default_factory=Photometric)
    """Its mean and std."""
    kind: str = "pooled"
    """See `eval.features.feature`."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the forward pass."""

    @property
    def spec(self) -> tuple[View]:
        crop = CenterCrop(size=self.crop, resize=self.resize, interpolation=self.interpolation)
        return (View(crop=crop, photometric=Photometric(mean=self.normalisation.mean, std=self.normalisation.std)),)

    def check(self, backbone: Backbone) -> None:
        """ConfigError for what cannot be."""
        check_kind(backbone, self.kind)
        if self.crop < 1:
            raise ConfigError(f"--crop must be a positive number, got {self.crop}.")
        if self.crop > self.resize:
            raise ConfigError(
                f"A centre crop of {self.crop} does not fit in images resized to {self.resize}: lower --crop or raise --resize."
            )


@dataclass
class Part:
    """This rank's features of a part of a data set."""

    bank: Bank
    loader: EvalLoader
    """The pass that they are of: labels, classes and number of all ranks' images."""
    store: Store | None
    """Where all of them are, if they are kept."""


def banks(
    backbone: Backbone,
    data: str,
    parts: Mapping[str, tuple[str, str]],
    recipe: Recipe,
    *,
    dist: Dist,
    batch: int = 256,
    backend: Backend = "auto",
    workers: int = 0,
    folder: Path | None = None,
    of: Mapping[str, object] | None = None,
    check: Callable[[Mapping[str, EvalLoader]], object] = lambda loaders: None,
) -> dict[str, Part]:
    """Features of `parts` of a data set: name -> split and subset of it.  Every rank calls it, with the same weights on its device.

    batch        images per rank
    folder, of   where to keep them, and what the manifest says of the weights
    check        raises for data that are not fit, before anything is extracted

    DataError when data are missing.
    """
    reading = {"dist": dist, "batch": batch, "backend": backend, "workers": workers}
    loaders = {name: build_eval_loader(data, split, recipe.spec, subset=subset, **reading) for name, (split, subset) in parts.items()}
    check(loaders)
    augment = Augmenter(recipe.spec, device=dist.device, dtype=DTYPES[recipe.dtype], seed=0)
    options = {"augment": augment, "dtype": DTYPES[recipe.dtype], "kind": recipe.kind}
    out = {}
    for name, loader in loaders.items():
        if folder is None:
            out[name] = Part(extract(backbone, loader, **options, what=f"features of {name}"), loader, None)
            continue
        store = Store(
            folder, "-".join(filter(None, parts[name])).replace(":", "-").replace("/", "-"), manifest(of, data, parts[name], recipe, loader)
        )

        def run(part: EvalLoader, name: str = name):
            return extracted(backbone, part, **options, what=f"features of {name}")

        store.fill(loader, run, width(backbone, recipe.kind), dist)
        out[name] = Part(store.bank(dist), loader, store)
    return out


def manifest(of: Mapping[str, object] | None, data: str, part: tuple[str, str], recipe: Recipe, loader: EvalLoader) -> dict[str, object]:
    """What features are of, in plain values."""
    ids = zlib.crc32(loader.ids.astype(np.int64).tobytes())
    labels = None if loader.labels is None else zlib.crc32(np.asarray(loader.labels, np.int64).tobytes())
    norm = recipe.normalisation
    how = asdict(recipe) | {"normalisation": {"mean": list(norm.mean), "std": list(norm.std)}}
    return dict(of or {}) | {"data": data, "split": part[0], "subset": part[1], "crc32": [ids, labels]} | how


# ------------------------------------------------------------------------------------------------ the command line


@dataclass(frozen=True, kw_only=True)
class Source:
    """What every evaluation of frozen features is told."""

    checkpoint: str
    """A run's checkpoint_last.pt or backbone.safetensors, a torchvision or timm state dict, another project's, or random:ARCH[:SEED]."""
    data: str = "data/imagenet"
    """Folder with train and val: .beton files or class folders."""
    subset: str = ""
    """Part of train, as --data.subset of train.py: 1percent, 10percent, first:N, after:N, random:N or a file of names."""
    queries: str = ""
    """Part of train to classify instead of val, where hyper-parameters are chosen without it: after:260 for the bank first:260 (SFRIK)."""
    network: Literal["auto", "online", "target"] = "auto"
    """Which network of a training checkpoint; auto: the one its method is evaluated by (DINO, SCFS: the target, that is the teacher)."""
    arch: str | None = None
    """The architecture that the checkpoint must have; default: what its weights fit."""
    kind: str = "pooled"
    """Features: pooled; of ViTs also cls, lastN ([CLS] of the last N blocks), patches (their mean) and cls+patches."""
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

    def check(self) -> None:
        """ConfigError for flags that cannot be."""
        if self.batch < 1:
            raise ConfigError(f"--batch must be a positive number, got {self.batch}.")
        if self.queries and not self.subset:
            raise ConfigError(f"--queries {self.queries} are images of train, and so is the bank: give it a part of its own with --subset.")

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        """What is learned from and what is classified: split and subset of each."""
        return {"train": ("train", self.subset), "val": ("train" if self.queries else "val", self.queries)}


@dataclass
class Subject:
    """The backbone of an evaluation, on its device, and what is known of it."""

    backbone: Backbone
    recipe: Recipe
    origin: dict[str, object]
    """For the result: checkpoint, arch, method, step, network, output_checksum."""
    of: dict[str, object]
    """For the manifest of kept features."""
    dropped: str
    """Weights of the file that were not used, in one line; "" for none."""

    def __str__(self) -> str:
        known = ", ".join(f"{name.replace('_', ' ')} {v}" for name, v in self.origin.items() if name != "checkpoint" and v is not None)
        return f"{self.origin['checkpoint']} ({known})" + (f"\nnot used: {self.dropped}" if self.dropped else "")


def open_subject(source: Source, dist: Dist, *, resize: int, crop: int, interpolation: Interpolation) -> Subject:
    """The backbone, with crops of these sizes unless `source` has its own.  CheckpointError, ConfigError."""
    source.check()
    backbone, about = load_backbone(source.checkpoint, network=source.network, arch=source.arch)
    crop, resize = (own if own is not None else given for own, given in ((source.crop, crop), (source.resize, resize)))
    norm = about["normalisation"] or {}
    recipe = Recipe(
        resize=resize, crop=crop, interpolation=interpolation, normalisation=Photometric(**norm), kind=source.kind, dtype=source.dtype
    )
    recipe.check(backbone)
    origin = {"checkpoint": source.checkpoint} | {name: about[name] for name in ("arch", "method", "step", "network")}
    of = {"checkpoint": source.checkpoint, "arch": about["arch"], "network": about["network"], "digest": weights_digest(backbone)}
    origin["output_checksum"] = output_checksum(backbone)
    return Subject(backbone.to(dist.device, memory_format=torch.channels_last), recipe, origin, of, left_out(about["dropped"]))


def take(
    source: Source,
    subject: Subject,
    dist: Dist,
    parts: Mapping[str, tuple[str, str]],
    *,
    folder: Path | None,
    check: Callable[[Mapping[str, EvalLoader]], object] = lambda loaders: None,
) -> dict[str, Part]:
    """`banks` as the command line says.  DataError when queries are in the bank, CheckpointError when features are not finite."""
    reading = {"batch": source.batch, "backend": source.loader, "workers": source.workers}

    def fit_and_apart(loaders: Mapping[str, EvalLoader]) -> None:
        check(loaders)
        if (
            source.queries
            and loaders.keys() == {"train", "val"}
            and (common := len(np.intersect1d(loaders["train"].ids, loaders["val"].ids)))
        ):
            raise DataError(
                f"{common} images are in --subset {source.subset} and in --queries {source.queries}: they would find themselves. "
                f"Take parts that have none in common, such as first:260 and after:260."
            )

    options = {"dist": dist, "folder": folder, "of": subject.of, "check": fit_and_apart}
    found = banks(subject.backbone, source.data, parts, subject.recipe, **options, **reading)
    if not all(dist.gather_objects(all(bool(part.bank.features.isfinite().all()) for part in found.values()))):
        raise CheckpointError(f"{source.checkpoint} gives features that are not finite: the run diverged. Evaluate an earlier checkpoint.")
    return found


def shown(source: Source, subject: Subject) -> dict[str, object]:
    """The settings of features, for results."""
    recipe = subject.recipe
    settings = {name: getattr(recipe, name) for name in ("resize", "crop", "interpolation", "kind", "dtype")}
    return settings | {name: getattr(source, name) for name in ("subset", "queries") if getattr(source, name)}


@dataclass(frozen=True, kw_only=True)
class Args(Source):
    """Keep the features of train and val in a folder, for --features of eval.knn and eval.logreg."""

    out: Path
    """The folder."""
    resize: int = 256
    crop: int = 224
    interpolation: Interpolation = "bicubic"
    """Of DINO's and SFRIK's evaluations on features."""
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")


def run(args: Args, dist: Dist) -> None:
    subject = open_subject(args, dist, resize=args.resize, crop=args.crop, interpolation=args.interpolation)
    found = take(args, subject, dist, {name: args.parts[name] for name in args.splits}, folder=args.out)
    if dist.is_main:
        print(subject)
        for name, part in found.items():
            print(f"{part.store.path('features.npy')}: {part.loader.num_samples} x {part.bank.features.shape[1]}, {name}")


def main(argv: Sequence[str] | None = None) -> None:
    try:
        args = tyro.cli(Args, prog="python -m eval.extract", args=argv)
        with session() as dist:
            run(args, dist)
    except (CheckpointError, ConfigError, DataError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
