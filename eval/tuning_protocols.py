"""`semi/...`, `finetune/...` and `transfer/...`: the published settings of evaluations that train the whole network.

A new linear layer on the backbone, both trained, cross-entropy, crops and flips.  What differs is below; values that a paper or its
code does not state say "Inferred".  Where fp16 is said, a CPU computes in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from eval.protocols import check_crop
from eval.results import run_as
from fastssl.config import ConfigError
from fastssl.optim.schedules import epoch_cosine, step_decay, timm_cosine, warmup_cosine, warmup_from_zero_cosine

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
"""timm's name of it."""


@dataclass(frozen=True, kw_only=True)
class TuningProtocol:
    name: str
    epochs: int
    batch: int
    """Images of a step on all ranks."""
    optimizer: Literal["sgd", "adamw"]
    """sgd: momentum 0.9, the decay on everything.  adamw: betas .9 and .999; vectors, [CLS] and positions do not decay."""
    base_lr: float
    """Of the backbone; adamw: of all, layer decay apart."""
    head_lr: float | None = None
    """sgd: of the new layer."""
    per_images: int | None = None
    """Peak lr = base lr x batch / per_images; None: the base lr for every batch."""
    schedule: Literal["steps", "epoch_cosine", "mae", "beit", "timm"]
    """steps: divided by 10 at `milestones`; epoch_cosine: to 0, by epoch; the others warm up and follow a cosine to `min_lr`, by
    iteration (mae: from 0, beit: numpy.linspace), or by epoch (timm's scheduler)."""
    milestones: tuple[int, ...] = ()
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    """timm: of the first epoch."""
    min_lr: float = 0.0
    weight_decay: float = 0.0
    layer_decay: float = 1.0
    """Learning rate of a block as a fraction of that of the block after it."""
    drop_path: float = 0.0
    """Of the last block, growing linearly from 0."""
    pooling: Literal["backbone", "mean_patches"] = "backbone"
    """What the layer sees: the backbone's pooled feature (ViTs: [CLS] after the final LayerNorm), or the mean patch token of the
    last block and a new LayerNorm in place of the final one."""
    head_std: float | None = None
    """The new weights come from N(0, head_std), biases are 0; None: PyTorch's default of a linear layer for both."""
    vit_only: bool = True
    subset: str = ""
    """Part of train; "" is all."""
    min_scale: float = 0.08
    """Smallest area of a training crop."""
    train_interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    rand_augment: str = ""
    """timm's name; none."""
    erase: float = 0.0
    """Probability of random erasing with pixels from N(0, 1)."""
    mixup: float = 0.0
    """Alpha of its Beta law; where cutmix is on, too, each batch takes one of them at random."""
    cutmix: float = 0.0
    smoothing: float = 0.0
    """Of labels."""
    repeats: int = 1
    """Repeated augmentation: so many views of batch / repeats images make a step, and a repeats-th of the images an epoch."""
    last_batch: Literal["drop", "keep"] = "drop"
    """Of an epoch, where it is smaller."""
    dtype: Literal["fp16", "fp32"] = "fp16"
    evaluate_every: int = 1
    """Epochs; and after the last.  The best evaluation is reported (of all but LEWEL: Inferred)."""
    resize: int = 256
    crop: int = 224
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Of the validation images."""

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def lr(self, step: float, steps_per_epoch: int) -> float:
        """The backbone's learning rate (adamw: of the head) in a step, counted from 0."""
        epoch = step // steps_per_epoch
        peak = self.base_lr * (1.0 if self.per_images is None else self.batch / self.per_images)
        total, warmup = self.epochs * steps_per_epoch, self.warmup_epochs * steps_per_epoch
        match self.schedule:
            case "steps":
                return step_decay(epoch, base_lr=peak, milestones=self.milestones)
            case "epoch_cosine":
                return epoch_cosine(epoch, base_lr=peak, epochs=self.epochs)
            case "mae":
                return warmup_from_zero_cosine(step, base=peak, final=self.min_lr, total_steps=total, warmup_steps=warmup)
            case "beit":
                return warmup_cosine(step, base=peak, final=self.min_lr, total_steps=total, warmup_steps=round(warmup))
            case "timm":
                ends = {"final": self.min_lr, "start": self.warmup_lr}
                return timm_cosine(epoch, base=peak, epochs=self.epochs, warmup_epochs=self.warmup_epochs, **ends)

    def evaluated(self, epoch: int) -> bool:
        return epoch % self.evaluate_every == 0 or epoch == self.epochs - 1

    def shortened(self, epochs: int) -> TuningProtocol:
        """The same shape in fewer epochs: warm-up and milestones at the same fractions."""
        part = epochs / self.epochs
        milestones = tuple(round(m * part) for m in self.milestones)
        return replace(self, epochs=epochs, warmup_epochs=self.warmup_epochs * part, milestones=milestones)

    def of_width(self, width: int) -> TuningProtocol:
        """For a backbone with so many features: some differ for ViT-B and ViT-L."""
        given = [values for least, values in OF_WIDTH.get(self.name, {}).items() if width >= least]
        return replace(self, **given[-1]) if given else self

    def run_as(self, width: int, **more: str) -> str:
        """The name, what differs from the published settings, and `more`: "finetune/mae, 5 of 100 epochs"."""
        return run_as(self, TUNING_PROTOCOLS[self.name].of_width(width), **more)


