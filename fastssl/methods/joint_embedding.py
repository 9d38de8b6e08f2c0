"""What SFRIK, SimCLR, AUH and VICReg share (methods/sfrik.md sections 3 and 4): one network that every view trains.

No target network, no predictor, no queue, and nothing is detached; what keeps the embeddings apart is a term over the global
batch.  B images of this rank, q the projector's outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastssl.batch import Views
from fastssl.config import MethodConfig
from fastssl.method import Method
from fastssl.models.heads import ExpanderMLP
from fastssl.models.norm import apply_norm_policy
from fastssl.precision import wide


@dataclass(frozen=True, kw_only=True)
class JointEmbeddingConfig(MethodConfig):
    """The projector."""

    mlp: str = "8192-8192-8192"
    """Widths of the projector's layers; the last is the dimension q of the embeddings."""


class Encoder(nn.Module):
    """Batches of images, each [R, 3, s, s] -> the projections of each, [R, q]."""

    def __init__(self, backbone: nn.Module, mlp: str):
        super().__init__()
        self.backbone = backbone
        self.projector = ExpanderMLP(backbone.num_features, mlp)

    def forward(self, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.projector.of_batches([self.backbone(x).pooled for x in batches])


class JointEmbedding(Method):
    """The network and its passes.  Subclasses write `forward`, and `check_views` if they take more than two views."""

    couples_batch = True
    backbone_prefix = "encoder.backbone."
    norm_policies = ("local", "sync")

    def __init__(self, cfg: JointEmbeddingConfig, backbone: Callable[[], nn.Module], norm: str):
        super().__init__()
        self.cfg = cfg
        self.encoder = apply_norm_policy(Encoder(backbone(), cfg.mlp), norm)

    def project(self, views: Views) -> tuple[Tensor, ...]:
        """[B, q] of every view in the declared order, in fp32 or wider, not normalised.

        Two views go through the network one after the other, so that BatchNorm has statistics of each; of more (a multi-crop),
        each group is one batch.
        """
        if sum(len(group.views) for group in views.groups) == 2:
            projected = self.encoder(views.per_view())
        else:
            batches = self.encoder([group.pixels for group in views.groups])
            projected = [z for group, z_group in zip(views.groups, batches, strict=True) for z in z_group.chunk(len(group.views))]
        return tuple(wide(z) for z in projected)
