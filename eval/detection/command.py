"""The command: python -m eval.detection --checkpoint FILE --preset NAME --data DIR, also by torchrun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torchvision

from eval.command import ORIGIN, main
from eval.detection.annotations import DetectionSet, Photo
from eval.detection.coco import read_coco, with_masks
from eval.detection.data import MEAN, STD, TrainingPhotos
from eval.detection.model import detector_from_backbone
from eval.detection.presets import DETECTION_PRESETS, DetectionPreset, changed
from eval.detection.results import Found, coco_ap, detect
from eval.detection.training import FORMAT, Training
from eval.detection.voc import read_voc
from eval.detection.voc_ap import voc_ap
from eval.results import check_same, check_writable, publish, result_path, side_file, table_line, together
from fastssl.checkpoint import atomic_save
from fastssl.cli import check_name
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from fastssl.models.official import left_out
from fastssl.models.weights import load_backbone, weights_digest
from loaders.build import decoder_threads
from loaders.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train a detector on a pretrained ResNet by a published protocol, and measure it."""

    preset: str
    """The protocol, as lewel_coco_fpn_1x; --dry-run prints its values."""
    checkpoint: str | None = None
    """A run's checkpoint_last.pt or backbone.safetensors, other projects' files, or random:ARCH[:SEED]."""
    data: str | None = None
    """COCO's folder (annotations, train2017, val2017), or the one with VOCdevkit or with VOC2007 and VOC2012."""
    network: Literal["auto", "online", "target"] = "auto"
    """Which network of a training checkpoint; auto: the one its method is evaluated by."""
    batch: int | None = None
    """Images of a step on all ranks: the learning rate follows in proportion, the iterations inversely."""
    iterations: int | None = None
    """Fewer: the schedule is compressed, and the protocol is named with them."""
    lr_mult: float | None = None
    """Factor of the learning rate: LEWEL's README says that EMAN models prefer 2; what was used is not established."""
    syncbn: Literal["sync", "naive"] | None = None
    """BatchNorm over all ranks by element counts, or MoCo's: ranks weigh equally, the running variance is biased."""
    precise_bn: int | None = None
    """Training batches that the final BatchNorm statistics are taken from; 0 keeps those of training."""
    seed: int = 0
    """Of new weights, order, sizes, flips and sampled regions: trials differ by it."""
    workers: int = 0
    """Decoder threads per rank; 0: the cores divided by the ranks."""
    out: Path | None = None
    """JSON of the result, with the detector beside it; default: beside the checkpoint (none for a random backbone)."""
    picture: Path | None = None
    """PNG to draw: what was annotated and what was found in some validation images."""
    dry_run: bool = False
    """Print the values and stop; needs neither checkpoint nor data."""


def settings(args: Args) -> DetectionPreset:
    """The preset with the command line's changes.  ConfigError for impossible ones."""
    preset = check_name("preset", args.preset, DETECTION_PRESETS)
    given = {name: getattr(args, name) for name in ("batch", "iterations", "lr_mult", "syncbn", "precise_bn")}
    return changed(preset, **given)


def rank_batch(preset: DetectionPreset, world: int) -> int:
    """Images of a rank in a step.  ConfigError for unequal parts."""
    if preset.batch % world:
        raise ConfigError(f"A batch of {preset.batch} images cannot be shared by {world} processes: change --batch.")
    return preset.batch // world


def describe(preset: DetectionPreset, world: int) -> str:
    """All values, then what follows from them."""

    def lines(values: dict, indent: str):
        for name, value in values.items():
            if isinstance(value, dict):
                yield f"{indent}{name}"
                yield from lines(value, indent + "  ")
            else:
                yield f"{indent}{name:<22}{' '.join(map(str, value)) if isinstance(value, tuple) else value}"

    last = preset.iterations - 1
    points = sorted({0, min(preset.warmup, last), *(m for m in preset.milestones if m <= last), last})
    rates = ", ".join(f"{preset.lr(i):.6g} at {i}" for i in points)
    derived = {"images per rank": f"{rank_batch(preset, world)} ({world} ranks)", "learning rate": rates, "run as": preset.run_as}
    return "\n".join([f"detection/{preset.name}", *lines(asdict(preset), "  "), "derived", *lines(derived, "  ")])


def read(preset: DetectionPreset, folder: str) -> tuple[list[Photo], DetectionSet]:
    """What is learned from and what is measured with.  DataError for annotations that cannot be used."""
    path, masks = Path(folder), preset.detector.mask
    if preset.data == "coco":
        (split,) = preset.train
        train, test = read_coco(path, split), read_coco(path, preset.test)
    else:
        train, test = read_voc(path, preset.train), read_voc(path, (preset.test,))
    if train.classes != test.classes:
        raise DataError(f"The categories of {preset.train[0]} and {preset.test} in {folder} differ. Take both from one data set.")
    photos = train.learnable(masks=masks)
    if not photos:
        raise DataError(f"No image of {preset.train[0]} in {folder} has an object {'with a mask ' if masks else ''}to learn from.")
    if all(o.difficult for photo in test.photos for o in photo.objects):
        raise DataError(f"No image of {preset.test} in {folder} has an object to measure with. Complete the annotations.")
    if masks:
        test = replace(test, dataset=with_masks(test.dataset, f"{preset.test} in {folder}"))
    return photos, test


