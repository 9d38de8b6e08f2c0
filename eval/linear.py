"""Linear evaluation of a frozen backbone, by every published protocol.

python -m eval.linear --checkpoint runs/lewel/checkpoint_last.pt --data data/imagenet --protocol linear/lewel
torchrun --nproc-per-node 8 -m eval.linear --checkpoint ... --protocol linear/ibot
python -m eval.linear --checkpoint ... --eval-only --head runs/lewel/checkpoint_last.linear-lewel.head.pt --data other
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from eval.features import check_kind
from eval.knn import check_writable, result_path
from eval.linear_protocols import LINEAR_PROTOCOLS, LinearProtocol, changed
from eval.probe import BEST, PUBLISHED, Kept, Probe, open_data
from eval.protocols import table_line, write_result
from eval.saved_heads import measure_saved, save_heads
from fastssl.checkpoint import CheckpointError
from fastssl.config import ConfigError
from fastssl.distributed import Dist, session
from fastssl.models.features import Backbone
from fastssl.models.official import left_out
from fastssl.models.weights import load_backbone, output_checksum
from fastssl.views import Photometric
from loaders.errors import DataError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Accuracy of a linear classifier on a frozen backbone.  The settings default to the protocol's."""

    checkpoint: str
    """A run's checkpoint_last.pt or backbone.safetensors, other projects' files, or random:ARCH[:SEED]."""
    data: str = "data/imagenet"
    """Folder with train and val: .beton files or class folders."""
    protocol: Literal[
        "linear/lewel",
        "linear/dino",
        "linear/scfs",
        "linear/sfrik",
        "linear/vicreg",
        "linear/moco",
        "linear/mocov3",
        "linear/w2ssl",
        "linear/ibot",
    ] = "linear/lewel"
    """Whose settings."""
    subset: str = ""
    """Part of train to learn from, as --data.subset of train.py: 1percent, 10percent, first:N, after:N, random:N or a file of names."""
    queries: str = ""
    """Part of train to measure with instead of val, where hyper-parameters are chosen without it: after:260 for first:260 (SFRIK)."""
    network: Literal["auto", "online", "target"] = "auto"
    """Which network of a training checkpoint; auto: the one its method is evaluated by (DINO, SCFS: the target, that is the teacher)."""
    features: str = "auto"
    """auto: the protocol's for this architecture; pooled, or of ViTs cls, lastN ([CLS] of N blocks), patches, cls+patches."""
    sweep: Literal["none", "lr", "all"] = "none"
    """Train other learning rates in the same pass (published and best are reported apart); all: also weight decays 0 and 1e-6, and LARS."""
    epochs: int | None = None
    """Fewer epochs: the schedule is compressed, and the protocol is named with them."""
    batch: int | None = None
    """Images of a step on all ranks."""
    base_lr: float | None = None
    """Before it is scaled with the batch, where the protocol scales it."""
    resize: int | None = None
    """Shorter side of validation images before the centre crop, pixels."""
    crop: int | None = None
    """Side of all crops, pixels."""
    forward: int = 256
    """Largest number of images per rank in one forward pass; changes no result."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the backbone; classifiers are fp32."""
    seed: int = 0
    """Of the classifiers' first weights, the order and the crops."""
    loader: Literal["auto", "ffcv", "dali", "torchvision", "torchvision_cuda", "folder"] = "auto"
    """Decoder, as in train.py."""
    workers: int = 0
    """Decoder threads per rank; 0: the cores divided by the ranks."""
    eval_only: bool = False
    """Measure the classifiers of --head on val (or on --queries) and train nothing."""
    head: Path | None = None
    """The .head.pt that a linear evaluation of the same backbone wrote."""
    out: Path | None = None
    """JSON of the result, with the classifiers beside it; default: beside the checkpoint (none for a random backbone)."""


def measure(
    backbone: Backbone,
    data_path: str,
    protocol: LinearProtocol,
    *,
    dist: Dist,
    features: str = "auto",
    sweep: Literal["none", "lr", "all"] = "none",
    out: Path | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    quiet: bool = False,
    **reading,
) -> dict:
    """The protocol's result on `data_path`, of a backbone on `dist.device`; with `out`, OUT.head.pt and what resuming needs beside it.

    reading: subset, queries, forward, backend, workers, normalisation of `open_data`.  Accuracies in percent: top1 and top5 are those
    of the protocol's reported epoch; best_* the highest of all evaluations, each on its own.
    """
    backbone.requires_grad_(False)
    vit = hasattr(backbone, "last_blocks")
    kind = protocol.features(vit=vit, width=backbone.num_features) if features == "auto" else features
    check_kind(backbone, kind)
    settings = protocol.settings(vit=vit, sweep=sweep)
    data = open_data(data_path, protocol, dist=dist, dtype=dtype, seed=seed, **reading)
    probe = Probe(backbone, protocol, settings, protocol.base_lr is not None, data, dist, kind, dtype, seed)
    identity = {"protocol": str(protocol), "settings": [asdict(s) for s in settings], "weights": probe.digest, "features": kind}
    identity |= {"data": data_path, "dtype": str(dtype), "seed": seed, "images": data.train.num_samples, "classes": data.num_classes}
    identity |= {name: reading.get(name, "") for name in ("subset", "queries")}
    probe.run(out and out.with_suffix(".state.pt"), identity, print if dist.is_main and not quiet else lambda line: None)
    if out is not None and dist.is_main:
        save_heads(out.with_suffix(".head.pt"), probe)
    return summary(probe)


