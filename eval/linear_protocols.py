"""`linear/...`: the published settings of linear evaluations.

A frozen backbone in eval mode, one linear layer (weights from N(0, 0.01), biases 0) on its un-normalised features, cross-entropy,
SGD with momentum 0.9, crops of area 0.08 to 1 (bilinear) and flips; every image of an epoch is used, the last batch is smaller.
Learning rates change by epoch and have no warm-up.  What differs is below; values that a paper or its code does not state say
"Inferred".  The kept images of the last batch do not depend on the number of ranks (the official samplers fill it up).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from eval.protocols import check_crop
from eval.results import run_as
from fastssl.config import ConfigError
from fastssl.optim.schedules import epoch_cosine, step_decay

SWEEP = (0.1, 0.2, 0.5, 2.0, 5.0, 10.0)
"""What `--sweep` multiplies a protocol's learning rate with."""
DECAYS, OPTIMIZERS = (0.0, 1e-6), ("sgd", "lars")
"""Further axes of the sweep (methods/ibot.md section 10)."""
LARGE = 768
"""Width from which a ViT's protocols take other features: ViT-B."""


@dataclass(frozen=True)
class Setting:
    """One classifier's optimisation."""

    base_lr: float
    lr: float
    """Of the first epoch."""
    weight_decay: float = 0.0
    """On weights and biases; LARS: on weights."""
    optimizer: Literal["sgd", "lars"] = "sgd"


@dataclass(frozen=True, kw_only=True)
class LinearProtocol:
    name: str
    epochs: int
    batch: int
    """Images of a step on all ranks."""
    base_lr: float | None = None
    """None: there is no one published; all of `base_lrs` are trained at once."""
    vit_lr: float | None = None
    """The same for ViTs, where it differs."""
    base_lrs: tuple[float, ...] = ()
    per_images: int | None = 256
    """lr = base lr x batch / per_images; None: lr = base lr for every batch."""
    milestones: tuple[int, ...] = ()
    """Epochs from which the learning rate is divided by 10; none: a cosine to 0, by epoch."""
    weight_decay: float = 0.0
    vit_features: tuple[str, str] = ("pooled", "pooled")
    """Kind of features (eval/features.py) of ViTs narrower than LARGE, and of the others; pooled for all other networks."""
    evaluate_every: int = 1
    """Epochs; and after the last."""
    reported: Literal["best", "last"] = "best"
    """Which epoch's accuracy is the published number."""
    resize: int = 256
    crop: int = 224
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Of the validation images."""

    def factor(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0, as a fraction of the first's."""
        if self.milestones:
            return step_decay(epoch, base_lr=1.0, milestones=self.milestones)
        return epoch_cosine(epoch, base_lr=1.0, epochs=self.epochs)

    def evaluated(self, epoch: int) -> bool:
        return epoch % self.evaluate_every == 0 or epoch == self.epochs - 1

    def shortened(self, epochs: int) -> LinearProtocol:
        """The same shape in fewer epochs: milestones at the same fractions."""
        return replace(self, epochs=epochs, milestones=tuple(round(m * epochs / self.epochs) for m in self.milestones))

    def features(self, *, vit: bool, width: int) -> str:
        return self.vit_features[width >= LARGE] if vit else "pooled"

    def settings(self, *, vit: bool, sweep: Literal["none", "lr", "all"] = "none") -> list[Setting]:
        """The classifiers to train: the published one first where there is one, then those of the sweep.

        lr adds other learning rates; all also weight decays 0 and 1e-6, and LARS, each with every learning rate.
        """
        published = self.vit_lr if vit and self.vit_lr is not None else self.base_lr
        first = [] if published is None else [(published, self.weight_decay, "sgd")]
        lrs = self.base_lrs
        if published is not None:
            lrs = (published, *(published * f for f in SWEEP)) if sweep != "none" else ()
        axes = (DECAYS, OPTIMIZERS) if sweep == "all" else ((self.weight_decay,), OPTIMIZERS[:1])
        scale = 1.0 if self.per_images is None else self.batch / self.per_images
        grid = dict.fromkeys([*first, *product(sorted(lrs), *axes)])
        return [Setting(lr, lr * scale, decay, optimizer) for lr, decay, optimizer in grid]

    def run_as(self, **more: str) -> str:
        """The name, what differs from the published settings, and `more`: "linear/dino, 5 of 100 epochs, subset first:20"."""
        published = LINEAR_PROTOCOLS[self.name]
        rates = ("base_lr", "vit_lr", "base_lrs")
        own_rate = any(getattr(self, name) != getattr(published, name) for name in rates)
        return run_as(self, published, without=rates, base_lr=f"{self.base_lr:g}" if own_rate else "", **more)


