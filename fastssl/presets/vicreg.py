"""VICReg (arXiv 2105.04906): its own commands, and the baseline of the SFRIK code (presets/sfrik.py says what all share)."""

from __future__ import annotations

from fastssl.config import DataConfig, RunConfig
from fastssl.methods.vicreg import VICReg
from fastssl.presets.sfrik import IN20, mini, published
from fastssl.recipes import vicreg


def vicreg_r18_100ep_in20() -> RunConfig:
    """VICReg, ResNet-18, IN20%, 100 epochs, 4 ranks x 512 (command of the SFRIK code).  Peak learning rate 5.6."""
    method = VICReg.Config(sim_coeff=10.0, std_coeff=10.0)
    return published("vicreg_r18_100ep_in20", "resnet18", method, vicreg(), IN20, lr=0.7)


def vicreg_r50_1000ep() -> RunConfig:
    """VICReg, ResNet-50, 1000 epochs, 32 ranks x 64: 73.2 linear top-1 (official README, not measured by us).  Peak learning rate 1.6."""
    return published("vicreg_r50_1000ep", "resnet50", VICReg.Config(), vicreg(), DataConfig(last_batch="keep"), lr=0.2, epochs=1000)


def vicreg_r50_100ep() -> RunConfig:
    """VICReg, ResNet-50, 100 epochs, 8 ranks x 64 (official README's command; it prints no accuracy).  Peak learning rate 0.6."""
    return published("vicreg_r50_100ep", "resnet50", VICReg.Config(), vicreg(), DataConfig(last_batch="keep"), lr=0.3, batch=512)


def vicreg_mini() -> RunConfig:
    """VICReg, ResNet-18, 64 px: minutes on two CPU cores.  All values ours; four outputs an image, as published."""
    return mini("vicreg_mini", VICReg.Config(mlp="512-512-256", sim_coeff=10.0, std_coeff=10.0))
