"""LEWEL_M as this project defines it (methods/lewel_m.md section 0): MoCo v2's presets with LEWEL's coupled head.

The paper (arXiv 2203.14898) reports 1.6 points of linear top-1 over MoCo v2 for its LEWEL_M; no code or settings of it were released.
These presets are no reproduction of that number.
"""

from __future__ import annotations

from dataclasses import replace

from fastssl.config import RunConfig
from fastssl.methods.lewel_m import LEWELM
from fastssl.presets.mocov2 import mocov2_mini, mocov2_r50_100ep, mocov2_r50_200ep


def lewel_m_r50_100ep() -> RunConfig:
    """LEWEL_M, ResNet-50, shuffle-BN, 100 epochs, 8 ranks x 32.  This project's definition; no published number."""
    return replace(mocov2_r50_100ep(), preset="lewel_m_r50_100ep", method=LEWELM.Config())


def lewel_m_r50_200ep() -> RunConfig:
    """LEWEL_M, ResNet-50, shuffle-BN, 200 epochs, 8 ranks x 32.  This project's definition; no published number."""
    return replace(mocov2_r50_200ep(), preset="lewel_m_r50_200ep", method=LEWELM.Config())


def lewel_m_mini() -> RunConfig:
    """LEWEL_M, ResNet-18, 64 px, queues of 4096: `mocov2_mini` with LEWEL's head.  All values ours."""
    method = LEWELM.Config(hidden=512, dim=128, queue_size=4096, aligned_queue_size=4096)
    return replace(mocov2_mini(), preset="lewel_m_mini", method=method)
