"""Swin transformers (Liu et al., ICCV 2021, arXiv 2103.14030) for iBOT (methods/ibot.md section 2).  Without golden.

timm's parts and names, so a state dict of ours loads strictly into timm's model without its head, and gives its outputs at the
image size it was built for.  Two rules are for other sizes, such as local crops: maps are padded before they are shifted, so
that what the shift wraps around stays apart, and shifted only where there is more than one window.  What iBOT's own code does
there is not established; nor is the eps of its LayerNorms (ours: timm's 1e-5).

Initialisation: linears and the tables of relative positions from N(0, 0.02), biases 0, LayerNorm weight 1 and bias 0; the patch
embedding keeps PyTorch's default of a convolution.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from timm.models.swin_transformer import PatchMerging, WindowAttention, window_partition, window_reverse
from torch import Tensor, nn

from fastssl.config import ConfigError
from fastssl.models.features import Backbone, Features
from fastssl.models.patch_projection import PatchProjection

PATCH_SIZE = 4
STRIDE = 32
"""Pixels a side of what one token of the last stage stands for."""


class Swin(Backbone):
    """images [B, 3, h, w] -> Features(pooled [B, D], tokens [B, N, D]): patches of 32 pixels after the final LayerNorm, and their mean.

    dim, depths, heads   channels after the patch embedding, doubled by each later stage; blocks and attention heads of each stage
    window               side of the attention windows, in patches of the stage
    image_size           pixels; stages whose map of such an image is smaller than a window have windows of that size
    drop_path            block i of n, over all stages, drops each residual branch of each sample with probability
                         drop_path i / (n - 1) when training, and divides the kept ones by the rest
    """

    def __init__(
        self, dim: int, depths: Sequence[int], heads: Sequence[int], window: int, *, image_size: int = 224, drop_path: float = 0.0
    ):
        super().__init__()
        if image_size < STRIDE or image_size % STRIDE:
            raise ConfigError(f"--model.image-size {image_size} must be a multiple of the {STRIDE} pixels that Swin's last patches have.")
        if not 0 <= drop_path < 1:
            raise ConfigError(f"--model.drop-path {drop_path} must be at least 0 and smaller than 1.")
        self.num_features, self.embed_dim, self.mask_stride = dim * 2 ** (len(depths) - 1), dim, STRIDE
        self.window, self.image_size = window, image_size
        self.patch_embed = nn.Sequential(OrderedDict(proj=PatchProjection(dim, PATCH_SIZE), norm=_ChannelsLast(dim)))
        rates = iter([drop_path * i / max(sum(depths) - 1, 1) for i in range(sum(depths))])
        self.layers = nn.Sequential()
        for i, (depth, n) in enumerate(zip(depths, heads, strict=True)):
            side = min(window, image_size // PATCH_SIZE // 2**i)
            blocks = [Block(dim * 2**i, n, side, shifted=j % 2 == 1, drop_path=next(rates)) for j in range(depth)]
            merging = PatchMerging(dim * 2 ** (i - 1)) if i else nn.Identity()
            self.layers.append(nn.Sequential(OrderedDict(downsample=merging, blocks=nn.Sequential(*blocks))))
        self.norm = nn.LayerNorm(self.num_features)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.02)
                if m.bias is not None:
                    nn.init.zeros_(m.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, masked_embed: Tensor | None = None) -> Features:
        """mask [B, h / 32, w / 32], bool: patches whose embeddings, 8 x 8 each, are `masked_embed` [1, dim] instead.

        To an untrained network windows that are hidden as a whole are zeros, where every LayerNorm multiplies gradients by
        1 / sqrt(eps) = 316: iBOT's preset masks nothing in its first 50 epochs.
        """
        x = self.patch_embed(x)
        if mask is not None:
            times = STRIDE // PATCH_SIZE
            hidden = mask.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
            x = torch.where(hidden.unsqueeze(-1), masked_embed, x)
        for layer in self.layers:
            x = self.run(layer, x)
        x = x.flatten(1, 2)
        y = self.norm(x)
        return Features(pooled=y.mean(1), tokens=y, unnormed=x)


class _ChannelsLast(nn.LayerNorm):
    """LayerNorm over the channels of maps [B, C, h, w] -> [B, h, w, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1))


class Block(nn.Module):
    """Attention within windows of a map [B, h, w, dim], and an MLP; every second block `shifted` by half a window."""

    def __init__(self, dim: int, heads: int, window: int, *, shifted: bool, drop_path: float):
        super().__init__()
        self.window, self.shift = window, window // 2 if shifted else 0
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window_size=window)
        self.drop_path1 = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path2 = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attend(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def attend(self, x: Tensor) -> Tensor:
        (h, w, channels), side = x.shape[1:], self.window
        x = F.pad(x, (0, 0, 0, -w % side, 0, -h % side))
        height, width = x.shape[1:3]
        shift = self.shift if max(height, width) > side else 0
        mask = None
        if shift:
            mask = shift_mask(height, width, side, shift, x.device)
            x = x.roll((-shift, -shift), (1, 2))
        windows = self.attn(window_partition(x, (side, side)).flatten(1, 2), mask=mask)
        x = window_reverse(windows.view(-1, side, side, channels), (side, side), height, width)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return x[:, :h, :w]


# As of models/vit.py's interpolation_matrix: a constant of compiled graphs, and made once otherwise.
@torch.compiler.assume_constant_result
def shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """[windows, window^2, window^2], added to the attention logits of a map rolled back by `shift`: 0, or -100 between patches that
    were not neighbours before."""
    make = _shift_mask.__wrapped__ if torch.compiler.is_exporting() else _shift_mask  # tensors of an export stay with it
    return make(height, width, window, shift, device)


@lru_cache
def _shift_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        # Of the last window of each axis the rolled-in part is another region; the windows before are all of one.
        rows, columns = (torch.arange(n) >= n - shift for n in (height, width))
        region = (2 * rows[:, None] + columns).view(1, height, width, 1)
        region = window_partition(region, (window, window)).flatten(1)
        return torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0).to(device)
