"""Semantic segmentation by a pretrained backbone, trained end to end by a published protocol.

python -m eval.segmentation --checkpoint runs/lewel/checkpoint_last.pt --protocol voc/fcn-a --data VOCdevkit/VOC2012
torchrun --nproc-per-node 4 -m eval.segmentation --checkpoint ... --protocol ade20k/upernet-vits --data ADEChallengeData2016
python -m eval.segmentation --protocol imagenets/sere --dry-run
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from eval import command
from eval.command import open_subject
from eval.results import check_same, check_writable, publish, result_path, side_file, table_line, together
from eval.segmentation.datasets import Annotated, open_annotated
from eval.segmentation.protocols import SEGMENTATION_PROTOCOLS, SegmentationProtocol, changed
from eval.segmentation.training import Segmentation
from fastssl.checkpoint import atomic_save, versions
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.models.features import Backbone
from fastssl.precision import DTYPES
from fastssl.views import Photometric


@dataclass(frozen=True, kw_only=True)
class Args:
    """mIoU after training a segmenter.  The settings default to the protocol's."""

    protocol: Literal["voc/fcn-a", "voc/fcn-b", "ade20k/upernet-vits", "ade20k/upernet-vitb", "ade20k/linear-vitb", "imagenets/sere"] = (
        "voc/fcn-a"
    )
    """Whose settings."""
    checkpoint: str = ""
    """A run's checkpoint_last.pt or backbone.safetensors, other projects' files, or random:ARCH[:SEED]."""
    data: str = "data/VOCdevkit/VOC2012"
    """VOC2012 (with SBD's SegmentationClassAug and aug.txt where they are), ADEChallengeData2016 or ImageNetS919."""
    network: Literal["auto", "online", "target"] = "auto"
    """Which network of a training checkpoint; auto: the one its method is evaluated by (DINO, SCFS: the target, that is the teacher)."""
    arch: str | None = None
    """The architecture that the checkpoint must have; default: what its weights fit."""
    mean: tuple[float, float, float] | None = None
    """Of the images as the backbone takes them, red, green, blue of 0 to 1; default: as the checkpoint says, or else ImageNet's."""
    std: tuple[float, float, float] | None = None
    """The same."""
    steps: int | None = None
    """Fewer iterations: the schedule is compressed, and the result named with them."""
    epochs: int | None = None
    """Fewer epochs, of protocols that count those."""
    batch: int | None = None
    """Images of a step on all ranks."""
    lr: float | None = None
    """The learning rate as the protocol states it (imagenets/sere: for 256 images)."""
    crop: int | None = None
    """Side of the crops, pixels; all other sizes of the protocol follow in proportion."""
    test_box: tuple[int, int] | None = None
    """Sides of the box that images are fitted into to be measured, long and short (voc/fcn-b in SlotCon's configs: 2049 513)."""
    moco_first_dilation: Literal[1, 2] | None = None
    """voc/fcn-b: dilation of layer4's first block; 2 is how MoCo's text can be read."""
    ce_norm: Literal["all", "valid"] | None = None
    """What the loss's sum over pixels is divided by: all, or those that count."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type; auto: the protocol's, and fp32 on a CPU."""
    seed: int = 0
    """Of the heads' first weights, the order, the crops and dropout."""
    workers: int = 0
    """Threads per rank that read and cut images; 0: the cores divided by the ranks."""
    out: Path | None = None
    """JSON of the result, with the trained model beside it; default: beside the checkpoint (none for a random backbone)."""
    picture: Path | None = None
    """PNG to draw: the first validation images, their labels and the predictions."""
    dry_run: bool = False
    """Print the settings, and stop; needs neither checkpoint nor data."""


def settings(args: Args) -> SegmentationProtocol:
    """The protocol with the command line's changes.  ConfigError for impossible ones."""
    given = {name: getattr(args, name) for name in ("steps", "epochs", "batch", "lr", "crop")}
    protocol = SEGMENTATION_PROTOCOLS[args.protocol]
    if args.test_box is not None and protocol.data != "voc":
        raise ConfigError("--test-box is of VOC's protocols.")
    if args.ce_norm is not None and protocol.head == "patches":
        raise ConfigError(f"--ce-norm is of the other protocols: {protocol.name} divides by the pixels that count.")
    valid_only = None if args.ce_norm is None else args.ce_norm == "valid"
    protocol = changed(protocol, first_dilation=args.moco_first_dilation, valid_only=valid_only, **given)
    return changed(protocol, test_box=args.test_box)  # after the crop, which scales the protocol's own


