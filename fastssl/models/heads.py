"""Projection and prediction heads."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """linear - BN - ReLU, (layers - 1) times, then a linear; no biases.  x: [R, in] rows -> [R, out].

    Position-wise heads (LEWEL) pass B * P rows: BatchNorm statistics are then over all of them.  Linears start from
    N(0, init_std), by default N(0, sqrt(2 / out_features)) (Kaiming fan-out).
    """

    def __init__(self, in_features: int, hidden: int, out_features: int, *, layers: int = 2, init_std: float | None = None):
        super().__init__()
        widths = [in_features] + [hidden] * (layers - 1)
        blocks: list[nn.Module] = []
        for a, b in zip(widths, widths[1:], strict=False):
            blocks += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
        self.mlp = nn.Sequential(*blocks, nn.Linear(widths[-1], out_features, bias=False))
        for m in self.mlp:
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=init_std if init_std is not None else (2.0 / m.out_features) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)

    def rows(self, x: Tensor) -> Tensor:
        """[B, P, in] -> [B, P, out], every position one row."""
        return self.mlp(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class Prototypes(nn.Module):
    """Logits <x / |x|, W_o> on the weight-normalised rows W_o = g_o v_o / |v_o|.  x: [R, in] -> [R, out].

    v [out, in] starts as PyTorch's linears do, U(-1, 1) / sqrt(in), g [out, 1] from 1.  With `unit_norm` g stays 1 and the
    logits are cosines.  Norms are taken in fp32 or wider; under autocast the product runs in the compute dtype.
    """

    def __init__(self, in_features: int, out_features: int, *, unit_norm: bool):
        super().__init__()
        self.v = nn.Parameter(torch.empty(out_features, in_features))
        self.g = nn.Parameter(torch.ones(out_features, 1), requires_grad=not unit_norm)
        nn.init.uniform_(self.v, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=1e-12)
        # The weight has fewer elements than the logits of a multi-crop batch: it is the one that is scaled.
        return F.linear(x, self.v * (self.g / torch.linalg.vector_norm(self.v, dim=1, keepdim=True)))


class DINOHead(nn.Sequential):
    """DINO's projection head (Caron et al., ICCV 2021; methods/dino.md 1.3).  x: [R, in] rows of all crops -> logits [R, out].

    linear - [BN] - GELU, (layers - 1) times, a linear to `bottleneck`, then `last`: prototypes on the unit rows.  The
    linears have biases and start from N(0, 0.02) cut at +-2, and 0.  `last.parameters()` are what the first epochs freeze.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        bn: bool = False,
        norm_last_layer: bool = True,
    ):
        widths = [in_features] + [hidden] * (layers - 1) + [bottleneck]
        blocks: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False), start=1):
            blocks[f"linear{i}"] = nn.Linear(a, b)
            if i < layers:
                if bn:
                    blocks[f"bn{i}"] = nn.BatchNorm1d(b)
                blocks[f"gelu{i}"] = nn.GELU()
        blocks["last"] = Prototypes(bottleneck, out_features, unit_norm=norm_last_layer)
        super().__init__(blocks)
        for m in self:
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)


def embed_std(z: Tensor) -> Tensor:
    """Mean over dimensions of the standard deviation of unit rows of z [B, D], times sqrt(D): about 1 when spread, 0 when collapsed."""
    unit = torch.nn.functional.normalize(z.detach().float(), dim=-1)
    return unit.std(dim=0).mean() * z.shape[-1] ** 0.5
