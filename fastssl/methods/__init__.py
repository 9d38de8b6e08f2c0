"""One paper per file; METHODS is the only list of them."""

from functools import partial

from fastssl.config import RunConfig
from fastssl.method import Method
from fastssl.methods.auh import AUH
from fastssl.methods.byol import BYOL
from fastssl.methods.dino import DINO
from fastssl.methods.ibot import IBOT
from fastssl.methods.lewel import LEWEL
from fastssl.methods.lewel_m import LEWELM
from fastssl.methods.mocov2 import MoCoV2
from fastssl.methods.mocov3 import MoCoV3
from fastssl.methods.scfs import SCFS
from fastssl.methods.sere import SERE
from fastssl.methods.sfrik import SFRIK
from fastssl.methods.simclr import SimCLR
from fastssl.methods.vicreg import VICReg
from fastssl.methods.w2ssl import W2SSL
from fastssl.models.backbones import build_backbone

METHODS: dict[str, type[Method]] = {
    "auh": AUH,
    "byol": BYOL,
    "dino": DINO,
    "ibot": IBOT,
    "lewel": LEWEL,
    "lewel_m": LEWELM,
    "mocov2": MoCoV2,
    "mocov3": MoCoV3,
    "scfs": SCFS,
    "sere": SERE,
    "sfrik": SFRIK,
    "simclr": SimCLR,
    "vicreg": VICReg,
    "w2ssl": W2SSL,
}


def build_method(cfg: RunConfig) -> Method:
    """The configured method with freshly initialised networks (torch's global generator)."""
    m = cfg.model
    options = {"image_size": m.image_size, "drop_path": m.drop_path, "layer_scale": m.layer_scale}
    backbone = partial(build_backbone, m.arch, **options, zero_init_residual=m.zero_init_residual)
    return METHODS[cfg.method.name](cfg.method, backbone, m.norm)
