"""MoCo v3 (arXiv 2104.02057).  Values and linear top-1: the official README's (its PyTorch code; not measured by us).

All: ImageNet-1k, two 224 px views (recipes A and B, bilinear), heads 4096 wide, K = 256, SyncBN, peak learning rate per 256
images, warm-up from 0 by iteration and a half cosine to 0, target momentum rising to 1, fp16 in the published runs (ours: bf16
where the device has it).

ResNets: LARS with momentum 0.9 and trust coefficient 0.001 on tensors of two dimensions or more, T = 1, smallest crop 0.2.
ViTs: AdamW that decays everything trainable, T = 0.2, smallest crop 0.08, frozen patch projection, 12 heads.
"""

from __future__ import annotations

from fastssl.config import AdamW, BarlowLars, EvalConfig, LogConfig, ModelConfig, RunConfig, TrainConfig
from fastssl.methods.mocov3 import MoCoV3
from fastssl.recipes import byol_asymmetric


def _resnet50(name: str, *, epochs: int, lr: float, weight_decay: float = 1e-6, momentum: float = 0.99) -> RunConfig:
    """What the presets of ResNet-50 share: 16 ranks x 256."""
    return RunConfig(
        preset=name,
        method=MoCoV3.Config(),
        model=ModelConfig(arch="resnet50", norm="sync", zero_init_residual=True),
        views=byol_asymmetric(size=224, min_scale=0.2),
        optim=BarlowLars(base_lr=lr, base_batch_size=256, weight_decay=weight_decay, schedule="mocov3", warmup_epochs=10),
        train=TrainConfig(epochs=epochs, global_batch_size=4096, ema_momentum=momentum),
        log=LogConfig(keep_every=20),
        eval=EvalConfig(knn_every_epochs=5),
    )


def mocov3_r50_100ep() -> RunConfig:
    """MoCo v3, ResNet-50, 100 epochs, 16 ranks x 256: 68.9 linear top-1 (official README).  Peak learning rate 9.6."""
    return _resnet50("mocov3_r50_100ep", epochs=100, lr=0.6)


def mocov3_r50_300ep() -> RunConfig:
    """MoCo v3, ResNet-50, 300 epochs, 16 ranks x 256: 72.8 linear top-1 (official README).  Peak learning rate 4.8."""
    return _resnet50("mocov3_r50_300ep", epochs=300, lr=0.3)


def mocov3_r50_1000ep() -> RunConfig:
    """MoCo v3, ResNet-50, 1000 epochs, 16 ranks x 256: 74.6 linear top-1 (official README).  Peak learning rate 4.8."""
    return _resnet50("mocov3_r50_1000ep", epochs=1000, lr=0.3, weight_decay=1.5e-6, momentum=0.996)


def _vit(name: str, arch: str, batch: int) -> RunConfig:
    """What the presets of ViTs share: 300 epochs."""
    return RunConfig(
        preset=name,
        method=MoCoV3.Config(projector_layers=3, predictor_bn=True, temperature=0.2, freeze_patch_projection=True),
        model=ModelConfig(arch=arch, norm="sync"),
        views=byol_asymmetric(size=224, min_scale=0.08),
        optim=AdamW(base_lr=1.5e-4, base_batch_size=256, weight_decay=0.1, not_decayed="none", schedule="mocov3", warmup_epochs=40),
        train=TrainConfig(epochs=300, global_batch_size=batch, ema_momentum=0.99),
        log=LogConfig(keep_every=20),
        eval=EvalConfig(knn_every_epochs=5),
    )


def mocov3_vits16_300ep() -> RunConfig:
    """MoCo v3, ViT-S/16, 300 epochs, 32 ranks x 128: 73.2 linear, 81.4 fine-tuned top-1 (official README).  Peak learning rate 2.4e-3."""
    return _vit("mocov3_vits16_300ep", "vit_small_patch16_mocov3", 4096)


def mocov3_vits16_300ep_bs1024() -> RunConfig:
    """MoCo v3, ViT-S/16, 300 epochs, 8 ranks x 128 (official README, which prints no accuracy).  Peak learning rate 6e-4."""
    return _vit("mocov3_vits16_300ep_bs1024", "vit_small_patch16_mocov3", 1024)


def mocov3_vitb16_300ep() -> RunConfig:
    """MoCo v3, ViT-B/16, 300 epochs, 64 ranks x 64: 76.7 linear, 83.2 fine-tuned top-1 (official README).  Peak learning rate 2.4e-3."""
    return _vit("mocov3_vitb16_300ep", "vit_base_patch16_mocov3", 4096)


def mocov3_mini() -> RunConfig:
    """MoCo v3, ResNet-18, 64 px: for tests and comparisons on CPUs.  All values ours."""
    return RunConfig(
        preset="mocov3_mini",
        method=MoCoV3.Config(hidden=512, dim=128, temperature=0.2),
        model=ModelConfig(arch="resnet18", norm="sync", zero_init_residual=True),
        views=byol_asymmetric(size=64, min_scale=0.2),
        optim=BarlowLars(base_lr=1.0, weight_decay=1e-6, schedule="mocov3", warmup_epochs=1),
        train=TrainConfig(epochs=8, global_batch_size=64, ema_momentum=0.98),
        log=LogConfig(every_steps=5),
        eval=EvalConfig(knn_every_epochs=1, resize=64, crop=64),
    )


def mocov3_vit_mini() -> RunConfig:
    """MoCo v3, ViT-tiny with patches of 8 pixels and 12 heads, 64 px: for tests on CPUs.  All values ours."""
    return RunConfig(
        preset="mocov3_vit_mini",
        method=MoCoV3.Config(hidden=512, dim=128, projector_layers=3, predictor_bn=True, temperature=0.2, freeze_patch_projection=True),
        model=ModelConfig(arch="vit_tiny_patch8_mocov3", image_size=64, norm="sync"),
        views=byol_asymmetric(size=64, min_scale=0.2),
        optim=AdamW(base_lr=5e-4, weight_decay=0.1, not_decayed="none", schedule="mocov3", warmup_epochs=1),
        train=TrainConfig(epochs=8, global_batch_size=64, ema_momentum=0.98),
        log=LogConfig(every_steps=5),
        eval=EvalConfig(knn_every_epochs=1, resize=64, crop=64),
    )