def changed(protocol: TuningProtocol, *, epochs: int | None = None, **given: float | str | None) -> TuningProtocol:
    """With the command line's values, None for those not given.  ConfigError for impossible ones."""
    if given.get("head_lr") is not None and protocol.optimizer == "adamw":
        raise ConfigError(f"{protocol.name} has one learning rate for backbone and head: set --base-lr, and leave --head-lr out.")
    protocol = replace(protocol, **{name: value for name, value in given.items() if value is not None})
    if min(protocol.epochs if epochs is None else epochs, protocol.batch, protocol.crop) < 1:
        raise ConfigError("--epochs, --batch and --crop must be positive numbers.")
    if not (protocol.base_lr > 0 and (protocol.head_lr is None or protocol.head_lr > 0)):
        raise ConfigError("--base-lr and --head-lr must be positive.")
    check_crop(protocol.crop, protocol.resize)
    return protocol if epochs is None else protocol.shortened(epochs)


def _semi(name: str, **options) -> TuningProtocol:
    """Semi-supervised: backbone and classifier have learning rates of their own, bilinear crops, all in fp32 (LEWEL: Inferred)."""
    common = {"batch": 256, "optimizer": "sgd", "vit_only": False, "last_batch": "keep", "dtype": "fp32"}
    return TuningProtocol(name=name, **common, train_interpolation="bilinear", interpolation="bilinear", **options)


# methods/lewel.md 11.3.  That code and EMAN's publish no accuracy of these settings.
_LEWEL = {"epochs": 50, "schedule": "steps", "milestones": (30, 40), "weight_decay": 1e-4, "evaluate_every": 5}
# methods/sfrik.md 10.  Which epoch is published is not established: Inferred, the best.
_SFRIK = {"epochs": 20, "schedule": "epoch_cosine", "head_std": 0.01}
_ADAMW = {"batch": 1024, "optimizer": "adamw", "weight_decay": 0.05, "smoothing": 0.1}
_STRONG = {"rand_augment": RAND_AUGMENT, "erase": 0.25, "mixup": 0.8, "cutmix": 1.0}
# DeiT's head, schedule and repeated augmentation.  Inferred: the head's spread, the first epoch's rate of 1e-6, that the rate of an
# epoch is timm's of that epoch, that an epoch sees a third of the images, and fp16.
_DEIT = {"schedule": "timm", "per_images": 512, "warmup_lr": 1e-6, "min_lr": 1e-5, "head_std": 0.02}


def _transfer(data: str, **options) -> TuningProtocol:
    """methods/mocov3.md 8.  Smoothing, interpolation (bilinear) and precision: Inferred, those of DeiT and torchvision."""
    common = _ADAMW | _DEIT | {"epochs": 100, "base_lr": 3e-4, "warmup_epochs": 3, "drop_path": 0.1, "min_scale": 0.05}
    return TuningProtocol(name=f"transfer/mocov3{data}", train_interpolation="bilinear", interpolation="bilinear", **common | options)


TUNING_PROTOCOLS = {
    p.name: p
    for p in (
        _semi("semi/lewel-1pct", subset="1percent", base_lr=0.0001, head_lr=1.0, **_LEWEL),
        _semi("semi/lewel-10pct", subset="10percent", base_lr=0.01, head_lr=0.1, **_LEWEL),
        _semi("semi/sfrik-1pct", subset="1percent", base_lr=0.004, head_lr=1.0, **_SFRIK),
        _semi("semi/sfrik-10pct", subset="10percent", base_lr=0.02, head_lr=0.1, **_SFRIK),
        # methods/sere.md 9: MAE's recipe with the command published for ViT-B; nothing is published for ViT-S, which takes the same.
        # MAE's own ViT-B: 83.6 (mean of 4 runs).
        TuningProtocol(
            name="finetune/mae",
            epochs=100,
            base_lr=5e-4,
            per_images=256,
            schedule="mae",
            warmup_epochs=5,
            min_lr=1e-6,
            layer_decay=0.65,
            drop_path=0.1,
            pooling="mean_patches",
            head_std=2e-5,
            **_ADAMW,
            **_STRONG,
        ),
        # methods/ibot.md 10: BEiT's recipe; the authors sweep the lr.  ViT-S here, ViT-B and ViT-L in OF_WIDTH.
        TuningProtocol(
            name="finetune/ibot",
            epochs=200,
            base_lr=4e-3,
            schedule="beit",
            warmup_epochs=20,
            min_lr=1e-6,
            layer_decay=0.75,
            drop_path=0.1,
            head_std=2e-5,
            interpolation="bilinear",
            **_ADAMW,
            **_STRONG,
        ),
        # methods/mocov3.md 8 and ibot.md 10: DeiT's defaults; its lr of 5e-4 per 512 images: Inferred.
        TuningProtocol(
            name="finetune/mocov3", epochs=150, base_lr=5e-4, warmup_epochs=5, drop_path=0.1, repeats=3, **_ADAMW, **_STRONG, **_DEIT
        ),
        # ViT-B of 300 epochs: CIFAR-10 98.9, CIFAR-100 90.5, Flowers-102 97.7, Pets 93.2.
        _transfer("", mixup=0.8, cutmix=1.0, weight_decay=0.1),
        _transfer("-cifar100", mixup=0.5, cutmix=1.0, weight_decay=0.1),
        _transfer("-flowers", erase=0.25, weight_decay=0.3),
        _transfer("-pets", mixup=0.8, weight_decay=0.1, drop_path=0.0),
    )
}
"""transfer/mocov3 alone has the values of CIFAR-10."""

OF_WIDTH = {
    "finetune/ibot": {
        768: {"epochs": 100, "drop_path": 0.2, "layer_decay": 0.65},
        1024: {"epochs": 50, "drop_path": 0.4, "warmup_epochs": 5},
    }
}
"""What differs for backbones from so many features on, ascending."""
