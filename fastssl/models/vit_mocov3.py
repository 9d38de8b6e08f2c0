"""The vision transformer of MoCo v3 (Chen et al., ICCV 2021, arXiv 2104.02057; methods/mocov3.md 3.2).

The blocks and names of models/vit.py; other positions, another initialisation, and a convolutional stem as an option.
"""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from fastssl.config import ConfigError
from fastssl.models.vit import ViT


class MoCoV3ViT(ViT):
    """images [B, 3, h, w] -> Features(pooled [B, D], tokens [B, N, D]), as `ViT`.

    Positions are fixed sines and cosines.  Linears start Xavier-uniform (queries, keys and values as a matrix each), their
    biases from 0, [CLS] from N(0, 1e-6), the patch projection Xavier-uniform over its 3 p p inputs.

    conv_stem   four 3x3 convolutions of stride 2 and a 1x1 make the patches, which are then 16 pixels; PyTorch's initialisation
    """

    def __init__(self, dim: int, depth: int, heads: int, patch_size: int, *, conv_stem: bool = False, **options):
        """options: image_size and drop_path of `ViT`.  ConfigError for a width that the positions or the stem cannot divide."""
        super().__init__(dim, depth, heads, patch_size, **options)
        if dim % (8 if conv_stem else 4):
            raise ConfigError(f"MoCo v3's positions need a width that 4 divides, its convolutional stem 8: got {dim}.")
        if conv_stem and patch_size != 16:
            raise ConfigError(f"The convolutional stem makes patches of 16 pixels, not {patch_size}.")
        self.pos_embed = nn.Parameter(sincos_positions(dim, self.grid).to(self.cls_token.dtype), requires_grad=False)
        nn.init.normal_(self.cls_token, std=1e-6)
        for name, m in self.named_modules():
            if isinstance(m, nn.Linear):
                xavier_(m, matrices=3 if name.endswith(".qkv") else 1)
        self.conv_stem = conv_stem
        if conv_stem:
            self.patch_embed = nn.Sequential(OrderedDict(proj=convolutional_stem(dim)))
        else:
            proj = self.patch_embed.proj
            bound = math.sqrt(6 / (3 * patch_size**2 + dim))
            nn.init.uniform_(proj.weight, -bound, bound)
            nn.init.zeros_(proj.bias)

    def freeze_patch_projection(self) -> None:
        """Keep the patch projection as it was drawn: the remedy for unstable training.  A convolutional stem is left alone."""
        if not self.conv_stem:
            self.patch_embed.requires_grad_(False)


def sincos_positions(dim: int, grid: int) -> Tensor:
    """[1, 1 + grid^2, dim] in float64: zeros for [CLS], then sin(r w), cos(r w), sin(c w), cos(c w) of each patch's row r and
    column c, at the dim / 4 frequencies w_j = 10000^(-4 j / dim)."""
    quarter = dim // 4
    frequencies = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64).outer(frequencies)
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    patches = torch.cat((waves.repeat_interleave(grid, 0), waves.repeat(grid, 1)), dim=1)
    return torch.cat((patches.new_zeros(1, dim), patches)).unsqueeze(0)


def xavier_(linear: nn.Linear, *, matrices: int = 1) -> None:
    """Xavier-uniform weight, of `matrices` of equal height one above the other; bias 0."""
    bound = math.sqrt(6 / (linear.out_features / matrices + linear.in_features))
    nn.init.uniform_(linear.weight, -bound, bound)
    nn.init.zeros_(linear.bias)


def convolutional_stem(dim: int) -> nn.Sequential:
    """images [B, 3, h, w] -> [B, dim, h/16, w/16] (Xiao et al., NeurIPS 2021, arXiv 2106.14881)."""
    widths = (3, dim // 8, dim // 4, dim // 2, dim)
    layers: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        layers += [nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(dim, dim, 1))
