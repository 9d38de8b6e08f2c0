"""Linear evaluation of a frozen backbone, by every published protocol.

python -m eval.linear --checkpoint runs/lewel/checkpoint_last.pt --data data/imagenet --protocol linear/lewel
torchrun --nproc-per-node 8 -m eval.linear --checkpoint ... --protocol linear/ibot
python -m eval.linear --checkpoint ... --eval-only --head runs/lewel/checkpoint_last.linear-lewel.online.imagenet.head.pt --data other
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from eval import command
from eval.command import EvaluationArgs, open_subject
from eval.features import SharedFeatures, check_kind
from eval.linear_protocols import LINEAR_PROTOCOLS, LinearProtocol, changed
from eval.probe import BEST, PUBLISHED, Kept, Probe, open_data
from eval.results import check_same, check_writable, data_name, publish, result_path, side_file, table_line, together
from eval.saved_heads import measure_saved, save_heads
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.models.features import Backbone
from fastssl.models.resnet import ResNet
from fastssl.precision import DTYPES, name_of
from fastssl.views import Photometric


@dataclass(frozen=True, kw_only=True)
class Args(EvaluationArgs):
    """Accuracy of a linear classifier on a frozen backbone.  The settings default to the protocol's.

    An interrupted evaluation goes on after its last epoch.
    """

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
    kind: str = "auto"
    """Features.  auto: the protocol's for this architecture; pooled, or of ViTs cls, lastN ([CLS] of N blocks), patches, cls+patches."""
    sweep: Literal["none", "lr", "all"] = "none"
    """Train other learning rates in the same pass (published and best are reported apart); all: also weight decays 0 and 1e-6, and LARS."""
    epochs: int | None = None
    """Fewer epochs: the schedule is compressed, and the protocol is named with them."""
    batch: int | None = None
    """Images of a step on all ranks."""
    base_lr: float | None = None
    """Before it is scaled with the batch, where the protocol scales it."""
    forward: int = 256
    """Largest number of images per rank in one forward pass; changes no result."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast type of the backbone; classifiers are fp32."""
    seed: int = 0
    """Of the classifiers' first weights, the order and the crops."""
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
    kind: str = "auto",
    sweep: Literal["none", "lr", "all"] = "none",
    out: Path | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    quiet: bool = False,
    shared: SharedFeatures | None = None,
    normalisation: Photometric | None = None,
    **reading,
) -> dict:
    """The protocol's result on `data_path`, of a backbone on `dist.device`; with `out`, OUT.head.pt and, until `publish`, what
    resuming needs beside it.

    shared: of evaluations of the same data; default: features are not kept.  normalisation: its mean and std, default ImageNet's.
    reading: subset, queries, forward, backend, workers of `open_data`.  Accuracies in percent: top1 and top5 are those
    of the protocol's reported epoch; best_* the highest of all evaluations, each on its own.
    """
    backbone.requires_grad_(False)
    vit = hasattr(backbone, "last_blocks")
    if not vit and not isinstance(backbone, ResNet) and protocol.vit_lr is not None:
        raise ConfigError(
            f"{protocol.name} has a learning rate of ResNets ({protocol.base_lr:g}) and one of ViTs ({protocol.vit_lr:g}), and none is "
            f"published for a {type(backbone).__name__}: choose it with --base-lr, or take linear/ibot, which tries 45."
        )
    published = protocol.features(vit=vit, width=backbone.num_features)
    kind = published if kind == "auto" else kind
    check_kind(backbone, kind)
    settings = protocol.settings(vit=vit, sweep=sweep)
    norm = normalisation or Photometric()
    data = open_data(data_path, protocol, dist=dist, dtype=dtype, seed=seed, normalisation=norm, **reading)
    probe = Probe(backbone, protocol, settings, protocol.base_lr is not None, data, dist, kind, dtype, seed, shared or SharedFeatures(0))
    precision = name_of(dtype)
    parts = {name: reading.get(name, "") for name in ("subset", "queries")}
    named = {"kind": "" if kind == published else kind, "dtype": "" if precision == "fp32" else precision, **parts}
    run_as = protocol.run_as(**named)
    identity = {"protocol": run_as, "settings": [asdict(s) for s in settings], "weights": probe.digest, "kind": kind}
    identity |= {"data": data_path, "dtype": precision, "seed": seed, "images": data.train.num_samples, "classes": data.num_classes}
    identity |= {"mean": norm.mean, "std": norm.std}
    check_same(out, data=data_path, run_as=run_as, seed=seed, sweep=sweep, mean=list(norm.mean), std=list(norm.std))
    state_file = out and side_file(out, "state")
    probe.run(state_file, identity, print if dist.is_main and not quiet else lambda line: None)
    if out is not None:
        head = side_file(out, "head")
        with together(dist, head):
            if dist.is_main:
                save_heads(head, probe, run_as, norm)
    how = {"dtype": precision, **parts, "sweep": sweep, "seed": seed}
    return {"protocol": protocol.name, "run_as": run_as} | summary(probe) | how