def changed(protocol: LinearProtocol, *, epochs: int | None, **given: float | None) -> LinearProtocol:
    """With the command line's values, None for those not given.  ConfigError for impossible ones."""
    if given.get("base_lr") is not None:
        protocol = replace(protocol, vit_lr=None, base_lrs=())
    protocol = replace(protocol, **{name: value for name, value in given.items() if value is not None})
    protocol = protocol if epochs is None else protocol.shortened(epochs)
    if min(protocol.epochs, protocol.batch, protocol.crop) < 1:
        raise ConfigError("--epochs, --batch and --crop must be positive numbers.")
    if protocol.base_lr is not None and not protocol.base_lr > 0:
        raise ConfigError(f"--base-lr must be positive, got {protocol.base_lr}.")
    check_crop(protocol.crop, protocol.resize)
    return protocol


LINEAR_PROTOCOLS = {
    p.name: p
    for p in (
        # methods/lewel.md 11.2.  The lr is not rescaled with the batch.
        LinearProtocol(name="linear/lewel", epochs=50, batch=256, base_lr=0.4, per_images=None, milestones=(30, 40), evaluate_every=5),
        # methods/dino.md 9.2: ViT-S four [CLS] tokens, ViT-B one and the mean patch token.  The lr of ResNets is inferred: the log of
        # the released ResNet-50 starts at .3.
        LinearProtocol(
            name="linear/dino",
            epochs=100,
            batch=1024,
            base_lr=0.075,
            vit_lr=0.001,
            vit_features=("last4", "cls+patches"),
            interpolation="bicubic",
        ),
        # methods/scfs.md section 8: DINO's with its own batch and lr (.08).
        LinearProtocol(
            name="linear/scfs",
            epochs=100,
            batch=2048,
            base_lr=0.01,
            vit_features=("last4", "cls+patches"),
            interpolation="bicubic",
            evaluate_every=5,
        ),
        # methods/sfrik.md section 10.  Which epoch is published is not established: inferred, what its code tracks.
        LinearProtocol(name="linear/sfrik", epochs=100, batch=256, base_lr=0.4, per_images=None, weight_decay=1e-6),
        # methods/vicreg.md: the same with upstream's lr.
        LinearProtocol(name="linear/vicreg", epochs=100, batch=256, base_lr=0.02, per_images=None, weight_decay=1e-6),
        # methods/mocov2.md section 7.  Last epoch: inferred.
        LinearProtocol(name="linear/moco", epochs=100, batch=256, base_lr=30.0, per_images=None, milestones=(60, 80), reported="last"),
        # methods/mocov3.md section 8.
        LinearProtocol(name="linear/mocov3", epochs=90, batch=1024, base_lr=0.1, vit_lr=3.0, reported="last"),
        # methods/w2ssl.md section 13.
        LinearProtocol(name="linear/w2ssl", epochs=100, batch=256, base_lr=0.1, reported="last"),
        # methods/ibot.md section 10: 45 classifiers in one pass; the best of all, over learning rates and epochs, is the published number.
        # ViT-B: the mean patch token beside [CLS] (here interleaved, which changes no number).
        LinearProtocol(
            name="linear/ibot",
            epochs=100,
            batch=1024,
            base_lrs=tuple(float(f"{n}e{e}") for e in (-4, -3, -2, -1, 0) for n in range(1, 10)),
            vit_features=("last4", "cls+patches"),
            interpolation="bicubic",
        ),
    )
}
