"""The command line that eval.semi and eval.finetune share, and what they write."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from eval.command import EvaluationArgs, open_subject
from eval.results import check_same, publish, result_path, side_file, table_line, together
from eval.tuning import FORMAT, Tuning, open_data
from eval.tuning_protocols import TUNING_PROTOCOLS, TuningProtocol, changed
from fastssl.checkpoint import atomic_save
from fastssl.distributed import Dist
from fastssl.models.features import Backbone
from fastssl.precision import DTYPES
from fastssl.views import Photometric


@dataclass(frozen=True, kw_only=True)
class TuningArgs(EvaluationArgs):
    """The settings default to the protocol's.  An interrupted evaluation goes on after its last epoch."""

    protocol: str
    """Whose settings."""
    epochs: int | None = None
    """Fewer epochs: the schedule is compressed, and the protocol is named with them."""
    batch: int | None = None
    """Images of a step on all ranks."""
    base_lr: float | None = None
    """Of the backbone, before it is scaled with the batch where the protocol scales it."""
    head_lr: float | None = None
    """Of the classifier, where it has its own."""
    forward: int = 1024
    """Largest number of images per rank in one forward pass: a step takes several where it has more.  BatchNorm and mixup see one
    pass at a time (LEWEL's published runs: 64)."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto: the protocol's, and fp32 on a CPU."""
    seed: int = 0
    """Of the classifier's first weights, the order, the crops and what is drawn beside them."""
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

    out       OUT.model.pt is the classifier after the last epoch, and what resuming needs is beside it until `publish`
    reading   queries, forward, backend, workers of `open_data`

    Accuracies in percent: top1 and top5 are those of the best evaluation, last_* of the last epoch.
    """
    queries = reading.get("queries", "")
    run_as = protocol.run_as(backbone.num_features, dtype="" if dtype in ("auto", protocol.dtype) else dtype, queries=queries)
    if dtype == "auto":
        dtype = protocol.dtype if dist.device.type == "cuda" else "fp32"
    norm = normalisation or Photometric()
    data = open_data(data_path, protocol, dist=dist, normalisation=norm, seed=seed, **reading)
    tuning = Tuning(backbone, protocol, data, dist, DTYPES[dtype], seed)
    identity = {"protocol": asdict(protocol), "weights": tuning.digest, "data": data_path, "dtype": dtype, "seed": seed}
    identity |= {"images": data.train.num_samples, "classes": data.num_classes, "passes": data.passes, "processes": dist.world}
    identity |= {"mean": norm.mean, "std": norm.std, "queries": queries}
    check_same(out, data=data_path, run_as=run_as, seed=seed, mean=list(norm.mean), std=list(norm.std))
    state_file = out and side_file(out, "state")
    tuning.run(state_file, identity, print if dist.is_main and not quiet else lambda line: None)
    if out is not None:
        classes = None if data.train.classes is None else list(data.train.classes)
        saved = {"format": FORMAT, "protocol": protocol.name, "run_as": run_as, "classes": classes, "crop": protocol.crop}
        model = side_file(out, "model")
        with together(dist, model):
            if dist.is_main:
                atomic_save(saved | {"model": tuning.model.weights()}, model)
    return summary(tuning, run_as, dtype) | {"queries": queries, "seed": seed}


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


def run(args: TuningArgs, dist: Dist) -> None:
    args.check_parts(TUNING_PROTOCOLS[args.protocol].subset)
    subject = open_subject(args, dist)
    out = result_path(args.checkpoint, args.out, args.protocol, subject.network, args.data, args.subset, args.queries, seed=args.seed)
    if dist.is_main:
        print(subject)
    given = {field: getattr(args, field) for field in ("epochs", "batch", "base_lr", "head_lr", "resize", "crop")}
    protocol = TUNING_PROTOCOLS[args.protocol].of_width(subject.backbone.num_features)
    protocol = changed(protocol, subset=args.subset or None, **given)
    reading = {"queries": args.queries, "forward": args.forward, "backend": args.loader, "workers": args.workers}
    options = {"dtype": args.dtype, "normalisation": subject.normalisation, "seed": args.seed, "out": out}
    result = subject.origin | measure(subject.backbone, args.data, protocol, dist=dist, **options, **reading)
    run_as = result["run_as"]
    lines = [
        f"{run_as}  top-1 {result['top1']:.2f} %  top-5 {result['top5']:.2f} %  (best, after epoch {result['epoch']})",
        f"last epoch {result['last_top1']:.2f} %, top-5 {result['last_top5']:.2f} %",
        table_line(result, run_as, f"{result['top1']:.2f}"),
    ]
    publish(result, lines, out, dist, trained=True)
