"""LEWEL_B (Huang et al., CVPR 2022, arXiv 2203.14898): learning where to learn, on a BYOL base.

The projection head g, applied to every pixel as well as to the pooled vector, gives K channels; normalised and softmaxed
over space they are K alignment maps.  The feature map is pooled again with them, a second head p projects the n aligned
vectors, and a BYOL loss pairs them by index.  No geometry is needed.

Shapes: B images, C channels, N = h * w pixels, K = cfg.dim, H = cfg.heads groups, n = K / H aligned vectors.  Positions
come before channels ([B, N, C]): heads are plain row-wise GEMMs and a channels-last map needs no copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastssl.batch import Views
from fastssl.collapse import embedding_logs
from fastssl.config import ConfigError, MethodConfig, RunConfig
from fastssl.ema import Ema, frozen_copy
from fastssl.losses.cosine import cosine_loss
from fastssl.method import Method, StepOutput
from fastssl.models.heads import MLP
from fastssl.models.norm import apply_norm_policy
from fastssl.optim.schedules import Sched
from fastssl.precision import unit_rows


class Embeddings(NamedTuple):
    """z [B, K]: global embedding; aligned [B, n, K]; neither is normalised."""

    z: Tensor
    aligned: Tensor


def pooled_and_pixels(feature_map: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, 1 + N, C]: the pooled vector at position 0, then every pixel."""
    pixels = feature_map.flatten(2).transpose(1, 2)
    return torch.cat((pixels.mean(1, keepdim=True), pixels), dim=1)


def alignment_maps(scores: Tensor, scale: float) -> Tensor:
    """[B, N, K] -> [B, N, K]: unit vectors over K at each pixel, then a softmax over the N pixels of each map."""
    return torch.softmax(unit_rows(scores) / scale, dim=1)


def aligned_pooling(pixels: Tensor, maps: Tensor, heads: int) -> Tensor:
    """[B, N, C] features, [B, N, K] maps -> [B, n, C]: channel group t is pooled with map group t.

    A[b, j, c] = sum_m X[b, m, c] M[b, m, t n + j],  t = floor(c / (C / H)): one batched product per (image, group).
    """
    x = pixels.unflatten(-1, (heads, -1))
    m = maps.to(pixels.dtype).unflatten(-1, (heads, -1))
    return torch.einsum("bmtj,bmtc->bjtc", m, x).flatten(2)


@dataclass(frozen=True, kw_only=True)
class AlignedConfig(MethodConfig):
    """Heads and maps, as LEWEL_B and LEWEL_M have them."""

    hidden: int = 4096
    """Width of all heads."""
    dim: int = 256
    """Projection K; also the number of alignment maps."""
    heads: int = 4
    """Channel groups H: n = K / H aligned vectors."""
    scale: float = 1.0
    """Temperature sigma of the maps' softmax."""
    loss_weight: float = 0.5
    """Weight w of the global term; the aligned term has 1 - w."""

    def projector(self, channels: int) -> nn.Module:
        """A new head from `channels` to K: g or p."""
        raise NotImplementedError(f"{type(self).__qualname__} has no projector")


class AlignedNet(nn.Module):
    """Backbone f, coupled projector g, projector p of the aligned vectors.  images -> Embeddings."""

    def __init__(self, backbone: nn.Module, cfg: AlignedConfig):
        super().__init__()
        channels = backbone.num_features
        for what, width in (("dim", cfg.dim), ("the backbone's width", channels)):
            if width % cfg.heads:
                raise ConfigError(f"LEWEL pools in --method.heads {cfg.heads} groups, which must divide {what} ({width}).")
        self.backbone = backbone
        self.projector = cfg.projector(channels)
        self.aligned_projector = cfg.projector(channels)
        self.heads, self.scale = cfg.heads, cfg.scale

    def forward(self, x: Tensor) -> Embeddings:
        return self.embed(self.backbone(x).map)

    def embed(self, feature_map: Tensor) -> Embeddings:
        rows = pooled_and_pixels(feature_map)
        projected = self.projector.rows(rows)  # pooled vector and pixels share one BN batch
        maps = alignment_maps(projected[:, 1:], self.scale)
        aligned = aligned_pooling(rows[:, 1:], maps, self.heads)
        return Embeddings(projected[:, 0], self.aligned_projector.rows(aligned))


def check_feature_map(name: str, cfg: RunConfig) -> None:
    """Maps are of a convolutional network."""
    if not cfg.model.arch.startswith("resnet"):
        raise ConfigError(f"{name} pools a feature map with its alignment maps: take a ResNet as --model.arch, not {cfg.model.arch}.")


class LEWEL(Method):
    @dataclass(frozen=True, kw_only=True)
    class Config(AlignedConfig):
        """LEWEL_B's heads and maps."""

        name: ClassVar[str] = "lewel"

        projector_layers: int = 2
        """Linear layers of g and p; the predictors have two."""

        def projector(self, channels: int) -> nn.Module:
            return MLP(channels, self.hidden, self.dim, layers=self.projector_layers)

    backbone_prefix = "online.backbone."
    target_backbone_prefix = "target.backbone."

    def __init__(self, cfg: Config, backbone: Callable[[], nn.Module], norm: str):
        super().__init__()
        self.online = apply_norm_policy(AlignedNet(backbone(), cfg), norm)
        self.predictor = apply_norm_policy(MLP(cfg.dim, cfg.hidden, cfg.dim), norm)
        self.aligned_predictor = apply_norm_policy(MLP(cfg.dim, cfg.hidden, cfg.dim), norm)
        self.target = frozen_copy(self.online)
        self.loss_weight = cfg.loss_weight
        self.eman = norm == "eman"
        self.ema = (Ema(self.online, self.target, buffers=self.eman, target_mode="eval" if self.eman else "train"),)

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        super().check(cfg)
        check_feature_map(cls.__name__, cfg)

    def project_targets(self, views: Views) -> tuple[Embeddings, Embeddings]:
        """Target embeddings of each view.  In eval mode (EMAN) both views are one batch; otherwise BatchNorm sees them apart."""
        with torch.no_grad():
            if self.eman:
                z, aligned = self.target(views.groups[0].pixels)
                return tuple(Embeddings(*pair) for pair in zip(z.chunk(2), aligned.chunk(2), strict=True))
            x1, x2 = views.per_view()
            return self.target(x1), self.target(x2)

    def direction(self, online: Embeddings, target: Embeddings) -> tuple[Tensor, Tensor]:
        """Global and aligned loss of predicting `target` from `online`."""
        return (
            cosine_loss(self.predictor(online.z), target.z),
            cosine_loss(self.aligned_predictor.rows(online.aligned), target.aligned),
        )

    def forward(self, views: Views, sched: Sched) -> StepOutput:
        x1, x2 = views.per_view()  # separate BN batches, as published
        o1, o2 = self.online(x1), self.online(x2)
        t1, t2 = self.project_targets(views)
        (g12, a12), (g21, a21) = self.direction(o1, t2), self.direction(o2, t1)
        w = self.loss_weight
        loss = w * (g12 + g21) + (1 - w) * (a12 + a21)  # in [0, 8]
        logs = {"loss_global": (g12 + g21).detach(), "loss_aligned": (a12 + a21).detach(), **embedding_logs(o1.z)}
        return StepOutput(loss, logs)
