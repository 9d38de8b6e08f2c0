"""3 x 3 convolutions on a CPU that make maps of 1 x 1 or 2 x 2 pixels, as matrix products.

Such maps end the ResNets of small crops: 32 pixels a side of the input become one.  On an AMD EPYC core (AVX2), torch's
convolution of 64 maps of 512 x 2 x 2 takes 2.5 times as long, forward and backward, as the product, and of 512 x 1 x 1 five times;
at 4 x 4 the two are equal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST = 2
"""Largest side of the output that becomes a product, pixels."""


class SmallMapConv2d(nn.Conv2d):
    """nn.Conv2d, 3 x 3 with padding 1, any stride; the same parameters and values, up to the order of sums.

    Only channels-last maps become products, whose rows are their pixels.
    """

    def forward(self, x: Tensor) -> Tensor:
        height, width = ((side - 1) // stride + 1 for side, stride in zip(x.shape[2:], self.stride, strict=True))
        small = max(height, width) <= MOST and self.dilation == (1, 1)  # segmentation dilates the last stages
        if x.device.type != "cpu" or not small or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
        down, across = self.stride
        rows, columns = _taps(x.shape[2], height, down), _taps(x.shape[3], width, across)
        patches = [
            padded[:, i : i + (height - 1) * down + 1 : down, j : j + (width - 1) * across + 1 : across] for i in rows for j in columns
        ]
        weight = self.weight.permute(0, 2, 3, 1)[:, rows.start : rows.stop, columns.start : columns.stop]
        return F.linear(torch.cat(patches, -1), weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def _taps(side: int, out: int, stride: int) -> range:
    """Rows of the kernel that meet the image and not its padding alone, for some row of the output."""
    met = [i for i in range(3) if any(0 <= o * stride + i - 1 < side for o in range(out))]
    return range(met[0], met[-1] + 1)


def with_small_maps(module: nn.Module) -> nn.Module:
    """`module`, its 3 x 3 convolutions replaced; parameters are kept, not copied, and no random number is drawn."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and child.kernel_size == (3, 3) and child.padding == (1, 1) and child.groups == 1:
            options = {"stride": child.stride, "padding": 1, "bias": child.bias is not None, "device": "meta"}
            conv = SmallMapConv2d(child.in_channels, child.out_channels, 3, **options)
            conv.weight, conv.bias = child.weight, child.bias
            setattr(module, name, conv)
        else:
            with_small_maps(child)
    return module
