"""Where two crops of one image show the same, and how to sample both there (SERE; methods/sere.md 3 and 4).

Boxes [..., 4] are top, left, height, width in pixels of the source image (Views.boxes); only their ratios matter.  Flips [...] say
that a crop was mirrored left to right after cropping.
"""

from __future__ import annotations

import torch
from torch import Tensor


def overlap_coordinates(boxes: Tensor, flips: Tensor, others: Tensor, size: int) -> Tensor:
    """`size` points a side over the overlap of each box with its other one, as seen in the box: [..., 2, size], y then x.

    -1 and 1 are the borders of the crop, and the outer points lie on the border of the overlap.  Point (i, j) of a crop and of its
    other, asked for the other way round, are the same point of the image.  Without an overlap (touching is none) all are -2.
    """
    (start, extent), (other, other_extent) = (b.unflatten(-1, (2, 2)).unbind(-2) for b in (boxes, others))
    low, high = torch.maximum(start, other), torch.minimum(start + extent, other + other_extent)
    steps = torch.linspace(0, 1, size, dtype=boxes.dtype, device=boxes.device)
    y, x = ((low - start).unsqueeze(-1) + (high - low).unsqueeze(-1) * steps).div(extent.unsqueeze(-1)).unbind(-2)
    points = torch.stack((y, torch.where(flips.unsqueeze(-1), 1 - x, x)), dim=-2)
    return torch.where((low < high).all(-1)[..., None, None], 2 * points - 1, -2.0)


def interpolation_weights(coordinates: Tensor, cells: int) -> Tensor:
    """Linear interpolation between `cells` cell centres, zeros beyond: coordinates [..., S] in [-1, 1] -> weights [..., S, cells].

    A point on the border lies half a cell outside the outermost centre and weighs 0.5, a point at -2 nothing.
    """
    position = ((coordinates + 1) * cells - 1) / 2
    centers = torch.arange(cells, dtype=coordinates.dtype, device=coordinates.device)
    return (1 - (position.unsqueeze(-1) - centers).abs()).clamp_min(0)


def sampling_matrix(coordinates: Tensor, grid: tuple[int, int]) -> Tensor:
    """Bilinear sampling of a token grid of (rows, columns) as a product W F: coordinates [..., 2, S] -> W [..., S^2, rows columns].

    Separable: W is the Kronecker product of the weights along y and x.  As one matrix it takes one batched product; one axis after
    the other would write (rows x S) features in between, more than the S^2 that are asked for.
    """
    y, x = (interpolation_weights(c, n) for c, n in zip(coordinates.unbind(-2), grid, strict=True))
    return torch.einsum("...sh,...tw->...sthw", y, x).flatten(-2).flatten(-3, -2)
