"""W2SSL, "what and where" (Zhao et al., IEEE TCSVT 2023, DOI 10.1109/TCSVT.2023.3298937), as released (methods/w2ssl.md), on MoCo v3.

Every image gives k overlapping parts (two strips, or four quadrants) to each of two views.  The patches of the global batch are
shuffled and tiled 2 x 2 into montages, so that an image costs the network k / 4 pictures a view.  A supervised contrastive loss, whose
classes are the images, compares predictions with the target network's projections; a linear layer says which part a patch is.

Shapes: n images on all W ranks, R = k n rows a view, C channels, K = cfg.dim; rows in the order of models/montage.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.batch import Views
from fastssl.collapse import embedding_logs
from fastssl.collectives import rank, world_size
from fastssl.config import ConfigError, MethodConfig, RunConfig
from fastssl.ema import Ema, frozen_copy
from fastssl.losses.supervised_contrastive import supervised_contrastive
from fastssl.method import Method, StepOutput
from fastssl.methods.mocov3 import Head
from fastssl.models.montage import Routes, decouple, drawn_rows, tile, to_device
from fastssl.models.norm import apply_norm_policy
from fastssl.optim.schedules import Sched
from fastssl.precision import unit_rows, wide
from fastssl.views import PatchCrop, ViewSpec, groups


@dataclass
class Montages:
    """A step's pictures on this rank, and what the losses ask of their patches."""

    view1: Tensor
    """[R / 4 W, 3, 2h, 2w], channels-last; view2 alike, of the same patches in the same places."""
    view2: Tensor
    location: Tensor
    """int64 [R / W]: which part of its image each row is."""
    positives: Tensor
    """int64 [2 R / W, 2 k - 1]: of each query row, then of each key row, the others of its image.  They are counted over the ranks,
    a rank's queries before its keys."""


class Encoder(nn.Module):
    """Backbone, projector ("what") and locator ("where")."""

    def __init__(self, backbone: nn.Module, cfg: W2SSL.Config):
        super().__init__()
        self.backbone = backbone
        self.projector = Head(backbone.num_features, cfg.hidden, cfg.dim, layers=2, last_bn=True)
        self.locator = nn.Linear(backbone.num_features, cfg.parts)

    def rows(self, montages: Tensor) -> Tensor:
        """[G, 3, 2h, 2w] -> [4 G, C]."""
        return decouple(self.backbone(montages).map)


