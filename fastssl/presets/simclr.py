"""SimCLR (arXiv 2002.05709), the baseline of the SFRIK code: its command on IN20% (presets/sfrik.py says what all share)."""

from __future__ import annotations

from fastssl.config import RunConfig
from fastssl.methods.simclr import SimCLR
from fastssl.presets.sfrik import IN20, mini, published
from fastssl.recipes import vicreg


def simclr_r18_100ep_in20() -> RunConfig:
    """SimCLR with SFRIK's projector and VICReg's augmentation, ResNet-18, IN20%, 100 epochs, 4 ranks x 512.  Peak learning rate 6.4."""
    return published("simclr_r18_100ep_in20", "resnet18", SimCLR.Config(), vicreg(), IN20, lr=0.8)


def simclr_mini() -> RunConfig:
    """SimCLR, ResNet-18, 64 px: minutes on two CPU cores.  All values ours."""
    return mini("simclr_mini", SimCLR.Config(mlp="512-512-1024"))
