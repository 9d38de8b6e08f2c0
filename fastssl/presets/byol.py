"""BYOL (arXiv 2006.07733) and BYOL-EMAN (arXiv 2101.08482).

All: ImageNet-1k, two 224 px views, projector and predictor 4096 wide, K = 256, LARS with momentum 0.9 and trust coefficient
0.001, learning rate as given, 10 warm-up epochs.  Views are the EMAN code base's (smallest crop 0.2, bilinear); DeepMind's
augmentation (smallest crop 0.08, bicubic, additive brightness) is not theirs.  Head BatchNorm weights are adapted and decayed.
"""

from __future__ import annotations

from fastssl.config import EvalConfig, Lars, LogConfig, ModelConfig, RunConfig, TrainConfig
from fastssl.methods.byol import BYOL
from fastssl.recipes import byol_asymmetric

EXCLUDE = ("bn", "downsample.1", "bias")


def _imagenet(name: str, *, norm: str, lr: float, weight_decay: float, train: TrainConfig) -> RunConfig:
    """What all ImageNet presets of this file share."""
    return RunConfig(
        preset=name,
        method=BYOL.Config(),
        model=ModelConfig(arch="resnet50", norm=norm),
        views=byol_asymmetric(size=224, min_scale=0.2),
        optim=Lars(base_lr=lr, weight_decay=weight_decay, warmup_epochs=10, exclude=EXCLUDE),
        train=train,
        log=LogConfig(keep_every=20),
        eval=EvalConfig(knn_every_epochs=5),
    )


def byol_eman_r50_100ep() -> RunConfig:
    """BYOL-EMAN as LEWEL's 100-epoch run has it, 8 ranks x 128: the fair baseline of LEWEL.  Not published (70.6 linear top-1 is
    implied by LEWEL's abstract: inferred)."""
    train = TrainConfig(epochs=100, global_batch_size=1024, ema_momentum=0.98, published_rank_batch=128)
    return _imagenet("byol_eman_r50_100ep", norm="eman", lr=3.6, weight_decay=1e-6, train=train)


def byol_eman_r50_200ep() -> RunConfig:
    """BYOL-EMAN, 200 epochs, 8 ranks x 64: 72.2 linear top-1, 55.1 / 66.7 with 1 % / 10 % of the labels.

    Numbers: EMAN's README, not measured by us.  The published run trained in fp32.
    """
    train = TrainConfig(epochs=200, global_batch_size=512, ema_momentum=0.98, published_rank_batch=64)
    return _imagenet("byol_eman_r50_200ep", norm="eman", lr=1.8, weight_decay=1e-6, train=train)


def byol_r50_100ep() -> RunConfig:
    """BYOL with SyncBN, 100 epochs, batch 4096, lr 0.45 x 16 (values of DeepMind's code)."""
    train = TrainConfig(epochs=100, global_batch_size=4096, ema_momentum=0.99)
    return _imagenet("byol_r50_100ep", norm="sync", lr=7.2, weight_decay=1e-6, train=train)


def byol_r50_300ep() -> RunConfig:
    """BYOL with SyncBN, 300 epochs, batch 4096, lr 0.3 x 16 (values of DeepMind's code): 72.5 linear top-1 (paper, quoted from memory by
    the specification)."""
    train = TrainConfig(epochs=300, global_batch_size=4096, ema_momentum=0.99)
    return _imagenet("byol_r50_300ep", norm="sync", lr=4.8, weight_decay=1e-6, train=train)


def byol_r50_1000ep() -> RunConfig:
    """BYOL with SyncBN, 1000 epochs, batch 4096, lr 0.2 x 16 (values of DeepMind's code): 74.3 linear top-1 (paper, quoted from memory by
    the specification)."""
    train = TrainConfig(epochs=1000, global_batch_size=4096, ema_momentum=0.996)
    return _imagenet("byol_r50_1000ep", norm="sync", lr=3.2, weight_decay=1.5e-6, train=train)


def byol_mini() -> RunConfig:
    """BYOL, ResNet-18, 64 px: minutes on two CPU cores, for tests and comparisons.  All values ours; local BatchNorm as in `lewel_mini`."""
    return RunConfig(
        preset="byol_mini",
        method=BYOL.Config(hidden=512, dim=128),
        model=ModelConfig(arch="resnet18", norm="local"),
        views=byol_asymmetric(size=64, min_scale=0.2),
        optim=Lars(base_lr=1.0, weight_decay=1e-6, warmup_epochs=1, exclude=EXCLUDE),
        train=TrainConfig(epochs=8, global_batch_size=64, ema_momentum=0.98),
        log=LogConfig(every_steps=5),
        eval=EvalConfig(knn_every_epochs=1, resize=64, crop=64),
    )
