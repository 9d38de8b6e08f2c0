"""The command line that eval.semi and eval.finetune share, and what they write."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from eval.knn import result_path
from eval.protocols import table_line, write_result
from eval.tuning import FORMAT, Tuning, open_data
from eval.tuning_protocols import TUNING_PROTOCOLS, TuningProtocol, changed
from fastssl.checkpoint import CheckpointError, atomic_save
from fastssl.config import ConfigError
from fastssl.distributed import Dist, session
from fastssl.models.features import Backbone
from fastssl.models.official import left_out
from fastssl.models.weights import load_backbone
from fastssl.views import Photometric
from loaders.errors import DataError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class TuningArgs:
    """The settings default to the protocol's."""

    checkpoint: str
    """A run's checkpoint_last.pt or backbone.safetensors, other projects' files, or random:ARCH[:SEED]."""
    data: str = "data/imagenet"
    """Folder with train and val: .beton files or class folders."""
    subset: str = ""
    """Part of train to learn from, as --data.subset of train.py: 1percent, 10percent, first:N, after:N, random:N or a file of names."""
    queries: str = ""
    """Part of train to measure with instead of val, where hyper-parameters are chosen without it."""
    network: Literal["auto", "online", "target"] = "auto"
    """Which network of a training checkpoint; auto: the one its method is evaluated by (DINO, SCFS: the target, that is the teacher)."""
    epochs: int | None = None
    """Fewer epochs: the schedule is compressed, and the protocol is named with them."""
    batch: int | None = None
    """Images of a step on all ranks."""
    base_lr: float | None = None
    """Of the backbone, before it is scaled with the batch where the protocol scales it."""
    head_lr: float | None = None
    """Of the classifier, where it has its own."""
    resize: int | None = None
    """Shorter side of validation images before the centre crop, pixels."""
    crop: int | None = None
    """Side of all crops, pixels."""
    forward: int = 1024
    """Largest number of images per rank in one forward pass: a step takes several where it has more.  BatchNorm and mixup see one
    pass at a time (LEWEL's published runs: 64)."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto: the protocol's, and fp32 on a CPU."""
    seed: int = 0
    """Of the classifier's first weights, the order, the crops and what is drawn beside them."""
    loader: Literal["auto", "ffcv", "dali", "torchvision", "torchvision_cuda", "folder"] = "auto"
    """Decoder, as in train.py."""
    workers: int = 0
    """Decoder threads per rank; 0: the cores divided by the ranks."""
    out: Path | None = None
    """JSON of the result, with the trained model beside it; default: beside the checkpoint (none for a random backbone)."""


def measure(
    backbone: Backbone,
    data_path: str,
    protocol: TuningProtocol,
    *,
    dist: Dist,
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    normalisation: Photometric | None = None,
    out: Path | None = None,
    seed: int = 0,
    quiet: bool = False,
    **reading,
) -> dict:
    """The protocol's result on `data_path`.  The backbone is trained; give a copy of one that is needed.

    out       OUT.model.pt is the classifier after the last epoch, and what resuming needs is beside it
    reading   queries, forward, backend, workers of `open_data`

    Accuracies in percent: top1 and top5 are those of the best evaluation, last_* of the last epoch.
    """
    if dtype == "auto":
        dtype = protocol.dtype if dist.device.type == "cuda" else "fp32"
    norm = normalisation or Photometric()
    run_as = protocol.differences(backbone.num_features)
    data = open_data(data_path, protocol, dist=dist, normalisation=norm, seed=seed, **reading)
    tuning = Tuning(backbone, protocol, data, dist, DTYPES[dtype], seed)
    identity = {"protocol": asdict(protocol), "weights": tuning.digest, "data": data_path, "dtype": dtype, "seed": seed}
    identity |= {"images": data.train.num_samples, "classes": data.num_classes, "passes": data.passes, "processes": dist.world}
    identity |= {"mean": norm.mean, "std": norm.std, "queries": reading.get("queries", "")}
    tuning.run(out and out.with_suffix(".state.pt"), identity, print if dist.is_main and not quiet else lambda line: None)
    if out is not None and dist.is_main:
        classes = None if data.train.classes is None else list(data.train.classes)
        saved = {"format": FORMAT, "protocol": protocol.name, "run_as": run_as, "classes": classes, "crop": protocol.crop}
        atomic_save(saved | {"model": tuning.model.weights()}, out.with_suffix(".model.pt"))
    return summary(tuning, run_as, dtype)


def summary(tuning: Tuning, run_as: str, dtype: str) -> dict:
    """What is written and printed of a finished evaluation."""
    protocol, data, best = tuning.protocol, tuning.data, tuning.best
    evaluated = [r for r in tuning.history if r.top1 is not None]
    result = {"protocol": protocol.name, "run_as": run_as, "top1": best.top1, "top5": best.top5, "epoch": best.epoch}
    result |= {"last_top1": evaluated[-1].top1, "last_top5": evaluated[-1].top5, "best_top5": max(r.top5 for r in evaluated)}
    result |= {"num_train": data.train.num_samples, "num_val": data.val.num_samples, "weights": tuning.digest, "dtype": dtype}
    result |= {"settings": asdict(protocol), "images_per_pass": data.train.smallest_batch, "passes": data.passes}
    curve = [{n: v for n, v in asdict(r).items() if n != "per_class" and v is not None} for r in tuning.history]
    return result | {"curve": curve, "per_class": best.per_class}


def run(args: TuningArgs, name: str, dist: Dist) -> None:
    """The whole command for the protocol `name`."""
    if args.queries and not (args.subset or TUNING_PROTOCOLS[name].subset):
        raise ConfigError(f"--queries {args.queries} are images of train, and so are those to learn from: give them a part with --subset.")
    out = result_path(args, name, args.out)
    backbone, about = load_backbone(args.checkpoint, network=args.network)
    given = {field: getattr(args, field) for field in ("epochs", "batch", "base_lr", "head_lr", "resize", "crop")}
    protocol = changed(TUNING_PROTOCOLS[name].of_width(backbone.num_features), subset=args.subset or None, **given)
    origin = {field: about[field] for field in ("arch", "method", "step", "network")}
    if dist.is_main:
        print(f"{args.checkpoint} ({', '.join(f'{n} {v}' for n, v in origin.items() if v is not None)})")
        if about["dropped"]:
            print(f"not used: {left_out(about['dropped'])}")
    reading = {"queries": args.queries, "forward": args.forward, "backend": args.loader, "workers": args.workers}
    options = {"dtype": args.dtype, "normalisation": Photometric(**(about["normalisation"] or {})), "seed": args.seed, "out": out}
    result = measure(backbone, args.data, protocol, dist=dist, **options, **reading)
    if not dist.is_main:
        return
    if out is not None:
        write_result(
            out, {"checkpoint": args.checkpoint, **origin, "data": args.data, **result, "queries": args.queries, "seed": args.seed}
        )
    run_as = result["run_as"]
    print(f"{run_as}  top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  (best, after epoch {result['epoch']})")
    print(f"last epoch {result['last_top1']:.2f} %, top-5 {result['last_top5']:.2f} %")
    print(table_line(origin, run_as, f"{result['top1']:.2f}"))
    if out is not None:
        print(f"written to {out}")


def main(args_type: type[TuningArgs], prog: str, argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(args_type, prog=prog, args=argv)
    try:
        with session() as dist:
            run(args, args.protocol, dist)
    except (CheckpointError, ConfigError, DataError) as error:
        sys.exit(str(error))
