"""SCFS (Song et al., ICCV 2023, arXiv 2212.06486): semantics-consistent feature search, on top of DINO (methods/scfs.md).

At three stages of the backbone the pooled feature of every local crop (student) queries the teacher's feature map of the
first global crop; the map, weighted by the cosine at each pixel, goes through the stage's head, and the student's local
feature has to predict it.  The same heads also match the global crops.  No geometry is needed.

B images, K local crops, O = cfg.out_dim; rows are crop-major.

Memory at the published 32 images a GPU in 16 bits, from the shapes: logits of the ten crops 42 MB and their fp32 form 84 MB; the
re-weighted maps exist behind conv1 only, 135 MB over the three stages, where A M itself would be 360 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastssl.batch import Views
from fastssl.config import ConfigError
from fastssl.losses.distillation import dino_loss, entropy, matched_loss, teacher_probabilities
from fastssl.method import StepOutput
from fastssl.methods.dino import DistillationConfig, SelfDistillation, dino_head
from fastssl.models.features import Features
from fastssl.models.stage_heads import StageHead, feature_search
from fastssl.optim.schedules import Sched
from fastssl.views import ViewSpec, groups

STAGES = ("layer2", "layer3", "layer4")


class Outputs(NamedTuple):
    """logits [n, O]; stages: unit rows [n, dim] of every stage head."""

    logits: Tensor
    stages: dict[str, Tensor]


class StageNet(nn.Module):
    """Backbone, DINO head, a head for each stage.  Unlike DINO's, its heads see one resolution at a time."""

    def __init__(self, backbone: nn.Module, cfg: SCFS.Config):
        super().__init__()
        widths = backbone.stage_channels
        if not set(STAGES) <= set(widths):
            raise ConfigError(f"SCFS searches the feature maps of {', '.join(STAGES)}: take a ResNet as --model.arch.")
        self.backbone = backbone
        self.head = dino_head(backbone.num_features, cfg)
        self.stage_heads = nn.ModuleDict(
            {s: StageHead(widths[s], bottleneck=cfg.stage_bottleneck, hidden=cfg.stage_hidden, dim=cfg.stage_dim) for s in STAGES}
        )

    def forward(self, x: Tensor) -> tuple[Features, Outputs]:
        features = self.backbone(x)
        return features, self.outputs(features)

    def outputs(self, features: Features) -> Outputs:
        return Outputs(self.head(features.pooled), {s: self.stage_heads[s](features.stages[s]) for s in STAGES})


class SCFS(SelfDistillation):
    @dataclass(frozen=True, kw_only=True)
    class Config(DistillationConfig):
        """DINO's head, temperatures and centre, and the stage heads."""

        name: ClassVar[str] = "scfs"

        stage_bottleneck: int = 256
        """Channels inside a stage head's residual block."""
        stage_hidden: int = 2048
        stage_dim: int = 256
        """Outputs of a stage head: unit vectors whose coordinates are the classes of the stage losses."""

    def __init__(self, cfg: Config, backbone: Callable[[], nn.Module], norm: str):
        centers = {"final": cfg.out_dim, **dict.fromkeys(STAGES, cfg.stage_dim)}
        super().__init__(cfg, StageNet(backbone(), cfg), norm, centers)

    @classmethod
    def check_views(cls, views: ViewSpec) -> None:
        super().check_views(views)
        if len(groups(views)) < 2:
            raise ConfigError("SCFS searches for local crops: its views need at least one besides the two global ones.")

    def search(self, features: Features, queries: dict[str, Tensor]) -> tuple[Outputs, dict[str, Tensor]]:
        """Teacher's outputs on its global crops, and on what the local crops find in the first of them.

        queries: pooled student features [K B, C] of every stage -> Outputs of [2B] rows, searched rows [K B, dim] by stage.
        """
        on_global, searched = {}, {}
        for s in STAGES:
            maps = features.stages[s]
            attention = feature_search(queries[s], maps[: len(maps) // 2])
            on_global[s], searched[s] = self.teacher.stage_heads[s].with_searched(maps, attention)
        return Outputs(self.teacher.head(features.pooled), on_global), searched

    def forward(self, views: Views, sched: Sched) -> StepOutput:
        global_crops, local_crops = (group.pixels for group in views.groups)
        _, s_global = self.student(global_crops)
        local_features, s_local = self.student(local_crops)
        with torch.no_grad():
            queries = {s: local_features.stages[s].mean((2, 3)) for s in STAGES}
            t, searched = self.search(self.teacher.backbone(global_crops), queries)
        return self.losses(s_global, s_local, t, searched)

    def losses(self, s_global: Outputs, s_local: Outputs, t: Outputs, searched: dict[str, Tensor]) -> StepOutput:
        """L_final + sum over stages of (L_global + L_local) / 2 (methods/scfs.md section 4)."""
        tau = self.cfg.student_temp
        q = self.teacher_probabilities(t.logits, "final")
        loss = final = dino_loss(s_global.logits, s_local.logits, q, tau)
        logs = {"loss_final": final.detach(), "teacher_entropy": entropy(q)}
        for s in STAGES:
            matched = dino_loss(s_global.stages[s], None, self.teacher_probabilities(t.stages[s], s), tau)
            # searched rows are not centred, as published
            found = matched_loss(s_local.stages[s], teacher_probabilities(searched[s], self.teacher_temp), tau)
            loss = loss + 0.5 * (matched + found)
            logs |= {f"loss_{s}_global": matched.detach(), f"loss_{s}_local": found.detach()}
        self.centers.accumulate({"final": t.logits, **t.stages})
        return StepOutput(loss, logs)
