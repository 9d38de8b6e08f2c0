"""What turns feature maps into logits (methods/transfer.md 5.2 and 5.6), by mmsegmentation's names.

Convolutions start Kaiming-normal (fan out), classifiers from N(0, 0.01) with biases 0.  Every head takes the trunk's list of maps
[B, C_i, h_i, w_i] and returns logits [B, classes, h, w] at a map's size.  BatchNorms are synchronised by whoever trains.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POOL_SCALES = (1, 2, 3, 6)


def conv_bn_relu(inputs: int, outputs: int, kernel: int, dilation: int = 1) -> nn.Sequential:
    """Same size out as in."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs), activate=nn.ReLU(inplace=True)))


def classifier(inputs: int, classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)
    return conv


def resized(x: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Bilinear."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


class FCN(nn.Module):
    """Fully convolutional head (Long et al., CVPR 2015) on map number `at`: convolutions 3x3, with `concat` another one that sees
    the map beside their output, the classifier."""

    def __init__(
        self,
        inputs: int,
        channels: int,
        classes: int,
        *,
        at: int = -1,
        convs: int = 2,
        dilation: int = 1,
        concat: bool = True,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.at = at
        self.convs = nn.Sequential(*(conv_bn_relu(channels if i else inputs, channels, 3, dilation) for i in range(convs)))
        self.conv_cat = conv_bn_relu(inputs + channels, channels, 3) if concat else None
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[self.at]
        y = self.convs(x)
        if self.conv_cat is not None:
            y = self.conv_cat(torch.cat((x, y), dim=1))
        return self.conv_seg(self.dropout(y))


class UperNet(nn.Module):
    """Pyramid pooling on the last of four maps and a top-down path through the others (Xiao et al., ECCV 2018).

    Logits are of the first one's size.
    """

    def __init__(self, inputs: Sequence[int], channels: int, classes: int, *, dropout: float = 0.1):
        super().__init__()
        *lower, last = inputs
        self.psp_modules = nn.ModuleList(nn.Sequential(nn.AdaptiveAvgPool2d(s), conv_bn_relu(last, channels, 1)) for s in POOL_SCALES)
        self.bottleneck = conv_bn_relu(last + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(conv_bn_relu(c, channels, 1) for c in lower)
        self.fpn_convs = nn.ModuleList(conv_bn_relu(channels, channels, 3) for _ in lower)
        self.fpn_bottleneck = conv_bn_relu(len(inputs) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = classifier(channels, classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *lower, last = maps
        pooled = [resized(module(last), last.shape[2:]) for module in self.psp_modules]
        top = self.bottleneck(torch.cat((last, *pooled), dim=1))
        path = [top]
        for lateral, x in zip(reversed(self.lateral_convs), reversed(lower), strict=True):
            path.insert(0, lateral(x) + resized(path[0], x.shape[2:]))
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, path[:-1], strict=True)] + [top]
        joined = torch.cat([resized(x, outputs[0].shape[2:]) for x in outputs], dim=1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(joined)))


class Linear(nn.Module):
    """A 1x1 convolution on maps of equal size, side by side."""

    def __init__(self, inputs: int, classes: int):
        super().__init__()
        self.conv_seg = classifier(inputs, classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return self.conv_seg(torch.cat(tuple(maps), dim=1))
