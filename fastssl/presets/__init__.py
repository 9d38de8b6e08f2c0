"""Every named configuration.  `--method NAME` takes DEFAULTS[NAME], `--preset NAME` any of PRESETS."""

from __future__ import annotations

from collections.abc import Callable

from fastssl.config import RunConfig
from fastssl.presets import byol, lewel

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
    )
}

DEFAULTS: dict[str, str] = {"byol": "byol_eman_r50_200ep", "lewel": "lewel_b_eman_r50_200ep"}
