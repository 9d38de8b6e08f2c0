"""AUH (arXiv 2005.10242), the baseline of the SFRIK code: its command on IN20% (presets/sfrik.py says what all share)."""

from __future__ import annotations

from fastssl.config import RunConfig
from fastssl.methods.auh import AUH
from fastssl.presets.sfrik import IN20, mini, published
from fastssl.recipes import vicreg


def auh_r18_100ep_in20() -> RunConfig:
    """AUH with SFRIK's projector and VICReg's augmentation, ResNet-18, IN20%, 100 epochs, 4 ranks x 512.  Peak learning rate 8."""
    return published("auh_r18_100ep_in20", "resnet18", AUH.Config(), vicreg(), IN20, lr=1.0)


def auh_mini() -> RunConfig:
    """AUH, ResNet-18, 64 px: minutes on two CPU cores.  All values ours; the weight of |x - y|^2 is the published 3000 / 8192."""
    return mini("auh_mini", AUH.Config(mlp="512-512-1024", sim_coeff=375.0))
