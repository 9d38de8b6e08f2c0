"""The patch projection of transformers: a convolution whose stride is its kernel, as one matrix product."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PatchProjection(nn.Conv2d):
    """images [B, 3, h, w] -> [B, D, h // p, w // p], channels-last; a rest of the image is not seen.

    nn.Conv2d(3, D, p, p): the same parameters, initialisation and values, up to the order of sums.  cuDNN takes the three channels for
    eight and finds no fast kernel: its forward convolutions of this layer alone were 2.4 % of the kernels' time of a SERE step
    (ViT-S/16, H100), for less than 1 % of its arithmetic.
    """

    def __init__(self, dim: int, patch_size: int):
        super().__init__(3, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        p = self.kernel_size[0]
        rows, columns = x.shape[2] // p, x.shape[3] // p
        pixels = x[:, :, : rows * p, : columns * p].permute(0, 2, 3, 1)
        patches = pixels.unflatten(2, (columns, p)).unflatten(1, (rows, p)).transpose(2, 3).flatten(3)
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)
