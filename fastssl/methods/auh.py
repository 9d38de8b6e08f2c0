"""AUH: alignment and uniformity on the hypersphere (Wang & Isola, ICML 2020, arXiv 2005.10242), the baseline of the SFRIK code
(methods/auh.md).

The two views of an image are pulled together; each view's embeddings are spread by the log of their mean Gaussian potential.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from fastssl.batch import Views
from fastssl.collapse import embedding_logs
from fastssl.losses.uniformity import uniformity
from fastssl.method import StepOutput
from fastssl.methods.joint_embedding import JointEmbedding, JointEmbeddingConfig
from fastssl.optim.schedules import Sched
from fastssl.precision import unit_rows


class AUH(JointEmbedding):
    @dataclass(frozen=True, kw_only=True)
    class Config(JointEmbeddingConfig):
        """AUH's projector and weights."""

        name: ClassVar[str] = "auh"

        sim_coeff: float = 3000.0
        """Weight of the alignment, the mean of (x - y)^2 over images and the q dimensions (the paper sums over these)."""
        unif_coeff: float = 1.0
        scale: float = 2.5
        """s of the potential exp(-s |u - v|^2)."""

    def forward(self, views: Views, sched: Sched) -> StepOutput:
        c = self.cfg
        x, y = (unit_rows(z) for z in self.project(views))
        align, unif = F.mse_loss(x, y), (uniformity(x, c.scale) + uniformity(y, c.scale)) / 2
        logs = {"align": align.detach(), "unif": unif.detach(), **embedding_logs(x)}
        return StepOutput(c.sim_coeff * align + c.unif_coeff * unif, logs)
