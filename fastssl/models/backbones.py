"""Every backbone by its name: the one place that builds them."""

from __future__ import annotations

from torchvision.models.resnet import BasicBlock, Bottleneck

from fastssl.config import ConfigError
from fastssl.models.features import Backbone
from fastssl.models.resnet import ResNet

RESNETS = {"resnet18": (BasicBlock, (2, 2, 2, 2)), "resnet50": (Bottleneck, (3, 4, 6, 3))}
VITS = {  # width, blocks, heads, patch size
    "vit_tiny_patch16": (192, 12, 3, 16),
    "vit_tiny_patch8": (192, 12, 3, 8),
    "vit_small_patch16": (384, 12, 6, 16),
    "vit_small_patch8": (384, 12, 6, 8),
    "vit_base_patch16": (768, 12, 12, 16),
    "vit_base_patch8": (768, 12, 12, 8),
}
ARCHITECTURES = (*RESNETS, *VITS)


def build_backbone(arch: str, *, image_size: int = 224, drop_path: float = 0.0) -> Backbone:
    """A freshly initialised backbone (torch's global generator) by its torchvision name, or timm's without the image size.

    image_size   pixels; of the position table of ViTs, ResNets have none
    drop_path    of ViTs

    ConfigError for an unknown name, or drop path for a ResNet.
    """
    if arch in VITS:
        from fastssl.models.vit import ViT  # timm takes seconds to load, and ResNets need none of it

        return ViT(*VITS[arch], image_size=image_size, drop_path=drop_path)
    if arch not in RESNETS:
        raise ConfigError(f"There is no backbone '{arch}'. Choose one of: {', '.join(ARCHITECTURES)}.")
    if drop_path:
        raise ConfigError(f"--model.drop-path {drop_path} is for ViTs, and {arch} is none. Set it to 0.")
    return ResNet(*RESNETS[arch])
