"""Projection and prediction heads."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.config import ConfigError
from fastssl.models.features import Features
from fastssl.precision import unit_rows


class Pooled(nn.Module):
    """Features -> their pooled vector [B, C]."""

    def forward(self, features: Features) -> Tensor:
        return features.pooled


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


class PlainMLP(nn.Module):
    """linear - ReLU - linear with biases, as PyTorch initialises them: MoCo v2's head.  x: [R, in] rows -> [R, out]."""

    def __init__(self, in_features: int, hidden: int, out_features: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(in_features, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)

    def rows(self, x: Tensor) -> Tensor:
        """[B, P, in] -> [B, P, out], every position one row."""
        return self.mlp(x)


class ExpanderMLP(nn.Sequential):
    """The projector of SFRIK and VICReg (methods/sfrik.md section 3).  x: [R, in] rows -> [R, q].

    widths "a-b-q": linear - BN - ReLU to a and to b, then a linear without bias to q.  The other linears have biases; all start as
    PyTorch's do.  ConfigError unless `widths` is one or more positive numbers with hyphens between.
    """

    def __init__(self, in_features: int, widths: str):
        if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", widths):
            raise ConfigError(f"--method.mlp '{widths}' must be the widths of the layers with hyphens between, such as 8192-8192-32768.")
        *hidden, q = map(int, widths.split("-"))
        blocks: list[nn.Module] = []
        for a, b in pairwise((in_features, *hidden)):
            blocks += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
        super().__init__(*blocks, nn.Linear(hidden[-1] if hidden else in_features, q, bias=False))

    def of_batches(self, batches: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """self(x) of every x.  BatchNorm sees the batches one after the other; a linear takes all rows together, because reading the
        weights (1.3 GiB in fp32 at the published widths) is much of what it costs."""
        sizes, x = [len(b) for b in batches], torch.cat(tuple(batches))
        for layer in self:
            x = torch.cat([layer(b) for b in x.split(sizes)]) if isinstance(layer, _BatchNorm) else layer(x)
        return x.split(sizes)


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
        return self.product(unit_rows(x))

    def product(self, x: Tensor) -> Tensor:
        """<x, W_o> of rows x that are as long as they should be."""
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


class IBOTHead(nn.Module):
    """iBOT's projection head (methods/ibot.md section 3): a `DINOHead` whose last layer patches share with [CLS] or, with
    `patch_out_features`, have one of their own.

    `bottleneck` takes rows of either kind to unit vectors; `logits` and `patch_logits` go on from there.  The last layer is
    linear and has no bias, so the logits of a mean of unit vectors are the mean of their logits.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        patch_out_features: int | None = None,
        bottleneck: int = 256,
        norm_last_layer: bool = True,
        **options,
    ):
        """options: hidden, layers of `DINOHead`."""
        super().__init__()
        *mlp, self.last = DINOHead(in_features, out_features, bottleneck=bottleneck, norm_last_layer=norm_last_layer, **options)
        self.mlp = nn.Sequential(*mlp)
        own = patch_out_features is not None
        self.patch_last = Prototypes(bottleneck, patch_out_features, unit_norm=norm_last_layer) if own else None

    def last_layers(self) -> list[Prototypes]:
        """What the first epochs freeze."""
        return [self.last] if self.patch_last is None else [self.last, self.patch_last]

    def bottleneck(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., bottleneck], rows of length 1."""
        return unit_rows(self.mlp(x))

    def logits(self, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Unit rows [R, bottleneck] and [P, bottleneck] -> logits [R, O], [P, O']."""
        if self.patch_last is None:
            return self.last.product(torch.cat((cls, patches))).split((len(cls), len(patches)))
        return self.last.product(cls), self.patch_last.product(patches)

    def patch_logits(self, x: Tensor) -> Tensor:
        """Unit rows, or means of them, [..., bottleneck] -> [..., O']."""
        return self.last_layers()[-1].product(x)
