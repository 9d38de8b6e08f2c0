"""LEWEL_B (arXiv 2203.14898).  Values are those of the official scripts and of the published 100-epoch log.

All: ImageNet-1k, two 224 px views (recipes A and B, smallest crop 0.2), K = 256, heads 4096 wide, H = 4, sigma = 1, w = 0.5,
LARS with momentum 0.9 and trust coefficient 0.001, learning rate as given (no scaling), 10 warm-up epochs, fp16 mixed
precision in the published runs (ours: bf16 where the device has it).  Linear top-1 numbers: the official README's.
"""

from __future__ import annotations

from fastssl.config import EvalConfig, Lars, LogConfig, ModelConfig, RunConfig, TrainConfig
from fastssl.methods.lewel import LEWEL
from fastssl.recipes import byol_asymmetric

EXCLUDE = ("bn", "downsample.1", "bias")
# The released code also excludes the first BatchNorm of each head for its EMAN architecture.
EXCLUDE_EMAN = (*EXCLUDE, "mlp.1")


def lewel_b_eman_r50_100ep() -> RunConfig:
    """LEWEL_B-EMAN, ResNet-50, 100 epochs, 8 ranks x 128: 71.9 linear top-1 (official README; not measured by us).

    Mirrors the published log: weight decay 1e-6 and head BatchNorm weights adapted (the later script has 1.5e-6 and excludes them).
    """
    return RunConfig(
        preset="lewel_b_eman_r50_100ep",
        method=LEWEL.Config(),
        model=ModelConfig(arch="resnet50", norm="eman"),
        views=byol_asymmetric(size=224, min_scale=0.2),
        optim=Lars(base_lr=3.6, weight_decay=1e-6, warmup_epochs=10, exclude=EXCLUDE),
        train=TrainConfig(epochs=100, global_batch_size=1024, ema_momentum=0.98, published_rank_batch=128),
        log=LogConfig(keep_every=20),
        eval=EvalConfig(knn_every_epochs=5),
    )


def lewel_b_eman_r50_200ep() -> RunConfig:
    """LEWEL_B-EMAN, ResNet-50, 200 epochs, 8 ranks x 128: 72.8 linear top-1 (official README; not measured by us)."""
    return RunConfig(
        preset="lewel_b_eman_r50_200ep",
        method=LEWEL.Config(),
        model=ModelConfig(arch="resnet50", norm="eman"),
        views=byol_asymmetric(size=224, min_scale=0.2),
        optim=Lars(base_lr=3.6, weight_decay=1.5e-6, warmup_epochs=10, exclude=EXCLUDE_EMAN),
        train=TrainConfig(epochs=200, global_batch_size=1024, ema_momentum=0.98, published_rank_batch=128),
        log=LogConfig(keep_every=20),
        eval=EvalConfig(knn_every_epochs=5),
    )


def lewel_b_sync_r50_400ep() -> RunConfig:
    """LEWEL_B with SyncBN, ResNet-50, 400 epochs, batch 4096 on 32 ranks: 73.8 linear top-1 (official README; not measured by us)."""
    return RunConfig(
        preset="lewel_b_sync_r50_400ep",
        method=LEWEL.Config(),
        model=ModelConfig(arch="resnet50", norm="sync"),
        views=byol_asymmetric(size=224, min_scale=0.2),
        optim=Lars(base_lr=7.2, weight_decay=1e-6, warmup_epochs=10, exclude=EXCLUDE),
        train=TrainConfig(epochs=400, global_batch_size=4096, ema_momentum=0.996),
        log=LogConfig(keep_every=20),
        eval=EvalConfig(knn_every_epochs=5),
    )


def lewel_mini() -> RunConfig:
    """LEWEL, ResNet-18, 64 px: minutes on two CPU cores, for the demo and tests.  All values ours.

    Local BatchNorm: EMAN's target starts from statistics 0 and 1 and needs more steps than this run has.
    """
    return RunConfig(
        preset="lewel_mini",
        method=LEWEL.Config(hidden=512, dim=128),
        model=ModelConfig(arch="resnet18", norm="local"),
        views=byol_asymmetric(size=64, min_scale=0.2),
        optim=Lars(base_lr=1.0, weight_decay=1e-6, warmup_epochs=1, exclude=EXCLUDE),
        train=TrainConfig(epochs=8, global_batch_size=64, ema_momentum=0.99),
        log=LogConfig(every_steps=5),
        eval=EvalConfig(knn_every_epochs=1, resize=64, crop=64),
    )
