"""The published settings of segmentation evaluations by name (methods/transfer.md 5); what no source states says "Inferred"."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from eval.results import run_as
from eval.schedules import poly
from fastssl.config import ConfigError
from fastssl.optim.schedules import step_decay, warmup_from_zero_cosine


@dataclass(frozen=True, kw_only=True)
class SegmentationProtocol:
    name: str
    data: Literal["voc", "ade20k", "imagenets"]
    """Format of --data."""
    train_images: int
    """Of the published set; other numbers are named with the result."""
    val_images: int
    head: Literal["fcn", "fcn-moco", "upernet", "linear", "patches"]
    first_dilation: int = 1
    """fcn-moco: dilation of layer4's first block; the others have 2."""
    steps: int | None = None
    """Iterations on an endless shuffle of the images; None: `epochs`."""
    epochs: int | None = None
    """Each of as many whole batches as the images make."""
    batch: int = 16
    """Images of a step on all ranks."""
    optimizer: Literal["sgd", "adamw"]
    """sgd: momentum 0.9, the decay on everything.  adamw: betas .9 and .999, vectors do not decay."""
    lr: float
    weight_decay: float
    layer_decay: float = 1.0
    """adamw: learning rate of a block as a fraction of that of the block after it."""
    positions_decay: bool = False
    """adamw: [CLS] and positions decay, as in iBOT's code, whose list of exceptions names them otherwise."""
    drop_path: float = 0.0
    schedule: Literal["poly", "steps", "cosine"]
    """poly: to `min_lr`; steps: divided by 10 at `milestones`; cosine: half of one to `min_lr`."""
    power: float = 1.0
    """Of poly."""
    milestones: tuple[int, ...] = ()
    warmup: float = 0.0
    """Iterations, or epochs where the protocol counts those; poly's starts from a millionth, cosine's from 0."""
    min_lr: float = 0.0
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random size: of the box that an image is fitted into, or (imagenets) the crop's part of the area."""
    box: tuple[int, int] | None = (2048, 512)
    """The sides, long and short, that an image is fitted into before the random crop."""
    crop: int = 512
    """Side of the crops, pixels."""
    largest_share: float = 0.75
    """A crop is drawn again, ten times at most, while one class has this part of its labelled pixels or more; 1: never."""
    colours: Literal["none", "photometric", "jitter"]
    """photometric: mmsegmentation's distortion; jitter: torchvision's, grey and blur."""
    valid_only: bool = False
    """The loss is the mean over labelled pixels, not over all."""
    test: Literal["whole", "slide", "short_side"] = "whole"
    """The image in `test_box` at once, or in windows of the crop's size; or with the shorter side `test_side`."""
    test_box: tuple[int, int] | None = (2048, 512)
    """None: images keep their size."""
    stride: int = 341
    """slide: pixels between windows."""
    test_side: int = 256
    dtype: Literal["fp16", "fp32"] = "fp32"
    """A CPU computes in fp32."""

    def total_steps(self, images: int) -> int:
        return self.steps if self.steps is not None else self.epochs * self.epoch_steps(images)

    def epoch_steps(self, images: int) -> int:
        return images // self.batch

    def rate(self, step: int, images: int) -> float:
        """The learning rate of a step, counted from 0; adamw: of the head."""
        total = self.total_steps(images)
        unit = 1 if self.steps is not None else self.epoch_steps(images)
        warmup = self.warmup * unit
        match self.schedule:
            case "poly":
                lr = poly(step, base_lr=self.lr, min_lr=self.min_lr, power=self.power, steps=total)
                return lr * (1 - (1 - step / warmup) * (1 - 1e-6)) if step < warmup else lr
            case "steps":
                return step_decay(step, base_lr=self.lr, milestones=self.milestones)
            case "cosine":
                return warmup_from_zero_cosine(step, base=self.peak, final=self.min_lr, total_steps=total, warmup_steps=warmup)

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return self.lr * self.batch / 256 if self.schedule == "cosine" else self.lr

    def run_as(self, train_images: int, val_images: int, **more: object) -> str:
        """The name, and what differs from the published evaluation; more: what no protocol sets."""
        published = SEGMENTATION_PROTOCOLS[self.name]
        follow = ("warmup", "box", "stride", "test_side", *(("test_box",) if self.crop != published.crop else ()))
        counts = {"training images": (train_images, self.train_images), "validation images": (val_images, self.val_images)}
        other = {what: f"{ours} of {theirs}" for what, (ours, theirs) in counts.items() if ours != theirs}
        return run_as(self, published, without=follow, **other, **more)


