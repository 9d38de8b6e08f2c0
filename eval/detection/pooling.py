"""RoIAlign on one map or on a pyramid (methods/transfer.md, 1.6): aligned, with as many samples as a region's bins have pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import roi_align


def pyramid_levels(boxes: Tensor) -> Tensor:
    """Of boxes [n, 4] the map that they are read from, int64 [n]: 0 (stride 4) to 3 (stride 32); 224 pixels a side are the third's."""
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    return torch.floor(4 + torch.log2(sides / 224 + 1e-8)).clamp(2, 5).long() - 2


def pool(maps: list[Tensor], strides: tuple[int, ...], boxes: list[Tensor], side: int) -> Tensor:
    """maps [B, C, h, w] of each stride, boxes [n, 4] of each image in its pixels -> [sum n, C, side, side] in the boxes' order."""
    maps = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in maps]  # 16 bits are too few for coordinates
    image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
    rois = torch.cat((image, torch.cat(boxes)), dim=1).to(maps[0].dtype)
    if len(maps) == 1:
        return roi_align(maps[0], rois, side, 1 / strides[0], 0, aligned=True)
    level = pyramid_levels(torch.cat(boxes))
    rows = [(level == i).nonzero()[:, 0] for i in range(len(maps))]
    pooled = [roi_align(x, rois[r], side, 1 / s, 0, aligned=True) for x, s, r in zip(maps, strides, rows, strict=True)]
    return torch.cat(pooled)[torch.cat(rows).argsort()]
