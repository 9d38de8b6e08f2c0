"""Every named configuration.  `--method NAME` takes DEFAULTS[NAME], `--preset NAME` any of PRESETS."""

from __future__ import annotations

from collections.abc import Callable

from fastssl.config import RunConfig
from fastssl.presets import byol, dino, lewel, scfs

PRESETS: dict[str, Callable[[], RunConfig]] = {
    function.__name__: function
    for function in (
        lewel.lewel_b_eman_r50_100ep,
        lewel.lewel_b_eman_r50_200ep,
        lewel.lewel_b_sync_r50_400ep,
        lewel.lewel_mini,
        byol.byol_eman_r50_100ep,
        byol.byol_eman_r50_200ep,
        byol.byol_r50_100ep,
        byol.byol_r50_300ep,
        byol.byol_r50_1000ep,
        byol.byol_mini,
        dino.dino_vits16_100ep,
        dino.dino_vits16_300ep,
        dino.dino_vits16_800ep,
        dino.dino_r50_100ep,
        dino.dino_r50_800ep_lars,
        dino.dino_r50_200ep_bs256,
        dino.dino_mini,
        dino.dino_vit_mini,
        scfs.scfs_r50_200ep,
        scfs.scfs_r50_800ep,
        scfs.scfs_mini,
    )
}

DEFAULTS: dict[str, str] = {
    "byol": "byol_eman_r50_200ep",
    "dino": "dino_vits16_100ep",
    "lewel": "lewel_b_eman_r50_200ep",
    "scfs": "scfs_r50_200ep",
}
