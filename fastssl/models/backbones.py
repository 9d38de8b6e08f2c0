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
    "vit_large_patch16": (1024, 24, 16, 16),
}
MOCOV3_VITS = {  # width, blocks, heads, patch size, whether a convolutional stem makes the patches
    "vit_tiny_patch8_mocov3": (192, 12, 12, 8, False),
    "vit_small_patch16_mocov3": (384, 12, 12, 16, False),
    "vit_base_patch16_mocov3": (768, 12, 12, 16, False),
    "vit_conv_small_mocov3": (384, 11, 12, 16, True),
    "vit_conv_base_mocov3": (768, 11, 12, 16, True),
}
SWINS = {  # width of the patch embedding, blocks and heads of each stage, window
    f"swin_{size}_patch4_window{window}": (dim, (2, 2, blocks, 2), tuple(n * 2**i for i in range(4)), window)
    for size, dim, blocks, n in (("tiny", 96, 6, 3), ("small", 96, 18, 3), ("base", 128, 18, 4))
    for window in (7, 14)
}
ARCHITECTURES = (*RESNETS, *VITS, *MOCOV3_VITS, *SWINS)


def build_backbone(
    arch: str, *, image_size: int = 224, drop_path: float = 0.0, layer_scale: float = 0.0, zero_init_residual: bool = False
) -> Backbone:
    """A freshly initialised backbone (torch's global generator) by its torchvision name, or timm's without the image size.

    image_size           pixels; of the position table of ViTs, the smallest windows of Swins; ResNets have none
    drop_path            of transformers
    layer_scale          of ViTs
    zero_init_residual   of ResNets

    ConfigError for an unknown name, or an option of other architectures.
    """
    if layer_scale and arch not in (*VITS, *MOCOV3_VITS):
        raise ConfigError(f"--model.layer-scale {layer_scale} is for ViTs, and {arch} is none. Set it to 0.")
    if zero_init_residual and arch not in RESNETS:
        raise ConfigError(f"--model.zero-init-residual is for ResNets, and {arch} is none. Set it to False.")
    if arch in VITS:
        from fastssl.models.vit import ViT  # timm takes seconds to load, and ResNets need none of it

        return ViT(*VITS[arch], image_size=image_size, drop_path=drop_path, layer_scale=layer_scale)
    if arch in MOCOV3_VITS:
        from fastssl.models.vit_mocov3 import MoCoV3ViT

        *shape, conv_stem = MOCOV3_VITS[arch]
        return MoCoV3ViT(*shape, conv_stem=conv_stem, image_size=image_size, drop_path=drop_path, layer_scale=layer_scale)
    if arch in SWINS:
        from fastssl.models.swin import Swin

        return Swin(*SWINS[arch], image_size=image_size, drop_path=drop_path)
    if arch not in RESNETS:
        raise ConfigError(f"There is no backbone '{arch}'. Choose one of: {', '.join(ARCHITECTURES)}.")
    if drop_path:
        raise ConfigError(f"--model.drop-path {drop_path} is for ViTs, and {arch} is none. Set it to 0.")
    return ResNet(*RESNETS[arch], zero_init_residual=zero_init_residual)
