"""Trunk and heads as the protocols put them together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from eval.segmentation.heads import FCN, Linear, UperNet, resized
from eval.segmentation.protocols import SegmentationProtocol
from eval.segmentation.trunks import D8, DilatedResNet, LastPatches, ViTMaps, d16
from fastssl.config import ConfigError
from fastssl.models.features import Backbone
from fastssl.models.norm import apply_norm_policy


class Segmenter(nn.Module):
    """images [B, 3, H, W] -> logits [B, classes, h, w] of the head, and in training of the auxiliary head where there is one."""

    def __init__(self, trunk: nn.Module, head: nn.Module, auxiliary: nn.Module | None = None, *, align_corners: bool = False):
        super().__init__()
        self.trunk, self.head, self.auxiliary, self.align_corners = trunk, head, auxiliary, align_corners

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = self.trunk(x)
        heads = (self.head, self.auxiliary) if self.training and self.auxiliary is not None else (self.head,)
        return tuple(head(maps) for head in heads)

    def upsampled(self, x: Tensor) -> Tensor:
        """float32 logits [B, classes, H, W] of the head."""
        (logits, *_) = self(x)
        return resized(logits.float(), x.shape[2:], self.align_corners)

    def trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is learned, the backbone's parameters by their names in torchvision or timm."""
        return ((name.removeprefix("trunk.backbone."), p) for name, p in self.named_parameters() if p.requires_grad)


def build(backbone: Backbone, protocol: SegmentationProtocol, classes: int, *, seed: int = 0) -> Segmenter:
    """A new segmenter around `backbone`, which is changed.  ConfigError where the protocol is of other backbones."""
    vit = hasattr(backbone, "blocks")
    if vit == protocol.head.startswith("fcn") or not (vit or getattr(backbone, "stage_channels", None)):
        needed = "ResNets" if protocol.head.startswith("fcn") else "ViTs"
        raise ConfigError(f"{protocol.name} is of {needed}, and this backbone is a {type(backbone).__name__}. Choose another --protocol.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return apply_norm_policy(_built(backbone.requires_grad_(True), protocol, classes), "sync")


def _built(backbone: Backbone, protocol: SegmentationProtocol, classes: int) -> Segmenter:
    options = {"image_size": protocol.crop, "drop_path": protocol.drop_path}
    match protocol.head:
        case "fcn":
            trunk = DilatedResNet(backbone, D8)
            auxiliary = FCN(trunk.channels[0], 256, classes, at=0, convs=1, concat=False)
            return Segmenter(trunk, FCN(trunk.channels[1], 512, classes), auxiliary)
        case "fcn-moco":
            trunk = DilatedResNet(backbone, d16(protocol.first_dilation))
            return Segmenter(trunk, FCN(trunk.channels[1], 256, classes, dilation=6, concat=False, dropout=0.0), align_corners=True)
        case "upernet":
            trunk = ViTMaps(backbone, **options)
            auxiliary = FCN(trunk.channels[2], 256, classes, at=2, convs=1, concat=False)
            return Segmenter(trunk, UperNet(trunk.channels, backbone.num_features, classes), auxiliary)
        case "linear":
            trunk = ViTMaps(backbone, **options, pyramid=False, frozen=True)
            return Segmenter(trunk, Linear(sum(trunk.channels), classes))
        case "patches":
            trunk = LastPatches(backbone, **options)
            head = Linear(backbone.num_features, classes)
            head.conv_seg.reset_parameters()  # the bias keeps PyTorch's default
            nn.init.trunc_normal_(head.conv_seg.weight, std=2e-5)
            return Segmenter(trunk, head)
