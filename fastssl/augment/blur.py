"""Pillow's GaussianBlur: three extended box filters per axis, each with replicated edges.

An extended box of radius l + a has 2l + 1 full taps and one of weight a at each end.  l and a are such that three passes
have the variance asked for.  Because every pass replicates the edges anew, the three passes are not one convolution near
the border; they are one matrix per axis.  So a sample's blur is M_h x M_w^T with M = E^3 [size, size]: exact at the edges, any
sigma, static shapes, two batched products.
"""

from __future__ import annotations

import torch
from torch import Tensor

PASSES = 3


def box_radius(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """sigma [N], pixels -> whole radius l and fractional weight a of the box, both [N].

    The variance of the box, (l(l+1)(2l+1)/3 + 2a(l+1)^2) / (2l+1+2a), is sigma^2 / PASSES; l is the largest that leaves a >= 0.
    """
    variance = sigma.square() / PASSES
    whole = ((torch.sqrt(12 * variance + 1) - 1) / 2).floor()
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1).square()))
    return whole, edge


def box_matrix(sigma: Tensor, size: int) -> Tensor:
    """[N] -> [N, size, size], row y = the weights of the input lines in output line y after one of the passes."""
    whole, edge = (t[:, None, None] for t in box_radius(sigma.double()))
    line = torch.arange(size, device=sigma.device, dtype=torch.float64)
    # cumulative weight of the box up to a distance: what lies beyond the first and last line falls onto them
    step = line[None, None, :] - line[None, :, None]

    def up_to(d: Tensor) -> Tensor:
        full = (d + whole + 1).clamp(min=0).minimum(2 * whole + 1)
        return (full + edge * (d >= -whole - 1) + edge * (d >= whole + 1)) / (2 * whole + 1 + 2 * edge)

    last = line[None, None, :] == size - 1
    first = line[None, None, :] == 0
    upper = torch.where(last, 1.0, up_to(step))
    lower = torch.where(first, 0.0, up_to(step - 1))
    return (upper - lower).float()


def blur_matrix(sigma: Tensor, size: int) -> Tensor:
    """[N] -> [N, size, size]: all passes along one axis; the identity where sigma is 0."""
    box = box_matrix(sigma, size)
    return box @ box @ box


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """x [N, 3, h, w] float, sigma float32 [N] pixels -> blurred; samples with sigma 0 come back unchanged."""
    height, width = x.shape[-2:]
    across = blur_matrix(sigma, width)[:, None]
    down = across if height == width else blur_matrix(sigma, height)[:, None]
    return torch.where((sigma > 0).view(-1, 1, 1, 1), down @ x @ across.mT, x)
