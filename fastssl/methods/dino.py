"""DINO (Caron et al., ICCV 2021, arXiv 2104.14294): self-distillation with no labels; what SCFS, iBOT and SERE build on.

A student sees two global and K local crops, a teacher (its EMA) the global ones.  The student's softmax for a crop has to
match the teacher's, centred and sharpened, for every other global crop (methods/dino.md).  B images, O = cfg.out_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastssl.batch import Views
from fastssl.collapse import target_entropy
from fastssl.config import ConfigError, MethodConfig
from fastssl.ema import Ema, frozen_copy, without_drop_path
from fastssl.losses.distillation import dino_loss, entropy, teacher_probabilities, teacher_temperature
from fastssl.method import Method, StepOutput
from fastssl.models.centers import Centers
from fastssl.models.heads import DINOHead
from fastssl.models.norm import apply_norm_policy
from fastssl.optim.schedules import Sched
from fastssl.views import ViewSpec, groups


@dataclass(frozen=True, kw_only=True)
class DistillationConfig(MethodConfig):
    """What the methods of this family share: head, temperatures, centre, frozen last layer."""

    out_dim: int = 65536
    """Outputs O of the head."""
    hidden: int = 2048
    """Width of the head's hidden layers."""
    bottleneck: int = 256
    """Width of the unit vectors before the last layer."""
    head_layers: int = 3
    """Linear layers of the head before its last, weight-normalised one."""
    bn_in_head: bool = False
    norm_last_layer: bool = True
    """Rows of the last layer keep length 1; otherwise their length is learned."""
    student_temp: float = 0.1
    warmup_teacher_temp: float = 0.04
    """Teacher temperature in epoch 0."""
    teacher_temp: float = 0.04
    """Teacher temperature from the last epoch of its warm-up on."""
    warmup_teacher_temp_epochs: int = 0
    center_momentum: float = 0.9
    freeze_last_layer: int = 1
    """Epochs in which the head's last layer is left alone."""


class SelfDistillation(Method):
    """A student and its EMA, the teacher, which trains its BatchNorm too; centres, teacher temperature, frozen last layer.

    Subclasses make the networks' parts in `build` and write `forward`.  Both networks have the head as `.head`.
    """

    backbone_prefix = "student.backbone."
    target_backbone_prefix = "teacher.backbone."
    evaluated = "target"
    norm_policies = ("local", "sync")

    def __init__(self, cfg: DistillationConfig, student: nn.Module, norm: str, centers: Mapping[str, int]):
        super().__init__()
        self.cfg = cfg
        self.student = apply_norm_policy(student, norm)
        self.teacher = without_drop_path(frozen_copy(self.student))
        self.ema = (Ema(self.student, self.teacher),)
        self.watches = (target_entropy("teacher_entropy", cfg.out_dim),)
        self.centers = Centers(centers, momentum=cfg.center_momentum)
        self.register_buffer("teacher_temp", torch.tensor(float(cfg.warmup_teacher_temp)), persistent=False)

    @classmethod
    def check_views(cls, views: ViewSpec) -> None:
        first, *rest = groups(views)
        if first != (0, 1) or len(rest) > 1:
            sizes = [v.crop.size for v in views]
            raise ConfigError(
                f"{cls.__name__} trains on two global crops of one size and, after them, local crops of another: got sizes {sizes}. "
                "Set --views.0.crop.size and --views.1.crop.size alike, and all others alike."
            )

    def before_step(self, sched: Sched) -> None:
        c = self.cfg
        warmup, epochs = c.warmup_teacher_temp, c.warmup_teacher_temp_epochs
        self.teacher_temp.fill_(teacher_temperature(sched.epoch, warmup=warmup, final=c.teacher_temp, warmup_epochs=epochs))

    def dropped_gradients(self, sched: Sched) -> Iterable[nn.Parameter]:
        return self.student.head.last.parameters() if sched.epoch < self.cfg.freeze_last_layer else ()

    def after_step(self, sched: Sched) -> None:
        self.centers.update()

    def teacher_probabilities(self, logits: Tensor, center: str) -> Tensor:
        return teacher_probabilities(logits, self.teacher_temp, self.centers[center])


def dino_head(in_features: int, cfg: DistillationConfig) -> DINOHead:
    return DINOHead(
        in_features,
        cfg.out_dim,
        hidden=cfg.hidden,
        bottleneck=cfg.bottleneck,
        layers=cfg.head_layers,
        bn=cfg.bn_in_head,
        norm_last_layer=cfg.norm_last_layer,
    )


class MultiCrop(nn.Module):
    """Backbone and head.  Groups of crops [n B, 3, s, s], one a resolution -> logits [C B, O], crop-major.

    The backbone runs once a group and the head once on all rows: BatchNorm in a head sees all crops together, in the
    backbone those of one resolution.
    """

    def __init__(self, backbone: nn.Module, cfg: DistillationConfig):
        super().__init__()
        self.backbone = backbone
        self.head = dino_head(backbone.num_features, cfg)

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        return self.head(torch.cat([self.backbone(x).pooled for x in crops]))


class DINO(SelfDistillation):
    @dataclass(frozen=True, kw_only=True)
    class Config(DistillationConfig):
        """DINO's head, temperatures and centre."""

        name: ClassVar[str] = "dino"

    def __init__(self, cfg: Config, backbone: Callable[[], nn.Module], norm: str):
        super().__init__(cfg, MultiCrop(backbone(), cfg), norm, {"final": cfg.out_dim})

    def forward(self, views: Views, sched: Sched) -> StepOutput:
        crops = [group.pixels for group in views.groups]
        with torch.no_grad():
            t = self.teacher(crops[:1])
            q = self.teacher_probabilities(t, "final")
        s = self.student(crops)
        loss = dino_loss(*s.split((len(t), len(s) - len(t))), q, self.cfg.student_temp)
        self.centers.accumulate({"final": t})
        return StepOutput(loss, {"teacher_entropy": entropy(q)})
