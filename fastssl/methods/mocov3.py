"""MoCo v3 (Chen et al., ICCV 2021, arXiv 2104.02057; methods/mocov3.md): contrast within the batch, for ResNets and ViTs.

Two views.  The online network and a predictor make queries, the target network, updated before the forward pass, makes keys.
A query has to find the key of the other view of its image among those of the global batch.  B images, K = cfg.dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastssl.batch import Views
from fastssl.collapse import embedding_logs
from fastssl.collectives import gathered
from fastssl.config import ConfigError, MethodConfig
from fastssl.ema import Ema, frozen_copy, without_drop_path
from fastssl.losses.contrastive import in_batch_contrast
from fastssl.method import Method, StepOutput
from fastssl.models.norm import apply_norm_policy
from fastssl.optim.schedules import Sched
from fastssl.precision import unit_rows


class Head(nn.Sequential):
    """linear - BN - ReLU, (layers - 1) times, then a linear, and BN without weight and bias if `last_bn`.  x: [R, in] -> [R, out].

    The linears have no biases and start as PyTorch's do.
    """

    def __init__(self, in_features: int, hidden: int, out_features: int, *, layers: int, last_bn: bool):
        widths = [in_features] + [hidden] * (layers - 1)
        blocks: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            blocks += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
        blocks.append(nn.Linear(widths[-1], out_features, bias=False))
        if last_bn:
            blocks.append(nn.BatchNorm1d(out_features, affine=False))
        super().__init__(*blocks)


class Encoder(nn.Module):
    """Backbone and projector."""

    def __init__(self, backbone: nn.Module, projector: Head):
        super().__init__()
        self.backbone, self.projector = backbone, projector
        # BatchNorm must see one view at a time: only a backbone without it takes both at once.
        self.separately = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())

    def forward(self, views: Views) -> list[Tensor]:
        """Projections [B, K] of each view."""
        if self.separately:
            pooled = [self.backbone(x).pooled for x in views.per_view()]
        else:
            pooled = self.backbone(views.groups[0].pixels).pooled.chunk(2)
        return [self.projector(h) for h in pooled]


class MoCoV3(Method):
    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """MoCo v3's heads and temperature."""

        name: ClassVar[str] = "mocov3"

        hidden: int = 4096
        """Width of projector and predictor."""
        dim: int = 256
        """Projection K."""
        projector_layers: int = 2
        """Linear layers of the projector (ViTs: 3); the predictor has two."""
        predictor_bn: bool = False
        """The predictor ends in a BatchNorm without weight and bias, as the projector does (ViTs)."""
        temperature: float = 1.0
        """T of the contrast (ViTs: 0.2)."""
        freeze_patch_projection: bool = False
        """ViTs: the patch projection stays as it was drawn, which keeps training stable."""

    backbone_prefix = "online.backbone."
    target_backbone_prefix = "target.backbone."
    couples_batch = True
    norm_policies = ("local", "sync")

    def __init__(self, cfg: Config, backbone: Callable[[], nn.Module], norm: str):
        super().__init__()
        body = backbone()
        if cfg.freeze_patch_projection:
            if not hasattr(body, "freeze_patch_projection"):
                raise ConfigError(
                    "--method.freeze-patch-projection is for MoCo v3's ViTs: take a *_mocov3 --model.arch, or set it to False."
                )
            body.freeze_patch_projection()
        projector = Head(body.num_features, cfg.hidden, cfg.dim, layers=cfg.projector_layers, last_bn=True)
        self.online = apply_norm_policy(Encoder(body, projector), norm)
        self.predictor = apply_norm_policy(Head(cfg.dim, cfg.hidden, cfg.dim, layers=2, last_bn=cfg.predictor_bn), norm)
        self.target = without_drop_path(frozen_copy(self.online))
        self.ema = (Ema(self.online, self.target, when="before_forward"),)
        self.temperature = cfg.temperature

    def forward(self, views: Views, sched: Sched) -> StepOutput:
        z1, z2 = self.online(views)
        q1, q2 = self.predictor(z1), self.predictor(z2)
        with torch.no_grad():
            k1, k2 = self.target(views)
        loss = self.contrast(q1, q2, k1, k2)
        return StepOutput(loss, embedding_logs(z1))

    def contrast(self, q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        """Both directions; 4 T ln(global batch) at chance.  All [B, K] of this rank."""
        q1, q2, k1, k2 = map(unit_rows, (q1, q2, k1, k2))
        keys1, keys2 = gathered(torch.cat((k1, k2), dim=1)).chunk(2, dim=1)  # one collective
        return in_batch_contrast(q1, k2, keys2, self.temperature) + in_batch_contrast(q2, k1, keys1, self.temperature)
