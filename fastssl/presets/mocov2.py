"""MoCo v2 (arXiv 2003.04297) and MoCo-EMAN (arXiv 2101.08482).  Values: the official code's commands.

All: ImageNet-1k, ResNet-50, two 224 px views of one recipe, 8 ranks x 32, queue of 65536, temperature 0.2, key momentum 0.999
throughout, SGD, learning rate 0.03 per 256 images, weight decay 1e-4 on every parameter.  The published runs trained in fp32.
Top-1 numbers: linear protocol, the authors', not measured by us.
"""

from __future__ import annotations

from fastssl.config import EvalConfig, LogConfig, ModelConfig, RunConfig, Sgd, TrainConfig
from fastssl.methods.mocov2 import MoCoV2
from fastssl.recipes import mocov2


def sgd(*, warmup_epochs: int = 0) -> Sgd:
    """The published optimizer: per-epoch cosine to 0."""
    return Sgd(base_lr=0.03, base_batch_size=256, weight_decay=1e-4, not_decayed="none", warmup_epochs=warmup_epochs)


def train(epochs: int) -> TrainConfig:
    """256 images a step, 32 a rank, and a constant key momentum."""
    return TrainConfig(epochs=epochs, global_batch_size=256, ema_momentum=0.999, ema_schedule="constant", published_rank_batch=32)


def _imagenet(name: str, *, epochs: int, norm: str = "shuffle", warmup_epochs: int = 0) -> RunConfig:
    return RunConfig(
        preset=name,
        method=MoCoV2.Config(),
        model=ModelConfig(arch="resnet50", norm=norm),
        views=mocov2(size=224),
        optim=sgd(warmup_epochs=warmup_epochs),
        train=train(epochs),
        log=LogConfig(keep_every=20),
        eval=EvalConfig(knn_every_epochs=5),
    )


def mocov2_r50_100ep() -> RunConfig:
    """MoCo v2, shuffle-BN, 100 epochs.  Not published by its authors; the baseline of `lewel_m_r50_100ep`."""
    return _imagenet("mocov2_r50_100ep", epochs=100)


def mocov2_r50_200ep() -> RunConfig:
    """MoCo v2, shuffle-BN, 200 epochs: 67.5 +- 0.1 linear top-1 (official README, 5 runs; the released model has 67.7)."""
    return _imagenet("mocov2_r50_200ep", epochs=200)


def mocov2_r50_800ep() -> RunConfig:
    """MoCo v2, shuffle-BN, 800 epochs: 71.1 linear top-1 (official README)."""
    return _imagenet("mocov2_r50_800ep", epochs=800)


def mocov2_eman_r50_200ep() -> RunConfig:
    """MoCo-EMAN, no shuffling, 200 epochs, 10 of them warm-up: 67.7 linear top-1, 48.9 / 60.5 with 1 % / 10 % of the labels (EMAN's
    README)."""
    return _imagenet("mocov2_eman_r50_200ep", epochs=200, norm="eman", warmup_epochs=10)


def mocov2_eman_r50_800ep() -> RunConfig:
    """MoCo-EMAN, no shuffling, 800 epochs, 10 of them warm-up: 70.1 linear top-1, 55.4 / 64.0 with 1 % / 10 % of the labels (EMAN's
    README)."""
    return _imagenet("mocov2_eman_r50_800ep", epochs=800, norm="eman", warmup_epochs=10)


def mocov2_mini() -> RunConfig:
    """MoCo v2, ResNet-18, 64 px, queue of 4096: minutes on two CPU cores, for tests and comparisons.  All values ours.

    The key momentum is that of a short run.  One rank has nothing to shuffle.
    """
    return RunConfig(
        preset="mocov2_mini",
        method=MoCoV2.Config(hidden=512, dim=128, queue_size=4096),
        model=ModelConfig(arch="resnet18", norm="shuffle"),
        views=mocov2(size=64),
        optim=Sgd(base_lr=0.06, weight_decay=1e-4, not_decayed="none", warmup_epochs=1),
        train=TrainConfig(epochs=8, global_batch_size=64, ema_momentum=0.99, ema_schedule="constant"),
        log=LogConfig(every_steps=5),
        eval=EvalConfig(knn_every_epochs=1, resize=64, crop=64),
    )
