"""Backbones that return maps: ResNets with dilation in place of stride, vision transformers with a pyramid (methods/transfer.md, 5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from eval.classifier import resize_positions, set_drop_path
from fastssl.config import ConfigError
from fastssl.models.features import Backbone

D8 = {"layer3": (1, 2), "layer4": (2, 4)}
"""mmsegmentation's strides (1, 2, 1, 1) and dilations (1, 1, 2, 4): dilation of a stage's first block and of the others."""


def d16(first: int) -> dict[str, tuple[int, int]]:
    """MoCo's: only layer4 is dilated, by 2."""
    return {"layer4": (first, 2)}


def dilate(stage: nn.Sequential, first: int, others: int) -> None:
    """Take the stride out of a ResNet's stage, and dilate its 3x3 convolutions (BasicBlocks: the first of two); weights stay."""
    for i, block in enumerate(stage):
        conv = block.conv2 if isinstance(block, Bottleneck) else block.conv1
        dilation = others if i else first
        conv.stride, conv.dilation, conv.padding = (1, 1), (dilation,) * 2, (dilation,) * 2
        if block.downsample is not None:
            block.downsample[0].stride = (1, 1)


class DilatedResNet(nn.Module):
    """images [B, 3, h, w] -> the maps of layer3 and layer4.  The ResNet is changed."""

    def __init__(self, resnet: Backbone, dilations: Mapping[str, tuple[int, int]]):
        super().__init__()
        self.backbone = resnet
        for stage, (first, others) in dilations.items():
            dilate(getattr(resnet, stage), first, others)
        self.channels = [resnet.stage_channels[name] for name in ("layer3", "layer4")]

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.backbone(x)
        return [features.stages["layer3"], features.map]


class ViTMaps(nn.Module):
    """images [B, 3, h, w] -> patches [B, D, rows, columns] after four blocks spread over the depth (3, 5, 7 and 11 of 12), each after the
    final LayerNorm.

    image_size   pixels; the position table becomes that of such images
    pyramid      the maps at 4, 2, 1 and 1/2 times their size, learned where they grow
    frozen       the ViT is not trained, and computes without gradient
    """

    def __init__(self, vit: Backbone, *, image_size: int, drop_path: float = 0.0, pyramid: bool = True, frozen: bool = False):
        super().__init__()
        depth, dim = len(vit.blocks), vit.num_features
        self.at = [depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1, depth - 1]
        if depth < 6:
            raise ConfigError(f"Maps come from four blocks of a ViT, and this one has {depth}. Give one with at least 6.")
        resize_positions(vit, image_size)
        set_drop_path(vit, drop_path)
        self.backbone, self.frozen = vit.requires_grad_(not frozen), frozen
        self.channels = [dim] * 4
        self.pyramid = nn.ModuleList()
        if pyramid:
            up = [nn.ConvTranspose2d(dim, dim, 2, stride=2) for _ in range(3)]
            fpn1 = nn.Sequential(up[0], nn.BatchNorm2d(dim), nn.GELU(), up[1])
            self.pyramid.extend((fpn1, nn.Sequential(up[2]), nn.Identity(), nn.MaxPool2d(2, 2)))

    def train(self, mode: bool = True) -> ViTMaps:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self._maps(x)
        return [scale(m) for scale, m in zip(self.pyramid, maps, strict=True)] if len(self.pyramid) else maps

    def _maps(self, x: Tensor) -> list[Tensor]:
        vit, maps = self.backbone, []
        grid = [side // vit.patch_size for side in x.shape[2:]]
        x = vit.embed(x)
        for i, block in enumerate(vit.blocks):
            x = block(x)
            if i in self.at:
                maps.append(vit.norm(x)[:, 1:].transpose(1, 2).unflatten(2, grid))
        return maps


class LastPatches(nn.Module):
    """images [B, 3, h, w] -> the last block's patches [B, D, rows, columns] after a new LayerNorm in place of the final one (SERE)."""

    def __init__(self, vit: Backbone, *, image_size: int, drop_path: float = 0.0):
        super().__init__()
        resize_positions(vit, image_size)
        set_drop_path(vit, drop_path)
        vit.norm = nn.Identity()
        self.backbone = vit.requires_grad_(True)
        self.fc_norm = nn.LayerNorm(vit.num_features, eps=1e-6)
        self.channels = [vit.num_features]

    def forward(self, x: Tensor) -> list[Tensor]:
        grid = [side // self.backbone.patch_size for side in x.shape[2:]]
        return [self.fc_norm(self.backbone(x).unnormed).transpose(1, 2).unflatten(2, grid)]
