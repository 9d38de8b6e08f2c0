"""BYOL (Grill et al., NeurIPS 2020, arXiv 2006.07733), as in the EMAN code base (Cai et al., CVPR 2021, arXiv 2101.08482).

Two views; the online network predicts the target network's projection of the other view.  With the BatchNorm policy
`eman` the target normalises with an EMA of the online running statistics.  B images, K = cfg.dim.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastssl.batch import Views
from fastssl.collapse import embedding_logs
from fastssl.config import MethodConfig
from fastssl.ema import Ema, frozen_copy, without_drop_path
from fastssl.losses.cosine import cosine_loss
from fastssl.method import Method, StepOutput
from fastssl.models.heads import MLP, Pooled
from fastssl.models.norm import apply_norm_policy
from fastssl.optim.schedules import Sched


class BYOL(Method):
    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """BYOL's heads."""

        name: ClassVar[str] = "byol"

        hidden: int = 4096
        """Width of projector and predictor."""
        dim: int = 256
        """Projection K."""
        projector_layers: int = 2
        """Linear layers of the projector; the predictor has two."""

    backbone_prefix = "online.backbone."
    target_backbone_prefix = "target.backbone."

    def __init__(self, cfg: Config, backbone: Callable[[], nn.Module], norm: str):
        super().__init__()
        body = backbone()
        projector = MLP(body.num_features, cfg.hidden, cfg.dim, layers=cfg.projector_layers)
        self.online = apply_norm_policy(nn.Sequential(OrderedDict(backbone=body, pool=Pooled(), projector=projector)), norm)
        # Both linears really are N(0, 0.01) here; LEWEL's predictors are not (its init misses 1x1 convolutions).
        self.predictor = apply_norm_policy(MLP(cfg.dim, cfg.hidden, cfg.dim, init_std=0.01), norm)
        self.target = without_drop_path(frozen_copy(self.online))
        self.eman = norm == "eman"
        self.ema = (Ema(self.online, self.target, buffers=self.eman, target_mode="eval" if self.eman else "train"),)

    def project_targets(self, views: Views) -> tuple[Tensor, ...]:
        """Target projections of each view, [B, K].  In eval mode (EMAN) both views are one batch; otherwise BatchNorm sees them apart."""
        with torch.no_grad():
            if self.eman:
                return self.target(views.groups[0].pixels).chunk(2)
            return tuple(self.target(x) for x in views.per_view())

    def forward(self, views: Views, sched: Sched) -> StepOutput:
        x1, x2 = views.per_view()  # separate BN batches, as published
        z1, z2 = self.online(x1), self.online(x2)
        t1, t2 = self.project_targets(views)
        loss = cosine_loss(self.predictor(z1), t2) + cosine_loss(self.predictor(z2), t1)  # in [0, 8]
        return StepOutput(loss, embedding_logs(z1))