def summary(probe: Probe) -> dict:
    """What is written and printed of a finished evaluation."""
    protocol, data = probe.protocol, probe.data
    main = probe.kept[PUBLISHED if probe.published else BEST]
    curve = [
        {"epoch": r.epoch, "loss": _finite(r.loss[main.setting])} | ({"top1": r.top1[main.setting]} if r.top1 else {})
        for r in probe.history
    ]
    result = {"protocol": protocol.name, "run_as": str(protocol)} | _of(main)
    result |= {"reported": protocol.reported if probe.published else "best of all settings"} | _last_and_best(probe, main.setting)
    if probe.published and BEST in probe.kept:
        result["best_of_sweep"] = _of(probe.kept[BEST]) | asdict(probe.settings[probe.kept[BEST].setting])
    result |= asdict(probe.settings[main.setting]) | {"epochs": protocol.epochs, "batch": protocol.batch, "features": probe.kind}
    result |= {"crop": protocol.crop, "resize": protocol.resize, "interpolation": protocol.interpolation, "weights": probe.digest}
    result |= {"num_train": data.train.num_samples, "num_val": data.val.num_samples, "curve": curve, "per_class": main.per_class}
    if len(probe.settings) > 1:
        result["settings"] = [asdict(s) | _last_and_best(probe, k) for k, s in enumerate(probe.settings)]
    return result


def _of(kept: Kept) -> dict:
    return {"top1": kept.top1, "top5": kept.top5, "epoch": kept.epoch}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _last_and_best(probe: Probe, k: int) -> dict:
    evaluated = [r for r in probe.history if r.top1 is not None]
    tops = {name: [getattr(r, name)[k] for r in evaluated] for name in ("top1", "top5")}
    return {f"last_{n}": v[-1] for n, v in tops.items()} | {f"best_{n}": max(v) for n, v in tops.items()}


# ------------------------------------------------------------------------------------------------ command line


def output_path(args: Args) -> Path | None:
    """Where the JSON goes.  ConfigError when nothing can be written there."""
    if args.out is None and args.head is not None:
        out = args.head.with_name(f"{args.head.name.removesuffix('.head.pt')}.{args.queries.replace(':', '-') or 'val'}-only.json")
        check_writable(out)
        return out
    return result_path(args, args.protocol, args.out)


def check(args: Args) -> None:
    if args.eval_only != (args.head is not None):
        raise ConfigError("--eval-only measures the classifiers of --head FILE.head.pt: give both or neither.")
    if args.queries and not args.subset and not args.eval_only:
        raise ConfigError(f"--queries {args.queries} are images of train, and so are those to learn from: give them a part with --subset.")


def run(args: Args, dist: Dist) -> None:
    check(args)
    out = output_path(args)
    backbone, about = load_backbone(args.checkpoint, network=args.network)
    origin = {name: about[name] for name in ("arch", "method", "step", "network")} | {"output_checksum": output_checksum(backbone)}
    backbone = backbone.to(dist.device, memory_format=torch.channels_last)
    reading = {"queries": args.queries, "forward": args.forward, "backend": args.loader, "workers": args.workers}
    reading["normalisation"] = Photometric(**(about["normalisation"] or {}))
    if dist.is_main:
        known = ", ".join(f"{name.replace('_', ' ')} {v}" for name, v in origin.items() if v is not None)
        print(f"{args.checkpoint} ({known})")
        if about["dropped"]:
            print(f"not used: {left_out(about['dropped'])}")
    if args.eval_only:
        result = measure_saved(args.head, backbone, args.data, dist=dist, **reading)
    else:
        given = {name: getattr(args, name) for name in ("epochs", "batch", "base_lr", "resize", "crop")}
        protocol = changed(LINEAR_PROTOCOLS[args.protocol], **given)
        options = {"features": args.features, "sweep": args.sweep, "seed": args.seed, "dtype": DTYPES[args.dtype], "out": out}
        result = measure(backbone, args.data, protocol, dist=dist, subset=args.subset, **options, **reading)
        result["run_as"] += "".join(f", {name} {value}" for name in ("subset", "queries") if (value := getattr(args, name)))
        result |= {"dtype": args.dtype, "subset": args.subset, "queries": args.queries, "sweep": args.sweep, "seed": args.seed}
    if not dist.is_main:
        return
    result = {"checkpoint": args.checkpoint, **origin, "data": args.data, **result}
    if out is not None:
        write_result(out, result)
    for line in report(result):
        print(line)
    if out is not None:
        print(f"written to {out}")


def report(result: dict) -> list[str]:
    """The numbers with their protocol, and a line for a table of results."""
    shown, at = result["run_as"], f"lr {result['lr']:g}, weight decay {result['weight_decay']:g}, {result['optimizer']}"
    lines = [f"{shown}  top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  (after epoch {result['epoch']}, {at})"]
    if "last_top1" in result:
        lines[0] += f"; {result['reported']} is reported"
        lines.append(f"last epoch {result['last_top1']:.2f} %, best {result['best_top1']:.2f} %")
    if best := result.get("best_of_sweep"):
        lines.append(
            f"best of the sweep  top-1 {best['top1']:.2f} %  (after epoch {best['epoch']}, lr {best['lr']:g}, weight decay "
            f"{best['weight_decay']:g}, {best['optimizer']}): not the protocol's number"
        )
    return [*lines, table_line(result, f"{shown}, {result['features']}", f"{result['top1']:.2f}")]


def main(argv: Sequence[str] | None = None) -> None:
    args = tyro.cli(Args, prog="python -m eval.linear", args=argv)
    try:
        with session() as dist:
            run(args, dist)
    except (CheckpointError, ConfigError, DataError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
