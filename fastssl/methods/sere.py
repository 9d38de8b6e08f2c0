"""SERE (Li et al., TPAMI 2023, doi 10.1109/TPAMI.2023.3309979, arXiv 2206.05184): iBOT and self-relations of features (methods/sere.md).

Beside iBOT's losses, the similarities of tokens inside a view ("pixel" relations, where two crops overlap) and of channels (of the whole
view) have to be those that the teacher finds in another view.  Both take the tokens before the backbone's final norm; of the student's
global crops those with hidden patches.  Needs the boxes and flips of all crops.

B images, L local crops, N tokens of a global crop, C channels.  By shapes, ViT-S/16 and ten local crops, the relations take 1.3 billion
multiply-adds an image beside iBOT's 65; half of them are the heads', the others run in fp32.  Their memory: `losses.relations`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastssl.batch import Views
from fastssl.config import ConfigError, RunConfig
from fastssl.ema import Ema, frozen_copy
from fastssl.losses.relations import channel_loss, pixel_loss
from fastssl.method import StepOutput
from fastssl.methods.ibot import IBOT, Encoded
from fastssl.models.backbones import VITS
from fastssl.models.norm import apply_norm_policy
from fastssl.models.relations import RelationHeads
from fastssl.optim.schedules import Sched


class SERE(IBOT):
    @dataclass(frozen=True, kw_only=True)
    class Config(IBOT.Config):
        """iBOT's values, and those of the relations."""

        name: ClassVar[str] = "sere"

        alpha: float = 0.2
        """Weight of the pixel relations; iBOT's losses have (4 - alpha - beta) / 2."""
        beta: float = 0.5
        """Weight of the channel relations."""
        temperature_pixel: float = 0.5
        """Sharpens the teacher's pixel relations; the student's have 1."""
        temperature_channel: float = 0.1
        """Sharpens the teacher's channel relations."""
        overlap_size: tuple[int, int] = (13, 13)
        """Points a side at which the overlap of two global crops is sampled, for the rows and for the columns of a relation."""
        local_overlap_size: int = 6
        """The same for a global and a local crop, rows and columns alike."""
        relation_divisors: tuple[int, int] = (14, 6)
        """Channel relations of global and of local crops are divided by the squares of these: at 224 and 96 pixels and patches of 16,
        by the number of tokens."""
        local_relations: bool = True
        """The views have local crops, which have relation heads of their own."""

    def __init__(self, cfg: Config, backbone: Callable[[], nn.Module], norm: str):
        super().__init__(cfg, backbone, norm)
        channels, self.groups = self.student.backbone.num_features, self.student.backbone.num_heads
        if not self.groups:
            raise ConfigError("SERE's pixel relations have a group of channels for each attention head: take a ViT as --model.arch.")
        crops = ("global", "local") if cfg.local_relations else ("global",)
        self.student_relations = apply_norm_policy(nn.ModuleDict({crop: RelationHeads(channels) for crop in crops}), norm)
        # Its predictors and its heads for local crops never run, but follow: a checkpoint has the same parts of both networks.
        self.teacher_relations = frozen_copy(self.student_relations)
        self.ema = (*self.ema, Ema(self.student_relations, self.teacher_relations))

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        super().check(cfg)
        m = cfg.method
        if cfg.model.arch not in VITS:
            choice = ", ".join(VITS)
            raise ConfigError(f"SERE relates the tokens of a ViT, and {cfg.model.arch} is none: take one of {choice} as --model.arch.")
        if m.local_relations != (len(cfg.views) > 2):
            raise ConfigError(
                f"--method.local-relations {m.local_relations} does not go with {len(cfg.views) - 2} local crops: set it to "
                f"{not m.local_relations}, or start from a preset that has them."
            )
        if min(*m.overlap_size, m.local_overlap_size) < 2:
            raise ConfigError("--method.overlap-size and --method.local-overlap-size must be at least 2: from border to border.")
        if min(m.relation_divisors) <= 0:
            raise ConfigError("--method.relation-divisors must be positive.")

    def forward(self, views: Views, sched: Sched) -> StepOutput:
        encoded = self.encode(views)
        ibot = self.ibot_loss(encoded, views)
        pixel, channel = self.relation_losses(encoded, views)
        alpha, beta = self.cfg.alpha, self.cfg.beta
        loss = (4 - alpha - beta) / 2 * ibot.loss + alpha * pixel + beta * channel
        return StepOutput(loss, {**ibot.logs, "loss_pixel": pixel.detach(), "loss_channel": channel.detach()})

    def relation_losses(self, encoded: Encoded, views: Views) -> tuple[Tensor, Tensor]:
        """L_pixel and L_channel, each a mean over 2 + 2 L pairs of views (methods/sere.md section 5)."""
        cfg = self.cfg
        with torch.no_grad():
            z = self.teacher_relations["global"].project(encoded.teacher.unnormed)
        p = self.student_relations["global"](encoded.student.unnormed)
        p_local = None if encoded.local is None else self.student_relations["local"](encoded.local.unnormed)
        pixel = pixel_loss(
            z.pixel,
            p.pixel,
            None if p_local is None else p_local.pixel,
            views.boxes,
            views.flips,
            groups=self.groups,
            sizes=cfg.overlap_size,
            local_size=cfg.local_overlap_size,
            temperature=cfg.temperature_pixel,
        )
        channel = channel_loss(
            z.channel,
            p.channel,
            None if p_local is None else p_local.channel,
            divisors=cfg.relation_divisors,
            temperature=cfg.temperature_channel,
        )
        return pixel, channel
