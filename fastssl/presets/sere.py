"""SERE (arXiv 2206.05184).  Values: the official README's commands (methods/sere.md section 8).

All: ImageNet-1k, 100 epochs, 8 ranks x 128, two masked 224 px crops and ten 96 px ones, SyncBN in the relation heads, AdamW, weight
decay 0.04 -> 0.4 of biases too, momentum of the teacher 0.996 -> 1, gradients clipped at 0.3, fp16 (ours: bf16 where the device has
it).  Accuracies are ImageNet-1k top-1 after 100 epochs of fine-tuning with MAE's code: the official README's, not measured by us.  Its
k-NN and linear accuracies are in the paper only.
"""

from __future__ import annotations

from dataclasses import replace

from fastssl.config import AdamW, LogConfig, ModelConfig, RunConfig, TrainConfig
from fastssl.methods.sere import SERE
from fastssl.presets.ibot import KNN, ibot_mini
from fastssl.recipes import ibot
from fastssl.views import ViewSpec


def _vit(name: str, arch: str, method: SERE.Config, views: ViewSpec, *, base_lr: float, min_lr: float) -> RunConfig:
    return RunConfig(
        preset=name,
        method=method,
        model=ModelConfig(arch=arch, drop_path=0.1, norm="sync"),
        views=views,
        optim=AdamW(
            base_lr=base_lr,
            base_batch_size=256,
            min_lr=min_lr,
            weight_decay=0.04,
            weight_decay_end=0.4,
            schedule="dino",
            warmup_epochs=10,
            clip_grad=0.3,
            not_decayed="norm_weights",
        ),
        train=TrainConfig(epochs=100, global_batch_size=1024, ema_momentum=0.996),
        log=LogConfig(keep_every=20),
        eval=KNN,
    )


def sere_vits16_100ep() -> RunConfig:
    """SERE, ViT-S/16, 100 epochs, 8 ranks x 128: 81.5 fine-tuned (official README)."""
    method = SERE.Config(teacher_temp=0.07, warmup_teacher_temp_epochs=30, norm_last_layer=False)
    return _vit("sere_vits16_100ep", "vit_small_patch16", method, ibot(local_crops=10), base_lr=5e-4, min_lr=1e-6)


def sere_vitb16_100ep() -> RunConfig:
    """SERE, ViT-B/16, 100 epochs, 8 ranks x 128: 83.7 fine-tuned (official README)."""
    method = SERE.Config(teacher_temp=0.07, warmup_teacher_temp_epochs=50, freeze_last_layer=3)
    views = ibot(global_scale=(0.32, 1.0), local_crops=10, local_scale=(0.05, 0.32))
    return _vit("sere_vitb16_100ep", "vit_base_patch16", method, views, base_lr=7.5e-4, min_lr=2e-6)


def sere_vits16_100ep_2x224() -> RunConfig:
    """SERE without local crops, ViT-S/16, 100 epochs, batch 1024 (official Jittor port's command; it prints no accuracy)."""
    method = SERE.Config(teacher_temp=0.07, warmup_teacher_temp_epochs=30, norm_last_layer=False, local_relations=False)
    views = ibot(global_scale=(0.14, 1.0), local_crops=0)
    return _vit("sere_vits16_100ep_2x224", "vit_small_patch16", method, views, base_lr=5e-4, min_lr=1e-6)


def sere_mini() -> RunConfig:
    """SERE, ViT-tiny with patches of 8 pixels, 64 px: `ibot_mini` with relations.  All values ours."""
    base = ibot_mini()
    return replace(
        base,
        preset="sere_mini",
        method=SERE.Config(
            out_dim=1024,
            hidden=512,
            bottleneck=128,
            norm_last_layer=False,
            overlap_size=(7, 7),
            local_overlap_size=4,
            relation_divisors=(8, 4),
        ),
        model=replace(base.model, norm="sync"),
        optim=replace(base.optim, clip_grad=0.3, not_decayed="norm_weights"),
    )
