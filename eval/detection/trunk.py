"""ResNets and the feature pyramid with Detectron2's names of weights (methods/transfer.md, 1.1, 1.2).

The networks are those of fastssl/models/resnet.py; fastssl/models/keymaps.py renames a state dict of theirs.  Nothing is frozen:
the stem and every BatchNorm train.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.models.backbones import RESNETS

Norm = type[nn.modules.batchnorm._BatchNorm]


class ConvNorm(nn.Conv2d):
    """Convolution with `norm` behind it, or with a bias where there is none; padded to keep the size at stride 1.  Kaiming normal."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1, norm: Norm | None):
        super().__init__(channels, out, kernel, stride, padding=kernel // 2, bias=norm is None)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        if norm is None:
            nn.init.zeros_(self.bias)
        self.norm = nn.Identity() if norm is None else norm(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class _Block(nn.Module):
    """A residual block: `shortcut` where the shape changes, and convolutions conv1, conv2(, conv3)."""

    expansion: int

    def __init__(self, channels: int, width: int, stride: int, norm: Norm):
        super().__init__()
        out = width * self.expansion
        changes = stride != 1 or channels != out
        self.shortcut = ConvNorm(channels, out, 1, stride=stride, norm=norm) if changes else nn.Identity()


class BasicBlock(_Block):
    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, norm: Norm):
        super().__init__(channels, width, stride, norm)
        self.conv1 = ConvNorm(channels, width, 3, stride=stride, norm=norm)
        self.conv2 = ConvNorm(width, width, 3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class Bottleneck(_Block):
    """The stride is the 3x3 convolution's."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, norm: Norm):
        super().__init__(channels, width, stride, norm)
        self.conv1 = ConvNorm(channels, width, 1, norm=norm)
        self.conv2 = ConvNorm(width, width, 3, stride=stride, norm=norm)
        self.conv3 = ConvNorm(width, width * 4, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv3(F.relu(self.conv2(F.relu(self.conv1(x))))) + self.shortcut(x))


BLOCKS = {"resnet18": BasicBlock, "resnet50": Bottleneck}


def channels_of(arch: str, stage: int) -> int:
    """Of the output of res2, ..., res5."""
    return 64 * 2 ** (stage - 2) * BLOCKS[arch].expansion


def resnet_stage(arch: str, stage: int, norm: Norm) -> nn.Sequential:
    """res2 (stride 1), ..., res5 (stride 2)."""
    block, number = BLOCKS[arch], RESNETS[arch][1][stage - 2]
    channels = 64 if stage == 2 else channels_of(arch, stage - 1)
    width, stride = 64 * 2 ** (stage - 2), 1 if stage == 2 else 2
    rest = [block(channels_of(arch, stage), width, 1, norm) for _ in range(number - 1)]
    return nn.Sequential(block(channels, width, stride, norm), *rest)


class ResNet(nn.Module):
    """images [B, 3, h, w] -> maps of res2, ..., `last`, strides 4, 8, 16, 32."""

    def __init__(self, arch: str, last: int, norm: Norm):
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(conv1=ConvNorm(3, 64, 7, stride=2, norm=norm)))
        self.stages = [f"res{stage}" for stage in range(2, last + 1)]
        for stage in range(2, last + 1):
            self.add_module(f"res{stage}", resnet_stage(arch, stage, norm))

    def forward(self, images: Tensor) -> list[Tensor]:
        x = F.max_pool2d(F.relu(self.stem(images)), 3, stride=2, padding=1)
        maps = []
        for stage in self.stages:
            x = getattr(self, stage)(x)
            maps.append(x)
        return maps


class C4(ResNet):
    """images [B, 3, h, w] -> one map, res4's, stride 16."""

    def __init__(self, arch: str, norm: Norm):
        super().__init__(arch, 4, norm)
        self.out_channels = channels_of(arch, 4)

    def forward(self, images: Tensor) -> list[Tensor]:
        return super().forward(images)[-1:]


class FPN(nn.Module):
    """images [B, 3, h, w], sides multiples of 32 -> maps p2, ..., p6 of 256 channels, strides 4, ..., 64."""

    out_channels = 256

    def __init__(self, arch: str, norm: Norm):
        super().__init__()
        for stage in range(2, 6):
            lateral = ConvNorm(channels_of(arch, stage), self.out_channels, 1, norm=norm)
            output = ConvNorm(self.out_channels, self.out_channels, 3, norm=norm)
            for name, conv in (("lateral", lateral), ("output", output)):
                nn.init.kaiming_uniform_(conv.weight, a=1)
                self.add_module(f"fpn_{name}{stage}", conv)
        self.bottom_up = ResNet(arch, 5, norm)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps, above, pyramid = self.bottom_up(images), None, []
        for stage in (5, 4, 3, 2):
            lateral = getattr(self, f"fpn_lateral{stage}")(maps[stage - 2])
            above = lateral if above is None else lateral + F.interpolate(above, scale_factor=2.0, mode="nearest")
            pyramid.insert(0, getattr(self, f"fpn_output{stage}")(above))
        return [*pyramid, F.max_pool2d(pyramid[-1], 1, stride=2)]
