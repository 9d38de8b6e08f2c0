"""Features of a frozen backbone, in memory or kept in a folder:  python -m eval.extract --checkpoint FILE --data DIR --out FEATURES

torchrun shares the work between ranks; a killed extraction goes on where it was.  eval.knn and eval.logreg take the folder with
--features, and extract into it what is not there.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from eval import command
from eval.command import EvaluationArgs, Subject, open_subject
from eval.features import Bank, check_kind, extract, extracted, width
from eval.labels import check_apart
from eval.protocols import check_crop
from eval.results import run_as
from eval.store import Store
from fastssl.augment.augmenter import Augmenter
from fastssl.checkpoint import CheckpointError
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.models.features import Backbone
from fastssl.models.weights import weights_digest
from fastssl.precision import DTYPES
from fastssl.views import CenterCrop, Interpolation, Photometric, View
from loaders.build import EvalLoader, build_eval_loader
from loaders.open import Backend
from loaders.order import shard


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
        check_crop(self.crop, self.resize)


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
    forward: int = 256,
    backend: Backend = "auto",
    workers: int = 0,
    folder: Path | None = None,
    of: Mapping[str, object] | None = None,
    check: Callable[[Mapping[str, EvalLoader]], object] = lambda loaders: None,
) -> dict[str, Part]:
    """Features of `parts` of a data set: name -> split and subset of it.  Every rank calls it, with the same weights on its device.

    forward      images per rank in one forward pass
    folder, of   where to keep them, and what the manifest says of the weights
    check        raises for data that are not fit, before anything is extracted

    DataError when data are missing.
    """
    reading = {"dist": dist, "batch": forward, "backend": backend, "workers": workers}
    loaders = {name: build_eval_loader(data, split, recipe.spec, subset=subset, **reading) for name, (split, subset) in parts.items()}
    check(loaders)
    augment = Augmenter(recipe.spec, device=dist.device, dtype=DTYPES[recipe.dtype], seed=0)
    options = {"augment": augment, "dtype": DTYPES[recipe.dtype], "kind": recipe.kind}
    out = {}
    for name, loader in loaders.items():
        if folder is None:
            mine = len(shard(loader.num_samples, dist.rank, dist.world))
            out[name] = Part(extract(backbone, loader, **options, count=mine, what=f"features of {name}"), loader, None)
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
class FeatureArgs(EvaluationArgs):
    """What every evaluation of frozen features is told."""

    kind: str = "pooled"
    """Features: pooled; of ViTs also cls, lastN ([CLS] of the last N blocks), patches (their mean) and cls+patches."""
    forward: int = 256
    """Images per rank in one forward pass."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the forward pass."""

    def check(self) -> None:
        """ConfigError for flags that cannot be."""
        self.check_parts()
        if self.forward < 1:
            raise ConfigError(f"--forward must be a positive number, got {self.forward}.")

    def recipe(self, subject: Subject, crops: Crops) -> Recipe:
        """Of the features, with these sizes.  ConfigError for what cannot be."""
        sizes = {name: getattr(crops, name) for name in ("resize", "crop", "interpolation")}
        recipe = Recipe(**sizes, normalisation=subject.normalisation, kind=self.kind, dtype=self.dtype)
        recipe.check(subject.backbone)
        return recipe

    def run_as(self, protocol: object, published: object) -> str:
        """The protocol and all that differs from it."""
        dtype = "" if self.dtype == "fp32" else self.dtype
        kind = "" if self.kind == "pooled" else self.kind
        return run_as(protocol, published, kind=kind, dtype=dtype, subset=self.subset, queries=self.queries)


class Crops(Protocol):
    """A protocol, or flags."""

    resize: int
    crop: int
    interpolation: Interpolation


def take(
    args: FeatureArgs,
    subject: Subject,
    recipe: Recipe,
    dist: Dist,
    parts: Mapping[str, tuple[str, str]],
    *,
    folder: Path | None,
    check: Callable[[Mapping[str, EvalLoader]], object] = lambda loaders: None,
) -> dict[str, Part]:
    """`banks` as the command line says.  DataError when queries are in the bank, CheckpointError when features are not finite."""

    def fit_and_apart(loaders: Mapping[str, EvalLoader]) -> None:
        check(loaders)
        if args.queries and loaders.keys() == {"train", "val"}:
            check_apart(loaders["train"], loaders["val"])

    reading = {"forward": args.forward, "backend": args.loader, "workers": args.workers}
    of = {name: subject.origin[name] for name in ("checkpoint", "arch", "network")} | {"digest": weights_digest(subject.backbone)}
    options = {"dist": dist, "folder": folder, "of": of, "check": fit_and_apart}
    found = banks(subject.backbone, args.data, parts, recipe, **options, **reading)
    if not all(dist.gather_objects(all(bool(part.bank.features.isfinite().all()) for part in found.values()))):
        raise CheckpointError(f"{args.checkpoint} gives features that are not finite: the run diverged. Evaluate an earlier checkpoint.")
    return found


def shown(args: FeatureArgs, recipe: Recipe) -> dict[str, object]:
    """The settings of features, for results."""
    settings = {name: getattr(recipe, name) for name in ("resize", "crop", "interpolation", "kind", "dtype")}
    return settings | {name: getattr(args, name) for name in ("subset", "queries") if getattr(args, name)}


@dataclass(frozen=True, kw_only=True)
class Args(FeatureArgs):
    """Keep the features of train and val in a folder, for --features of eval.knn and eval.logreg."""

    out: Path
    """The folder."""
    resize: int = 256
    """Shorter side before the centre crop, pixels."""
    crop: int = 224
    """Side of the centre crop, pixels."""
    interpolation: Interpolation = "bicubic"
    """Of DINO's and SFRIK's evaluations on features."""
    splits: tuple[Literal["train", "val"], ...] = ("train", "val")


def run(args: Args, dist: Dist) -> None:
    args.check()
    subject = open_subject(args, dist)
    parts = {name: args.parts[name] for name in args.splits}
    found = take(args, subject, args.recipe(subject, args), dist, parts, folder=args.out)
    if dist.is_main:
        print(subject)
        for name, part in found.items():
            print(f"{part.store.path('features.npy')}: {part.loader.num_samples} x {part.bank.features.shape[1]}, {name}")


def main(argv: Sequence[str] | None = None) -> None:
    command.main(Args, run, "eval.extract", argv)


if __name__ == "__main__":
    main()
