"""iBOT (Zhou et al., ICLR 2022, arXiv 2111.07832): DINO with masked image modelling (methods/ibot.md).

Beside DINO's loss of [CLS] tokens, patches of the student's global crops are hidden behind a learned embedding, and at each of
them the student's softmax has to match the teacher's, which sees the whole crop.  What SERE builds on.

B images, L local crops, N patches of a global crop, D the backbone's width, R listed patches (`batch.masked_patches`), O outputs;
rows are crop-major.

The head runs on [CLS] and on masked patches only, of the teacher its linears on all patches too: the patch centre is a mean over
all of them, and is taken before the last layer, which is linear.  By shapes, ViT-S and 10 local crops: 4 billion
multiply-adds an image in the heads, where running them on all tokens takes 20, beside 61 in the backbones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastssl.batch import Views
from fastssl.config import ConfigError, RunConfig
from fastssl.losses.distillation import (
    dino_loss,
    entropy,
    masked_loss,
    patch_weights,
    teacher_probabilities,
    teacher_temperature,
)
from fastssl.method import StepOutput
from fastssl.methods.dino import DistillationConfig, SelfDistillation
from fastssl.models.backbones import build_backbone
from fastssl.models.features import Features
from fastssl.models.heads import IBOTHead
from fastssl.optim.schedules import Sched
from fastssl.views import ViewSpec


class Encoded(NamedTuple):
    """What the backbones see in a step."""

    teacher: Features
    """Of the global crops, [2B, ...]."""
    student: Features
    """Of the global crops, their masked patches hidden, [2B, ...]."""
    local: Features | None
    """The student's of the local crops, [L B, ...]; None without any."""


class Logits(NamedTuple):
    cls: Tensor
    """[2B, O]; the student's go on with its local crops: [(2 + L) B, O]."""
    patches: Tensor
    """[R, O'], of the listed patches."""


class IBOTNet(nn.Module):
    """Backbone and head, which the method runs one after the other."""

    def __init__(self, backbone: nn.Module, cfg: IBOT.Config):
        super().__init__()
        self.backbone = backbone
        self.head = IBOTHead(
            backbone.num_features,
            cfg.out_dim,
            patch_out_features=None if cfg.shared_head else cfg.patch_out_dim,
            hidden=cfg.hidden,
            bottleneck=cfg.bottleneck,
            layers=cfg.head_layers,
            norm_last_layer=cfg.norm_last_layer,
        )


