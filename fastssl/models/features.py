"""What a backbone returns, and what a method may ask of one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
    recompute: bool = False
    """Keep only what enters each stage, and compute the rest again in the backward pass (--efficiency.checkpointing)."""

    def run(self, stage: nn.Module, x: Tensor) -> Tensor:
        """stage(x), recomputed where `recompute` asks for it.  Every backbone calls its stages (a transformer its blocks) through this."""
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return stage(x)
        if torch.compiler.is_compiling():  # a compiled backward recomputes without the changes of buffers, and takes no contexts
            return checkpoint(stage, x, use_reentrant=False)
        return checkpoint(stage, x, use_reentrant=False, context_fn=lambda: (contextlib.nullcontext(), statistics_kept(stage)))

    def forward(self, x: Tensor) -> Features:
        raise NotImplementedError(f"{type(self).__name__} has no forward")


@contextlib.contextmanager
def statistics_kept(stage: nn.Module) -> Iterator[None]:
    """A pass in training mode that changes no running statistics of BatchNorm: the second one over the same batch."""
    norms = [m for m in stage.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [(m.momentum, m.num_batches_tracked) for m in norms]
    for m in norms:
        m.momentum, m.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for m, (momentum, counter) in zip(norms, kept, strict=True):
            m.momentum, m.num_batches_tracked = momentum, counter