def measure(
    backbone: Backbone,
    data: Annotated,
    protocol: SegmentationProtocol,
    *,
    dist: Dist,
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    normalisation: Photometric | None = None,
    out: Path | None = None,
    picture: Path | None = None,
    source: str = "",
    seed: int = 0,
    workers: int = 0,
    quiet: bool = False,
) -> dict:
    """The protocol's result on `data`.  The backbone is trained; give a copy of one that is needed.

    out       OUT.model.pt is the segmenter after the last step, and what resuming needs is beside it until `publish`
    picture   PNG of predictions
    source    where `data` are, for telling a continued run from another

    mIoU, mAcc, aAcc (and ImageNet-S's F-measure) in percent, of the last step.
    """
    asked = "" if dtype in ("auto", protocol.dtype) else dtype
    run_as = protocol.run_as(len(data.train), len(data.val), dtype=asked)
    if dtype == "auto":
        dtype = protocol.dtype if dist.device.type == "cuda" else "fp32"
    norm = normalisation or Photometric()
    run = Segmentation(backbone, protocol, data, dist, DTYPES[dtype], norm, seed, workers)
    identity = {"protocol": asdict(protocol), "weights": run.digest, "data": source, "images": len(data.train), "classes": data.classes}
    identity |= {"dtype": dtype, "seed": seed, "mean": norm.mean, "std": norm.std, "processes": dist.world}
    check_same(out, data=source, run_as=run_as, seed=seed, mean=list(norm.mean), std=list(norm.std))
    state_file = out and side_file(out, "state")
    run.run(state_file, identity, (lambda line: print(line, flush=True)) if dist.is_main and not quiet else lambda line: None)
    scores = run.evaluate().result()
    iou = scores.pop("iou")
    result = {"protocol": protocol.name, "run_as": run_as, **scores}
    if picture is not None:
        from eval.segmentation.picture import draw  # Pillow's fonts are for this alone

        with together(dist, picture):
            if dist.is_main:
                draw(picture, run)
    if out is not None:
        model = side_file(out, "model")
        with together(dist, model):
            if dist.is_main:
                about = {"protocol": protocol.name, "run_as": run_as, "classes": data.classes, "names": data.names}
                atomic_save(about | {"model": run.model.state_dict()}, model)
    result |= {"num_train": len(data.train), "num_val": len(data.val), "processes": dist.world, "syncbn": "sync"}
    result |= {"weights": run.digest, "dtype": dtype, "seed": seed, "settings": asdict(protocol), "curve": [asdict(r) for r in run.history]}
    return result | {"iou": dict(zip(data.names or map(str, range(data.classes)), iou, strict=True))}


def show(protocol: SegmentationProtocol, dist: Dist) -> None:
    """The resolved settings, one a line, and what follows from them."""
    derived = {"images_per_rank": f"{protocol.batch / dist.world:g}", "peak_lr": f"{protocol.peak:g}"}
    for name, value in (asdict(protocol) | derived | {"total_steps": protocol.total_steps(protocol.train_images)}).items():
        print(f"{name:16} {value}")


def run(args: Args, dist: Dist) -> None:
    protocol = settings(args)
    if args.dry_run:
        if dist.is_main:
            show(protocol, dist)
        return
    if not args.checkpoint:
        raise ConfigError("Say which backbone with --checkpoint FILE, or look at the settings with --dry-run.")
    if args.picture is not None:
        check_writable(args.picture)
    data = open_annotated(args.data, protocol.data)
    subject = open_subject(args, dist)
    out = result_path(args.checkpoint, args.out, args.protocol, subject.network, args.data, seed=args.seed)
    if dist.is_main:
        print(subject)
    options = {"dtype": args.dtype, "normalisation": subject.normalisation, "seed": args.seed, "workers": args.workers}
    options |= {"out": out, "picture": args.picture, "source": args.data}
    result = subject.origin | measure(subject.backbone, data, protocol, dist=dist, **options) | {"versions": versions()}
    numbers = {name: f"{result[name]:.2f}" for name in ("mIoU", "mAcc", "aAcc", "F") if name in result}
    line = f"{result['run_as']}  {'  '.join(f'{name} {value} %' for name, value in numbers.items())}"
    publish(result, [line, table_line(result, result["run_as"], numbers["mIoU"])], out, dist, trained=True)


def main(argv: Sequence[str] | None = None) -> None:
    command.main(Args, run, "eval.segmentation", argv)


if __name__ == "__main__":
    main()
