"""LEWEL_M (Huang et al., CVPR 2022, arXiv 2203.14898) on a MoCo v2 base, as this project defines it (methods/lewel_m.md section 0).

No code of it was released and the paper's text was not at hand: which queue the aligned loss has, the heads, temperatures and weights
are our choices.  Its results are no reproduction of the paper's.

LEWEL's coupled head replaces MoCo's: the global embedding is contrasted with one queue, the n aligned embeddings, each with the key's
of the same index, with another.  B images of this rank, K = cfg.dim, n = K / cfg.heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fastssl.collapse import embedding_logs
from fastssl.config import RunConfig
from fastssl.losses.info_nce import info_nce, top
from fastssl.method import StepOutput
from fastssl.methods.lewel import AlignedConfig, AlignedNet, check_feature_map
from fastssl.methods.mocov2 import MomentumContrast
from fastssl.models.heads import MLP, PlainMLP
from fastssl.precision import unit_rows


class LEWELM(MomentumContrast):
    @dataclass(frozen=True, kw_only=True)
    class Config(AlignedConfig):
        """LEWEL's maps, MoCo v2's head, queues and temperature."""

        name: ClassVar[str] = "lewel_m"

        hidden: int = 2048
        dim: int = 128
        head_norm: Literal["none", "bn"] = "none"
        """Heads g and p. none: MoCo v2's, with biases; bn: LEWEL_B's, with BatchNorm."""
        queue_size: int = 65536
        """Earlier global keys; a multiple of the global batch."""
        aligned_queue_size: int = 65536
        """Earlier aligned keys; a multiple of what a step writes: the global batch, times n for aligned_queue all."""
        aligned_queue: Literal["mean", "all"] = "mean"
        """What an image leaves in the aligned queue. mean: the unit mean of its n keys; all: every one."""
        temperature: float = 0.2
        aligned_temperature: float = 0.2

        def projector(self, channels: int) -> nn.Module:
            return (PlainMLP if self.head_norm == "none" else MLP)(channels, self.hidden, self.dim)

    def __init__(self, cfg: Config, backbone: Callable[[], nn.Module], norm: str):
        queues = {"global": cfg.queue_size, "aligned": cfg.aligned_queue_size}
        super().__init__(AlignedNet(backbone(), cfg), norm, queues, cfg.dim)
        self.cfg = cfg

    @classmethod
    def check(cls, cfg: RunConfig) -> None:
        super().check(cfg)
        check_feature_map(cls.__name__, cfg)

    @classmethod
    def queue_sizes(cls, cfg: Config) -> dict[str, tuple[int, int]]:
        per_image = max(cfg.dim // cfg.heads, 1) if cfg.aligned_queue == "all" else 1
        return super().queue_sizes(cfg) | {"--method.aligned-queue-size": (cfg.aligned_queue_size, per_image)}

    def encode(self, encoder: nn.Module, x: Tensor) -> Tensor:
        """[B, 1 + n, K]: the global embedding, then the aligned ones; one tensor, so that shuffle-BN sends it in one piece."""
        z, aligned = encoder(x)
        return unit_rows(torch.cat((z.unsqueeze(1), aligned), dim=1))

    def losses(self, q: Tensor, k: Tensor) -> StepOutput:
        c, aligned = self.cfg, k[:, 1:]
        loss_global, rank = info_nce(q[:, 0], k[:, 0], self.queues["global"].rows, c.temperature)
        # Row (b, j) against key (b, j).
        rows, row_keys = q[:, 1:].flatten(0, 1), aligned.flatten(0, 1)
        loss_aligned, aligned_rank = info_nce(rows, row_keys, self.queues["aligned"].rows, c.aligned_temperature)
        loss = c.loss_weight * loss_global + (1 - c.loss_weight) * loss_aligned
        logs = {"loss_global": loss_global.detach(), "loss_aligned": loss_aligned.detach(), **embedding_logs(q[:, 0])}
        logs |= {"top1": top(rank, 1), "top5": top(rank, 5), "aligned_top1": top(aligned_rank, 1), "aligned_top5": top(aligned_rank, 5)}
        return StepOutput(loss, logs, {"global": k[:, 0], "aligned": row_keys if c.aligned_queue == "all" else unit_rows(aligned.mean(1))})