def summary(probe: Probe) -> dict:
    """What a finished evaluation has found, and how."""
    protocol, data = probe.protocol, probe.data
    main = probe.kept[PUBLISHED if probe.published else BEST]
    curve = [
        {"epoch": r.epoch, "loss": _finite(r.loss[main.setting])} | ({"top1": r.top1[main.setting]} if r.top1 else {})
        for r in probe.history
    ]
    result = _of(main) | {"reported": protocol.reported if probe.published else "best of all settings"}
    result |= _last_and_best(probe, main.setting)
    if probe.published and BEST in probe.kept:
        result["best_of_sweep"] = _of(probe.kept[BEST]) | asdict(probe.settings[probe.kept[BEST].setting])
    result |= asdict(probe.settings[main.setting]) | {"epochs": protocol.epochs, "batch": protocol.batch, "kind": probe.kind}
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


HONOURED = ("checkpoint", "data", "queries", "network", "arch", "mean", "std", "forward", "loader", "workers", "eval_only", "head", "out")
"""Flags that a saved head leaves open."""


def check(args: Args) -> None:
    if args.eval_only != (args.head is not None):
        raise ConfigError("--eval-only measures the classifiers of --head FILE.head.pt: give both or neither.")
    if not args.eval_only:
        args.check_parts()
        return
    given = [f.name for f in fields(args) if f.name not in HONOURED and getattr(args, f.name) != f.default]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(f"--eval-only measures the classifiers as they were trained: leave {flags} out.")


def eval_only_path(args: Args) -> Path:
    """`out`, or HEAD.DATA.QUERIES-only.json; ConfigError where nothing can be written."""
    part = args.queries.replace(":", "-").replace("/", "-") or "val"
    out = args.out or args.head.with_name(f"{args.head.name.removesuffix('.head.pt')}.{data_name(args.data)}.{part}-only.json")
    check_writable(out)
    return out


def run(args: Args, dist: Dist, shared: SharedFeatures | None = None) -> None:
    """shared: as for `measure`."""
    check(args)
    subject = open_subject(args, dist)
    if dist.is_main:
        print(subject)
    reading = {"queries": args.queries, "forward": args.forward, "backend": args.loader, "workers": args.workers}
    reading["normalisation"] = subject.normalisation
    if args.eval_only:
        out = eval_only_path(args)
        result = measure_saved(args.head, subject.backbone, args.data, dist=dist, out=out, **reading)
    else:
        out = result_path(args.checkpoint, args.out, args.protocol, subject.network, args.data, args.subset, args.queries, seed=args.seed)
        given = {name: getattr(args, name) for name in ("epochs", "batch", "base_lr", "resize", "crop")}
        protocol = changed(LINEAR_PROTOCOLS[args.protocol], **given)
        options = {"kind": args.kind, "sweep": args.sweep, "seed": args.seed, "dtype": DTYPES[args.dtype], "out": out, "shared": shared}
        result = measure(subject.backbone, args.data, protocol, dist=dist, subset=args.subset, **options, **reading)
    result = subject.origin | result
    publish(result, report(result), out, dist, trained=not args.eval_only)


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
    return [*lines, table_line(result, f"{shown}, {result['kind']}", f"{result['top1']:.2f}")]


def main(argv: Sequence[str] | None = None) -> None:
    command.main(Args, run, "eval.linear", argv)


if __name__ == "__main__":
    main()