def evaluate(preset: DetectionPreset, test: DetectionSet, found: Sequence[Found]) -> dict:
    """The preset's average precision in percent.  VOC's comes with COCO's of the same detections, which compares with nothing published."""
    if preset.data == "coco":
        return coco_ap(test, found, masks=preset.detector.mask)
    return {"box": voc_ap(test, found, eleven_points=preset.eleven_points), "coco_style_box": coco_ap(test, found, masks=False)["box"]}


def measure(
    backbone_state: dict[str, torch.Tensor],
    folder: str,
    preset: DetectionPreset,
    *,
    dist: Dist,
    seed: int = 0,
    workers: int = 0,
    out: Path | None = None,
    picture: Path | None = None,
    quiet: bool = False,
    about: dict[str, object] | None = None,
) -> dict:
    """Train and measure a detector by `preset`; the result for the JSON.  Every rank calls it.

    out      OUT.model.pt is the detector, and what resuming needs is beside it until `publish`
    about    what else must be equal for a saved state to be continued
    """
    batch, threads = rank_batch(preset, dist.world), decoder_threads(workers, dist)
    say = print if dist.is_main and not quiet else lambda line: None
    photos, test = read(preset, folder)
    say(f"{len(photos)} images to learn from, {len(test.photos)} to measure with")
    preset = changed(preset, classes=len(test.classes))
    check_same(out, data=folder, run_as=preset.run_as, seed=seed)
    reading = {"batch": batch, "rank": dist.rank, "world": dist.world, "seed": seed, "threads": threads}
    images = TrainingPhotos(photos, preset.train_sides, preset.longest, masks=preset.detector.mask, **reading)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = detector_from_backbone(preset.detector, backbone_state)
    training = Training(detector.to(dist.device, memory_format=torch.channels_last), preset, images, dist, seed)
    state_file = out and side_file(out, "state")
    identity = {"preset": asdict(preset), "data": folder, "images": len(photos), "seed": seed, "processes": dist.world} | (about or {})
    training.run(state_file, identity, say)
    if out is not None:
        with together(dist, out):
            if dist.is_main:
                saved = {"format": FORMAT, "run_as": preset.run_as, "detector": asdict(preset.detector), "classes": test.classes}
                atomic_save(saved | {"model": detector.state_dict()}, side_file(out, "model"))
    found = detect(detector, test.photos, side=preset.test_side, longest=preset.longest, dist=dist, threads=threads)
    if picture is not None:
        from eval.detection.picture import draw  # Pillow's fonts are for this alone

        with together(dist, picture):
            if dist.is_main:
                draw(picture, test, found, title=preset.run_as)
    scores = dist.broadcast_object(evaluate(preset, test, found) if dist.is_main else None)
    result = {"protocol": f"detection/{preset.name}", "run_as": preset.run_as, **scores, "evaluated": "last iteration"}
    result |= {"num_train": len(photos), "num_val": len(test.photos), "num_found": sum(len(f.scores) for f in found)}
    return result | {"settings": asdict(preset), "torchvision": torchvision.__version__, "curve": training.curve}


def summary(result: dict) -> list[str]:
    """Lines for the terminal."""
    lines = []
    for kind in (k for k in ("box", "mask", "coco_style_box") if k in result):
        numbers = "  ".join(f"{n} {'-' if v is None else f'{v:.2f}'}" for n, v in result[kind].items() if n.startswith("AP"))
        means = f"  (means of {n} classes)" if (n := result[kind].get("classes_with_objects")) else ""
        lines.append(f"{result['run_as']}  {kind.replace('_', ' ')}  {numbers}{means}")
    return lines


def run(args: Args, dist: Dist) -> None:
    preset = settings(args)
    if args.dry_run:
        if dist.is_main:
            print(describe(preset, dist.world))
        return
    if args.checkpoint is None or args.data is None:
        raise ConfigError("Give a backbone with --checkpoint and the data set's folder with --data, or --dry-run to see the values.")
    backbone, found = load_backbone(args.checkpoint, network=args.network)
    if found["arch"] not in ("resnet18", "resnet50"):
        raise ConfigError(f"{args.checkpoint} holds a {found['arch']}, and detection takes ResNets. Give the checkpoint of one.")
    preset = changed(preset, arch=found["arch"])
    origin = {"checkpoint": args.checkpoint} | {name: found[name] for name in ORIGIN}
    out = result_path(args.checkpoint, args.out, f"detection/{preset.name}", found["network"], args.data, seed=args.seed)
    if args.picture is not None:
        check_writable(args.picture)
    if dist.is_main:
        print(f"{args.checkpoint} ({', '.join(f'{n} {v}' for n, v in origin.items() if n != 'checkpoint' and v is not None)})")
        if found["dropped"]:
            print(f"not used: {left_out(found['dropped'])}")
        print(preset.run_as, f"published: {preset.published}", sep="\n", flush=True)
    options = {"seed": args.seed, "workers": args.workers, "out": out, "picture": args.picture}
    about = {"weights": weights_digest(backbone)}
    result = measure(backbone.state_dict(), args.data, preset, dist=dist, about=about, **options)
    number = " / ".join(f"{result[kind]['AP']:.2f}" for kind in ("box", "mask") if kind in result)
    lines = [*summary(result), table_line(origin, f"{result['run_as']}, AP", number)]
    normalisation = {name: [round(level / 255, 6) for level in levels] for name, levels in (("mean", MEAN), ("std", STD))}
    publish({**origin, "data": args.data, **normalisation, "seed": args.seed, **about, **result}, lines, out, dist, trained=True)


def command(argv: Sequence[str] | None = None) -> None:
    main(Args, run, "eval.detection", argv)
