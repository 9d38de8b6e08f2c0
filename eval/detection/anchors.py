"""Anchor boxes (methods/transfer.md, 1.3): not rounded, of a constant stride, the first one centred on the image's corner."""

from __future__ import annotations

import torch
from torch import Tensor

RATIOS = (0.5, 1.0, 2.0)
"""Height / width."""
SIZES = {"c4": ((32, 64, 128, 256, 512),), "fpn": ((32,), (64,), (128,), (256,), (512,))}
"""Square roots of the areas, for each level of the maps."""
STRIDES = {"c4": (16,), "fpn": (4, 8, 16, 32, 64)}
"""Pixels between neighbours of each level's map."""


def cell_anchors(sizes: tuple[int, ...]) -> Tensor:
    """Around (0, 0): float32 [len(sizes) * 3, 4], all ratios of the first size first."""
    shapes = [(size / ratio**0.5, size * ratio**0.5) for size in sizes for ratio in RATIOS]
    return torch.tensor([(-w / 2, -h / 2, w / 2, h / 2) for w, h in shapes])


def grid_anchors(grid: tuple[int, int], stride: int, cell: Tensor) -> Tensor:
    """Of a map of grid (height, width): [height * width * len(cell), 4] by row, column, anchor; cell (i, j) at (j, i) * stride."""
    y, x = (torch.arange(n, dtype=cell.dtype, device=cell.device) * stride for n in grid)
    y, x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack((x, y, x, y), dim=-1).reshape(-1, 1, 4)
    return (shifts + cell).reshape(-1, 4)
