"""SimCLR (Chen et al., ICML 2020, arXiv 2002.05709), the baseline of the SFRIK code (methods/simclr.md).

Each embedding has to pick its partner among the 2N - 1 others of the global batch.  The projector is SFRIK's, wider than the
paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastssl.batch import Views
from fastssl.collapse import embedding_logs
from fastssl.losses.nt_xent import nt_xent
from fastssl.method import StepOutput
from fastssl.methods.joint_embedding import JointEmbedding, JointEmbeddingConfig
from fastssl.optim.schedules import Sched
from fastssl.precision import unit_rows


class SimCLR(JointEmbedding):
    @dataclass(frozen=True, kw_only=True)
    class Config(JointEmbeddingConfig):
        """SimCLR's projector and temperature."""

        name: ClassVar[str] = "simclr"

        temperature: float = 0.15

    def forward(self, views: Views, sched: Sched) -> StepOutput:
        x, y = (unit_rows(z) for z in self.project(views))
        return StepOutput(nt_xent(x, y, self.cfg.temperature), embedding_logs(x))
