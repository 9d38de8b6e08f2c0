"""VICReg (Bardes et al., ICLR 2022, arXiv 2105.04906): variance, invariance, covariance (methods/vicreg.md).

The projections themselves are matched, not unit vectors: every dimension keeps a standard deviation of 1 over the batch, and
different dimensions are decorrelated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from fastssl.batch import Views
from fastssl.collapse import embedding_logs
from fastssl.losses.vicreg import covariance, variance_hinge
from fastssl.method import StepOutput
from fastssl.methods.joint_embedding import JointEmbedding, JointEmbeddingConfig
from fastssl.optim.schedules import Sched


class VICReg(JointEmbedding):
    @dataclass(frozen=True, kw_only=True)
    class Config(JointEmbeddingConfig):
        """VICReg's projector and weights."""

        name: ClassVar[str] = "vicreg"

        sim_coeff: float = 25.0
        """Weight of the invariance, the mean of (x - y)^2 over images and dimensions."""
        std_coeff: float = 25.0
        cov_coeff: float = 1.0

    def forward(self, views: Views, sched: Sched) -> StepOutput:
        c = self.cfg
        x, y = self.project(views)
        # The covariance is over the images of a whole step even when the last batch of an epoch has fewer, as published.
        align, std, cov = F.mse_loss(x, y), variance_hinge(x, y), covariance(x, y, self.global_batch_size)
        logs = {"align": align.detach(), "std": std.detach(), "cov": cov.detach(), **embedding_logs(x)}
        return StepOutput(c.sim_coeff * align + c.std_coeff * std + c.cov_coeff * cov, logs)
