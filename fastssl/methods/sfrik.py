"""SFRIK (Zheng et al., ICLR 2023, arXiv 2208.00789): self-supervised learning with rotation-invariant kernels (methods/sfrik.md).

Views of an image are aligned on the unit sphere of R^q; each view's embeddings are spread by their squared MMD to the uniform law
there, for a kernel that is a short non-negative sum of Legendre polynomials.  Two views, or the multi-crops of OBoW and SwAV.

B images of this rank, V views, q the projector's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.batch import Views
from fastssl.collapse import embedding_logs
from fastssl.config import ConfigError, RunConfig
from fastssl.losses.mmd import mmd_uniform
from fastssl.method import StepOutput
from fastssl.methods.joint_embedding import JointEmbedding, JointEmbeddingConfig
from fastssl.optim.schedules import Sched
from fastssl.precision import unit_rows
from fastssl.views import PatchCrop, ViewSpec


class SFRIK(JointEmbedding):
    @dataclass(frozen=True, kw_only=True)
    class Config(JointEmbeddingConfig):
        """SFRIK's projector, kernel and weights."""

        name: ClassVar[str] = "sfrik"

        mlp: str = "8192-8192-32768"
        """Widths of the projector's layers; the last is the dimension q of the embeddings."""
        sim_coeff: float = 40000.0
        """Weight of the alignment, the mean of (z_i - z_j)^2 over images and the q dimensions."""
        mmd_coeff: float = 1.0
        weights: tuple[float, ...] = (1.0, 40.0, 40.0)
        """b_1 .. b_L of the kernel sum_l b_l P_l. L = 2 of the paper: 1 40."""
        general_indices: tuple[int, ...] = (0, 1)
        """Views that all others are aligned with: SwAV's large crops 0 1, OBoW's original 0. Two views are aligned either way."""
        reg_small: bool = True
        """Spread all views; otherwise only the general ones."""

    def __init__(self, cfg: Config, backbone: Callable[[], nn.Module], norm: str):
        if not cfg.weights or min(cfg.weights) < 0 or max(cfg.weights) <= 0:
            raise ConfigError(f"--method.weights {list(cfg.weights)}: the kernel needs weights of at least 0 and one above.")
        super().__init__(cfg, backbone, norm)

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        super().check(cfg)
        n, general = number_of_views(cfg.views), cfg.method.general_indices
        if not general or len(set(general)) < len(general) or not set(general) <= set(range(n)):
            raise ConfigError(f"--method.general-indices {list(general)} must name, once each, some of the {n} views 0 .. {n - 1}.")

    @classmethod
    def check_views(cls, views: ViewSpec) -> None:
        if (n := number_of_views(views)) < 2:
            raise ConfigError(f"SFRIK aligns the views of an image and needs at least two, got {n}.")

    def forward(self, views: Views, sched: Sched) -> StepOutput:
        return self.loss([unit_rows(z) for z in self.project(views)])

    def loss(self, z: Sequence[Tensor]) -> StepOutput:
        """z: unit rows [B, q] of each view."""
        c = self.cfg
        align = alignment(z, c.general_indices)
        spread = z if c.reg_small else [z[g] for g in c.general_indices]
        mmd = torch.stack([mmd_uniform(view, c.weights) for view in spread]).mean()
        logs = {"align": align.detach(), "mmd": mmd.detach(), **embedding_logs(z[0])}
        return StepOutput(c.sim_coeff * align + c.mmd_coeff * mmd, logs)


def alignment(z: Sequence[Tensor], general: Sequence[int]) -> Tensor:
    """Mean over the general views g and over the other views i of the mean of (z_g - z_i)^2 over rows and dimensions.

    One general view is OBoW's form (methods/sfrik.md 4.2), several are SwAV's (4.3), where a pair of general views counts twice.
    """
    return torch.stack([F.mse_loss(z[g], other) for g in general for i, other in enumerate(z) if i != g]).mean()


def number_of_views(views: ViewSpec) -> int:
    """Views that reach the network: a `PatchCrop` gives several."""
    return sum(v.crop.patches if isinstance(v.crop, PatchCrop) else 1 for v in views)
