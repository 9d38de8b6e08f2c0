"""What a backbone returns, and what a method may ask of one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class Features:
    """Features of B images.  A convolutional network fills `map`, a transformer `tokens`."""

    pooled: Tensor
    """[B, D]: one vector per image, not normalised."""
    map: Tensor | None = None
    """[B, C, h, w]: the last feature map."""
    tokens: Tensor | None = None
    """[B, N, D]: the last layer's patch tokens."""
    unnormed: Tensor | None = None
    """[B, N, D]: the same before the final normalisation."""
    stages: dict[str, Tensor] | None = None
    """Feature maps [B, C', h', w'] by stage name, the last one too."""


class Backbone(nn.Module):
    """images [B, 3, h, w] -> Features.  Methods and evaluations rely on nothing else."""

    num_features: int
    """D of `Features.pooled`."""
    stage_channels: dict[str, int] = {}
    """C' of each of `Features.stages`."""
    mask_stride: int = 0
    """Pixels a side of what one element of a mask hides; 0: the backbone takes no masks.  One that does is called with `mask`
    [B, h / stride, w / stride] (bool) and `masked_embed` [1, embed_dim], which stands for the embedding of a hidden patch."""
    embed_dim: int = 0
    """Channels of a patch embedding of a backbone that takes masks."""
    num_heads: int = 0
    """Attention heads of a transformer's blocks; 0: there are none, or not the same number in all blocks."""

    def forward(self, x: Tensor) -> Features:
        raise NotImplementedError(f"{type(self).__name__} has no forward")