def changed(
    protocol: SegmentationProtocol,
    *,
    steps: int | None = None,
    epochs: int | None = None,
    crop: int | None = None,
    **given: object,
) -> SegmentationProtocol:
    """With the command line's values, None for those not given: fewer steps compress the schedule, a crop scales all other sizes with it.

    ConfigError for impossible ones.
    """
    protocol = replace(protocol, **{name: value for name, value in given.items() if value is not None})
    for name, value in (("steps", steps), ("epochs", epochs)):
        published = getattr(protocol, name)
        if value is None:
            continue
        if published is None:
            raise ConfigError(f"{protocol.name} does not count {name}: set --{'epochs' if name == 'steps' else 'steps'}.")
        if value < 1:
            raise ConfigError(f"--{name} must be a positive number, got {value}.")
        part = value / published
        milestones = tuple(round(m * part) for m in protocol.milestones)
        protocol = replace(protocol, **{name: value}, milestones=milestones, warmup=protocol.warmup * part)
    if crop is not None:
        if crop < 32:
            raise ConfigError(f"--crop must be at least 32 pixels, got {crop}.")
        part = crop / protocol.crop
        # images that are measured in their own size go with the published crops
        ours = {"box": protocol.box, "test_box": protocol.test_box or protocol.box}
        boxes = {name: box and tuple(round(side * part) for side in box) for name, box in ours.items()}
        sides = {name: round(getattr(protocol, name) * part) for name in ("stride", "test_side")}
        protocol = replace(protocol, crop=crop, **boxes, **sides)
    if protocol.batch < 2 or protocol.lr <= 0:
        raise ConfigError(f"--batch must be at least 2 and --lr positive, got {protocol.batch} and {protocol.lr}.")
    if protocol.first_dilation not in (1, 2) or (protocol.first_dilation != 1 and protocol.head != "fcn-moco"):
        raise ConfigError("--moco-first-dilation is 1 or 2, and of voc/fcn-b.")
    return protocol


_VOC = {"data": "voc", "train_images": 10_582, "val_images": 1_449, "optimizer": "sgd"}
_ADE20K = {
    **{"data": "ade20k", "train_images": 20_210, "val_images": 2_000, "steps": 160_000, "optimizer": "adamw", "weight_decay": 0.05},
    **{"positions_decay": True, "schedule": "poly", "warmup": 1500, "colours": "photometric", "test": "slide", "dtype": "fp16"},
}

SEGMENTATION_PROTOCOLS = {
    p.name: p
    for p in (
        # DenseCL's, mmsegmentation's FCN-R50-d8 in 20k iterations.  Supervised 67.7, MoCo v2 of 200 epochs 67.5, DenseCL 69.4 (DenseCL's
        # README, 5 trials).  Inferred: LEWEL's 67.8 is of this protocol.
        SegmentationProtocol(
            name="voc/fcn-a",
            head="fcn",
            steps=20_000,
            lr=0.01,
            weight_decay=5e-4,
            schedule="poly",
            power=0.9,
            min_lr=1e-4,
            colours="photometric",
            **_VOC,
        ),
        # MoCo's appendix, values from SlotCon's configs.  Inferred: the first block's dilation, images tested at their own size.
        SegmentationProtocol(
            name="voc/fcn-b",
            head="fcn-moco",
            steps=30_000,
            lr=0.003,
            weight_decay=1e-4,
            schedule="steps",
            milestones=(21_000, 27_000),
            box=(2049, 513),
            crop=513,
            largest_share=1.0,
            colours="none",
            test_box=None,
            **_VOC,
        ),
        # iBOT's; its README has 50.0 for ViT-B.  The rates of ViT-B are those of its command; its files say 7e-4.
        SegmentationProtocol(name="ade20k/upernet-vits", head="upernet", lr=3e-5, layer_decay=0.9, drop_path=0.1, **_ADE20K),
        SegmentationProtocol(name="ade20k/upernet-vitb", head="upernet", lr=8e-5, layer_decay=0.65, drop_path=0.1, **_ADE20K),
        # 38.3 for ViT-B.  Inferred: the bias does not decay.
        SegmentationProtocol(name="ade20k/linear-vitb", head="linear", lr=8e-4, **_ADE20K),
        # ImageNetSegModel's zoo: SERE's ViT-S 41.0 on val, 40.2 on test.
        SegmentationProtocol(
            name="imagenets/sere",
            data="imagenets",
            train_images=9_190,
            val_images=12_419,
            head="patches",
            epochs=100,
            batch=256,
            optimizer="adamw",
            lr=5e-4,
            weight_decay=0.05,
            layer_decay=0.5,
            drop_path=0.1,
            schedule="cosine",
            warmup=5,
            min_lr=1e-6,
            scale=(0.14, 1.0),
            box=None,
            crop=224,
            largest_share=1.0,
            colours="jitter",
            valid_only=True,
            test="short_side",
            test_box=None,
            dtype="fp16",
        ),
    )
}
"""ImageNet-S in its size of 919 classes."""
