"""Vision transformers with a [CLS] token (Dosovitskiy et al., ICLR 2021, arXiv 2010.11929), as DINO trains them
(Caron et al., ICCV 2021, arXiv 2104.14294; methods/dino.md 1.2), with masked patches for iBOT (methods/ibot.md section 2).

timm's blocks and names, so a state dict of ours loads strictly into timm's model without its head.  Initialisation: linears,
[CLS] and positions from N(0, 0.02) cut at +-2, biases 0, LayerNorm weight 1 and bias 0; the patch embedding keeps PyTorch's
default of a convolution.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastssl.config import ConfigError
from fastssl.models.features import Backbone, Features
from fastssl.models.patch_projection import PatchProjection


class ViT(Backbone):
    """images [B, 3, h, w] -> Features(pooled [B, D], tokens [B, N, D]): [CLS] and patches after the final LayerNorm.

    dim, depth, heads   D, blocks, attention heads
    patch_size          p, pixels; N = (h // p) (w // p) patches, row by row; a rest of the image is not seen
    image_size          pixels; side of the images whose patches the position table counts.  Others interpolate in it
    drop_path           block i of n drops each residual branch of each sample with probability drop_path i / (n - 1) when
                        training, and divides the kept ones by the rest
    layer_scale         what the learned factors of every channel of every residual branch start from; 0: there are none
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        patch_size: int,
        *,
        image_size: int = 224,
        drop_path: float = 0.0,
        layer_scale: float = 0.0,
    ):
        super().__init__()
        if image_size < patch_size:
            raise ConfigError(f"--model.image-size {image_size} is smaller than a patch ({patch_size} pixels).")
        if not 0 <= drop_path < 1:
            raise ConfigError(f"--model.drop-path {drop_path} must be at least 0 and smaller than 1.")
        self.num_features, self.patch_size, self.grid = dim, patch_size, image_size // patch_size
        self.embed_dim, self.mask_stride, self.num_heads = dim, patch_size, heads
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid**2, dim))
        self.patch_embed = nn.Sequential(OrderedDict(proj=PatchProjection(dim, patch_size)))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        options = {"qkv_bias": True, "norm_layer": norm, "init_values": layer_scale or None}
        self.blocks = nn.ModuleList(Block(dim, heads, drop_path=rate, **options) for rate in rates)
        self.norm = norm(dim)
        for table in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(table, std=0.02)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                nn.init.zeros_(m.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, masked_embed: Tensor | None = None) -> Features:
        return self.last_blocks(x, 1, mask, masked_embed)[0]

    def last_blocks(self, x: Tensor, n: int, mask: Tensor | None = None, masked_embed: Tensor | None = None) -> list[Features]:
        """Features of the last n blocks' outputs in depth order, each after the same final LayerNorm.  ValueError without n blocks."""
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"last_blocks takes 1 to {len(self.blocks)} blocks, got {n}")
        x, outputs = self.embed(x, mask, masked_embed), []
        for i, block in enumerate(self.blocks, start=1):
            x = self.run(block, x)
            if i > len(self.blocks) - n:
                y = self.norm(x)
                outputs.append(Features(pooled=y[:, 0], tokens=y[:, 1:], unnormed=x[:, 1:]))
        return outputs

    def embed(self, x: Tensor, mask: Tensor | None = None, masked_embed: Tensor | None = None) -> Tensor:
        """images [B, 3, h, w] -> [B, 1 + N, D], the first block's input: [CLS] and patches, each with its position.

        mask [B, h / p, w / p], bool: patches whose embedding, bias included, is `masked_embed` [1, D] instead.
        """
        patches = self.patch_embed(x).flatten(2).transpose(1, 2)
        if mask is not None:
            patches = torch.where(mask.flatten(1).unsqueeze(-1), masked_embed, patches)
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), patches), dim=1) + self.positions(*x.shape[-2:])

    def positions(self, h: int, w: int) -> Tensor:
        """The position table for images of h x w pixels: [1, 1 + N, D], [CLS] first."""
        rows, columns = h // self.patch_size, w // self.patch_size
        if rows == self.grid and h == w:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        matrix = interpolation_matrix(self.grid, rows, columns, patches.device, patches.dtype)
        with torch.autocast(patches.device.type, enabled=False):  # the published interpolation is not autocast either
            return torch.cat((cls, matrix @ patches), dim=1)


# Compiled graphs hold the matrix as a constant.  They trace through lru_cache, but not through a function marked so.
@torch.compiler.assume_constant_result
def interpolation_matrix(grid: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[rows columns, grid^2]: times a table of grid x grid positions, the table of rows x columns.

    Bicubic (a = -0.75), taps beyond the border clamped, no antialias, and a step of grid / (rows + 0.1) positions where
    grid / rows would be expected: the published networks were trained with it (methods/dino.md 1.2).
    """
    return _interpolation_matrix(grid, rows, columns, device, dtype)


@lru_cache
def _interpolation_matrix(grid: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # an evaluation may be the first to ask, training needs it after
        unit = torch.eye(grid**2, dtype=torch.float64).view(grid**2, 1, grid, grid)
        # Given as factors the + 0.1 moves the sampling points, not the size: floor(rows + 0.1) = rows.
        factors = ((rows + 0.1) / grid, (columns + 0.1) / grid)
        resized = F.interpolate(unit, scale_factor=factors, mode="bicubic", align_corners=False, recompute_scale_factor=False)
        return resized.flatten(1).T.contiguous().to(device, dtype)


def probe_features(blocks: Sequence[Features], *, average: bool = False) -> Tensor:
    """What DINO's linear probe sees (methods/dino.md 9.2) of `ViT.last_blocks`: the [CLS] tokens side by side, [B, n D].

    With `average` (one block) the [CLS] token and the mean patch token interleaved, [B, 2 D]: cls_0, mean_0, cls_1, ...
    ValueError for `average` of several blocks.
    """
    if not average:
        return torch.cat([f.pooled for f in blocks], dim=-1)
    if len(blocks) != 1:
        raise ValueError(f"mean patch tokens go with the [CLS] token of one block, got {len(blocks)}")
    return torch.stack((blocks[0].pooled, blocks[0].tokens.mean(1)), dim=-1).flatten(1)
