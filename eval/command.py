"""What the commands of evaluations share: their flags, the backbone, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import tyro

from fastssl.checkpoint import CheckpointError
from fastssl.config import ConfigError
from fastssl.distributed import Dist, session
from fastssl.models.features import Backbone
from fastssl.models.official import Network, left_out
from fastssl.models.weights import load_backbone, output_checksum
from fastssl.views import Photometric
from loaders.errors import DataError
from loaders.open import Backend

ORIGIN = ("arch", "method", "step", "network")
"""Of a backbone's description, for results."""


@dataclass(frozen=True, kw_only=True)
class BackboneArgs:
    """Which backbone, and which images it sees."""

    checkpoint: str
    """A run's checkpoint_last.pt or backbone.safetensors, a torchvision or timm state dict, another project's, or random:ARCH[:SEED]."""
    data: str = "data/imagenet"
    """Folder with train and val: .beton files or class folders."""
    network: Network = "auto"
    """Which network of a training checkpoint; auto: the one its method is evaluated by (DINO, SCFS: the target, that is the teacher)."""
    arch: str | None = None
    """The architecture that the checkpoint must have; default: what its weights fit."""
    mean: tuple[float, float, float] | None = None
    """Of the images as the backbone takes them, red, green, blue of 0 to 1; default: as the checkpoint says, or else ImageNet's.
    timm's augreg ViTs have 0.5 0.5 0.5 here and in --std, and their state dicts do not say it."""
    std: tuple[float, float, float] | None = None
    """The same."""
    resize: int | None = None
    """Shorter side of the images to classify before the centre crop, pixels; default: the protocol's."""
    crop: int | None = None
    """Side of all crops, pixels; default: the protocol's."""
    loader: Backend = "auto"
    """Decoder, as in train.py."""
    workers: int = 0
    """Decoder threads per rank; 0: the cores divided by the ranks."""


@dataclass(frozen=True, kw_only=True)
class EvaluationArgs(BackboneArgs):
    """And which parts of the data set."""

    subset: str = ""
    """Part of train to learn from, as --data.subset of train.py: 1percent, 10percent, first:N, after:N, random:N or a file of names."""
    queries: str = ""
    """Part of train to classify instead of val, where hyper-parameters are chosen without it: after:260 for first:260 (SFRIK)."""

    def check_parts(self, subset: str = "") -> None:
        """ConfigError for queries among all the images to learn from.  subset: what the protocol takes without --subset."""
        if self.queries and not (self.subset or subset):
            raise ConfigError(
                f"--queries {self.queries} are images of train, and so are those to learn from: give them a part with --subset."
            )

    @property
    def parts(self) -> dict[str, tuple[str, str]]:
        """What is learned from and what is classified: split and subset of each."""
        return {"train": ("train", self.subset), "val": ("train" if self.queries else "val", self.queries)}


@dataclass
class Subject:
    """The backbone of an evaluation, on its device, and what is known of it."""

    backbone: Backbone
    normalisation: Photometric
    """Its mean and std: of the images that the backbone was trained on."""
    origin: dict[str, object]
    """For the result: checkpoint, arch, method, step, network, output_checksum, data, mean and std of the images, and whence."""
    dropped: str
    """Weights of the file that were not used, in one line; "" for none."""

    @property
    def network(self) -> str:
        return str(self.origin["network"])

    def __str__(self) -> str:
        known = {n: v for n in (*ORIGIN, "output_checksum") if (v := self.origin.get(n)) is not None}
        shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in known.items())
        lines = [f"{self.origin['checkpoint']} ({shown}) on {self.origin['data']}"]
        mean, std = (" ".join(f"{v:g}" for v in values) for values in (self.normalisation.mean, self.normalisation.std))
        lines.append(f"images with mean {mean} and std {std}: {self.origin.get('normalisation')}")
        return "\n".join([*lines, *([f"not used: {self.dropped}"] if self.dropped else [])])


def open_subject(args: BackboneArgs, dist: Dist) -> Subject:
    """CheckpointError for weights that cannot be used, ConfigError for a normalisation that cannot be."""
    if (args.mean is None) != (args.std is None) or min(args.std or [1]) <= 0:
        raise ConfigError("--mean and --std go together, three numbers each, and those of --std are positive.")
    backbone, about = load_backbone(args.checkpoint, network=args.network, arch=args.arch)
    origin = {"checkpoint": args.checkpoint} | {name: about[name] for name in ORIGIN}
    given = None if args.mean is None else {"mean": args.mean, "std": args.std}
    norm = Photometric(**(given or about["normalisation"] or {}))
    origin["normalisation"] = "--mean and --std" if given else "the checkpoint's" if about["normalisation"] else "ImageNet's, it names none"
    origin |= {"output_checksum": output_checksum(backbone), "data": args.data, "mean": list(norm.mean), "std": list(norm.std)}
    return Subject(backbone.to(dist.device, memory_format=torch.channels_last), norm, origin, left_out(about["dropped"]))


A = TypeVar("A")


def main(args_type: type[A], run: Callable[[A, Dist], None], prog: str, argv: Sequence[str] | None) -> None:
    """Run the command on the ranks of torchrun's environment.  argv: None takes the process's own."""
    args = tyro.cli(args_type, prog=f"python -m {prog}", args=argv)
    try:
        with session() as dist:
            run(args, dist)
    except (CheckpointError, ConfigError, DataError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)  # as shells have it