class W2SSL(Method):
    @dataclass(frozen=True, kw_only=True)
    class Config(MethodConfig):
        """W2SSL's montages, heads and losses."""

        name: ClassVar[str] = "w2ssl"

        parts: int = 2
        """Patches k of an image in each view: 2 (strips) or 4 (quadrants)."""
        permutation: Literal["global", "rank"] = "global"
        """What the patches of a montage are drawn from. global: all ranks' images, as published; rank: those of its rank, so that no
        pixels move. Losses are over the global batch either way."""
        hidden: int = 4096
        """Width of projector and predictor."""
        dim: int = 256
        """Projection K."""
        temperature: float = 0.3
        base_temperature: float = 0.07
        """The contrastive loss has the factor temperature / base_temperature, which LARS leaves in the updates of one-dimensional
        parameters."""
        location_weight: float = 1.0
        contrast_weight: float = 1.0

    backbone_prefix = "online.backbone."
    target_backbone_prefix = "target.backbone."
    couples_batch = True
    norm_policies = ("local", "sync")

    def __init__(self, cfg: Config, backbone: Callable[[], nn.Module], norm: str):
        super().__init__()
        self.cfg = cfg
        self.online = apply_norm_policy(Encoder(backbone(), cfg), norm)
        self.predictor = apply_norm_policy(Head(cfg.dim, cfg.hidden, cfg.dim, layers=2, last_bn=False), norm)
        self.target = frozen_copy(self.online)
        self.ema = (Ema(self.online, self.target, when="before_forward"),)

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        super().check(cfg)
        m = cfg.method
        if not cfg.model.arch.startswith("resnet"):
            raise ConfigError(f"W2SSL cuts a feature map into patches: take a ResNet as --model.arch, not {cfg.model.arch}.")
        if (found := parts_of(cfg.views)) != m.parts:
            raise ConfigError(f"These views cut each image into {found} parts: set --method.parts {found}, or take other views.")
        if cfg.data.last_batch != "drop":
            raise ConfigError("W2SSL tiles whole batches into montages: set --data.last-batch drop.")

    @classmethod
    def check_views(cls, views: ViewSpec) -> None:
        parts_of(views)

    @classmethod
    def check_ranks(cls, cfg: RunConfig, world: int) -> None:
        rows = cfg.method.parts * cfg.train.global_batch_size
        if rows % (4 * world):
            step = 4 * world // math.gcd(cfg.method.parts, 4 * world)
            below = max(cfg.train.global_batch_size // step, 1) * step
            raise ConfigError(
                f"{cfg.train.global_batch_size} images give {rows} patches a view, which do not fill montages of 4 equally on {world} "
                f"ranks. Set --train.global-batch-size to {below} or {below + step}."
            )

    @classmethod
    def derived(cls, cfg: RunConfig, world: int) -> dict[str, str]:
        n, parts = cfg.train.global_batch_size, cfg.method.parts
        montages = parts * n // 4
        return {
            "images per step": f"{n}  (the learning rate scales with these)",
            "montages per step and view": f"{montages}  ({n} x {parts} patches / 4; {montages // world} per rank)",
            "location loss at chance": f"{math.log(parts):.4f}  (it stays there, or above ln 2 for quadrants: flips hide left from right)",
            "contrast at chance": f"{math.log(2 * parts * n - 1):.4f} nats",
        }

    def rows(self, images: int, world: int, sched: Sched) -> np.ndarray:
        """The step's montages: int64 [W, R / W], the patch number of every row; the same on all ranks."""
        return drawn_rows(self.cfg.parts, images, world, seed=sched.seed, step=sched.step, within=self.cfg.permutation)

    @torch.no_grad()
    def arrange(self, views: Views, sched: Sched) -> Montages:
        patches = [group.pixels for group in views.groups]
        n, device = len(patches[0]) // self.cfg.parts * world_size(), patches[0].device
        rows = self.rows(n, world_size(), sched)
        routes = Routes.of(rows, n, rank(), device)
        location, positives = to_device((rows[rank()] // n, other_rows(rows, n)[rank()]), device)
        return Montages(*(tile(routes.exchange(x), routes.place) for x in patches), location, positives)

    def forward(self, montages: Montages, sched: Sched) -> StepOutput:
        # separate BN batches, as published
        rows1, rows2 = self.online.rows(montages.view1), self.online.rows(montages.view2)
        with torch.no_grad():
            k1, k2 = (self.target.projector(self.target.rows(x)) for x in (montages.view1, montages.view2))
        return self.losses(rows1, rows2, k1, k2, montages)

    def losses(self, rows1: Tensor, rows2: Tensor, k1: Tensor, k2: Tensor, montages: Montages) -> StepOutput:
        """w_loc L_loc + w_crop L_crop.  rows: [R / W, C] of the backbone, k: [R / W, K] target projections, not normalised."""
        cfg = self.cfg
        logits = self.online.locator(rows1)
        loss_loc = F.cross_entropy(wide(logits), montages.location)
        z1, z2 = self.online.projector(rows1), self.online.projector(rows2)
        loss_crop = sum(
            supervised_contrastive(
                torch.cat((unit_rows(q), unit_rows(k))),  # keys are anchors too, as published
                montages.positives,
                temperature=cfg.temperature,
                base_temperature=cfg.base_temperature,
            )
            for q, k in ((self.predictor(z1), k2), (self.predictor(z2), k1))
        )
        loss = cfg.location_weight * loss_loc + cfg.contrast_weight * loss_crop
        logs = {
            "loss_loc": loss_loc.detach(),
            # Flips make left and right nearly undecidable: the published run never leaves this value (methods/w2ssl.md section 12).
            "loss_loc_chance": torch.full_like(loss_loc.detach(), math.log(cfg.parts)),
            "loss_crop": loss_crop.detach(),
            "loss_crop_nats": loss_crop.detach() * (cfg.base_temperature / (2 * cfg.temperature)),
            **embedding_logs(z1),
        }
        return StepOutput(loss, logs)


def parts_of(views: ViewSpec) -> int:
    """Patches of an image in each of the two groups of views; ConfigError when these are not two equal ones."""
    counts = [sum(c.patches if isinstance(c := views[v].crop, PatchCrop) else 1 for v in group) for group in groups(views)]
    sizes = [c.patch_size if isinstance(c := views[group[0]].crop, PatchCrop) else c.size for group in groups(views)]
    if len(counts) != 2 or counts[0] != counts[1] or sizes[0] != sizes[1]:
        raise ConfigError(
            f"W2SSL trains on two views of each part of an image, view 1 of all parts before view 2: got groups of {counts} patches of "
            f"{sizes} pixels. Give all views the same --views.N.crop.size."
        )
    return counts[0]


def other_rows(rows: np.ndarray, images: int) -> np.ndarray:
    """Patch numbers of the rows of one view, int64 [W, R / W] -> `Montages.positives` of every rank, [W, 2 R / W, 2 k - 1]."""
    world, share = rows.shape
    place = np.argsort(rows, axis=None).reshape(-1, images)  # [k, n]: the row of patch j of image i
    query = place + place // share * share
    members = np.concatenate((query, query + share)).T[rows % images]  # [W, R / W, 2 k]: of each row's image
    own = (np.arange(world) * 2 * share)[:, None] + np.arange(2 * share)
    members = np.concatenate((members, members), axis=1)  # a rank's queries, then its keys
    return members[members != own[..., None]].reshape(world, 2 * share, -1)