class IBOT(SelfDistillation):
    @dataclass(frozen=True, kw_only=True)
    class Config(DistillationConfig):
        """DINO's head, temperatures and centre, and those of the patches."""

        name: ClassVar[str] = "ibot"

        out_dim: int = 8192
        """Outputs O of the head."""
        shared_head: bool = True
        """Patches share the last layer of the head; otherwise they have one of their own with `patch_out_dim` outputs."""
        patch_out_dim: int = 8192
        warmup_teacher_patch_temp: float = 0.04
        """Teacher temperature of patches in epoch `pred_start_epoch` and before; the length of its warm-up is the other's."""
        teacher_patch_temp: float = 0.07
        patch_center_momentum: float = 0.9
        pred_start_epoch: int = 0
        """Epoch from which on patches are masked."""
        cls_weight: float = 1.0
        """Weight of the loss of [CLS] tokens (lambda_1)."""
        patch_weight: float = 1.0
        """Weight of the loss of masked patches (lambda_2)."""

    def __init__(self, cfg: Config, backbone: Callable[[], nn.Module], norm: str):
        net = IBOTNet(backbone(), cfg)
        if not net.backbone.mask_stride:
            raise ConfigError("iBOT hides patches: take a ViT as --model.arch.")
        super().__init__(cfg, net, norm, {"cls": cfg.out_dim, "patch": cfg.out_dim if cfg.shared_head else cfg.patch_out_dim})
        self.centers.momentum["patch"] = cfg.patch_center_momentum
        # Beside the networks: only the student uses it, and the backbones stay what timm loads.
        self.masked_embed = nn.Parameter(torch.zeros(1, net.backbone.embed_dim))
        self.register_buffer("teacher_patch_temp", torch.tensor(float(cfg.warmup_teacher_patch_temp)), persistent=False)
        self.register_buffer("masking", torch.tensor(cfg.pred_start_epoch == 0), persistent=False)

    @classmethod
    def check_views(cls, views: ViewSpec) -> None:
        super().check_views(views)
        if views[0].mask is None or views[1].mask is None or any(view.mask for view in views[2:]):
            raise ConfigError(f"{cls.__name__} masks its two global crops and no others: start from one of its presets.")

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        super().check(cfg)
        if cfg.method.bn_in_head:
            raise ConfigError(
                f"{cls.__name__}'s head sees masked patches only, which BatchNorm would normalise by: set --method.bn-in-head False."
            )
        with torch.device("meta"):
            stride = build_backbone(cfg.model.arch, image_size=cfg.model.image_size).mask_stride
        if not stride:
            raise ConfigError(f"{cls.__name__} hides patches, which {cfg.model.arch} does not offer: take a ViT as --model.arch.")
        for v, view in enumerate(cfg.views[:2]):
            if view.mask.patch_size != stride:
                raise ConfigError(
                    f"--views.{v}.mask.patch-size {view.mask.patch_size} is not the {stride} pixels of {cfg.model.arch}: "
                    f"set --views.0.mask.patch-size {stride} --views.1.mask.patch-size {stride}."
                )

    def before_step(self, sched: Sched) -> None:
        super().before_step(sched)
        c, epoch = self.cfg, sched.epoch - self.cfg.pred_start_epoch
        schedule = {"warmup": c.warmup_teacher_patch_temp, "final": c.teacher_patch_temp, "warmup_epochs": c.warmup_teacher_temp_epochs}
        self.teacher_patch_temp.fill_(c.warmup_teacher_patch_temp if epoch < 0 else teacher_temperature(epoch, **schedule))
        self.masking.fill_(epoch >= 0)

    def dropped_gradients(self, sched: Sched) -> Iterable[nn.Parameter]:
        if sched.epoch >= self.cfg.freeze_last_layer:
            return ()
        return [p for layer in self.student.head.last_layers() for p in layer.parameters()]

    def forward(self, views: Views, sched: Sched) -> StepOutput:
        return self.ibot_loss(self.encode(views), views)

    def masks(self, views: Views) -> Tensor:
        """bool [2B, h, w]: the hidden patches of the global crops; none before `pred_start_epoch`."""
        return views.masks.transpose(0, 1).flatten(0, 1) & self.masking

    def encode(self, views: Views) -> Encoded:
        global_crops, *local_crops = (group.pixels for group in views.groups)
        with torch.no_grad():
            teacher = self.teacher.backbone(global_crops)
        student = self.student.backbone(global_crops, self.masks(views), self.masked_embed)
        return Encoded(teacher, student, self.student.backbone(local_crops[0]) if local_crops else None)

    def ibot_loss(self, encoded: Encoded, views: Views) -> StepOutput:
        """iBOT's two losses, and the step's share of the centres."""
        rows, weights = views.masked.clamp(min=0), patch_weights(self.masks(views).flatten(1), views.masked)
        teacher, patch_means = self.teacher_logits(encoded, rows)
        return self.losses(self.student_logits(encoded, rows), teacher, patch_means, weights)

    def student_logits(self, encoded: Encoded, rows: Tensor) -> Logits:
        head, crops = self.student.head, [f.pooled for f in (encoded.student, encoded.local) if f is not None]
        patches = encoded.student.tokens.flatten(0, 1)[rows]
        units = head.bottleneck(torch.cat((*crops, patches)))
        return Logits(*head.logits(*units.tensor_split((len(units) - len(patches),))))

    @torch.no_grad()
    def teacher_logits(self, encoded: Encoded, rows: Tensor) -> tuple[Logits, Tensor]:
        """-> logits, and the mean logits of all patches of each crop [2B, O'], which the patch centre follows."""
        head, units = self.teacher.head, self.teacher.head.bottleneck(encoded.teacher.tokens)
        with torch.autocast(units.device.type, enabled=False):  # the mean has more digits than a compute dtype of 16 bits
            means = head.patch_logits(units.mean(1))
        return Logits(*head.logits(head.bottleneck(encoded.teacher.pooled), units.flatten(0, 1)[rows])), means

    def losses(self, student: Logits, teacher: Logits, patch_means: Tensor, weights: Tensor) -> StepOutput:
        """lambda_1 L_cls + lambda_2 L_patch (methods/ibot.md section 5); weights: [R], of the listed patches."""
        c = self.cfg
        q = self.teacher_probabilities(teacher.cls, "cls")
        cls = c.cls_weight * dino_loss(*student.cls.tensor_split((len(q),)), q, c.student_temp)
        q_patch = teacher_probabilities(teacher.patches, self.teacher_patch_temp, self.centers["patch"])
        weights = weights.to(q_patch.dtype)
        patch = c.patch_weight * masked_loss(student.patches, q_patch, weights, c.student_temp)
        self.centers.accumulate({"cls": teacher.cls, "patch": patch_means})
        logs = {
            "loss_cls": cls.detach(),
            "loss_patch": patch.detach(),
            "teacher_entropy": entropy(q),
            "patch_entropy": entropy(q_patch, weights),
        }
        return StepOutput(cls + patch, logs)
