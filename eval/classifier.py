"""A backbone with a new linear layer, both to be trained, by the names of torchvision and timm.  B images, D features, C classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.tuning_protocols import TuningProtocol
from fastssl.config import ConfigError
from fastssl.models.features import Backbone
from fastssl.optim.param_groups import split_by_layer


class Classifier(nn.Module):
    """images [B, 3, h, w] -> logits [B, C].  The backbone is changed as the protocol says; ConfigError where it cannot be.

    Weights are drawn from torch's global generator.
    """

    def __init__(self, backbone: Backbone, num_classes: int, protocol: TuningProtocol):
        super().__init__()
        self.vit = hasattr(backbone, "blocks")
        if protocol.vit_only and not self.vit:
            raise ConfigError(
                f"{protocol.name} is of ViTs, and this backbone is a {type(backbone).__name__}. Fine-tune it with semi/lewel-10pct or "
                f"semi/sfrik-10pct and the images of --subset."
            )
        if self.vit:
            resize_positions(backbone, protocol.crop)
            set_drop_path(backbone, protocol.drop_path)
        self.backbone = backbone.requires_grad_(True)
        self.mean_patches = protocol.pooling == "mean_patches"
        if self.mean_patches:
            backbone.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(backbone.num_features, eps=1e-6)
        self.layer = "head" if self.vit else "fc"
        linear = nn.Linear(backbone.num_features, num_classes)
        if protocol.head_std is not None:
            nn.init.normal_(linear.weight, std=protocol.head_std)
            nn.init.zeros_(linear.bias)
        self.add_module(self.layer, linear)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        pooled = self.fc_norm(features.unnormed.mean(1)) if self.mean_patches else features.pooled
        return self.get_submodule(self.layer)(pooled)

    def named(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters by their names in torchvision or timm."""
        return ((name.removeprefix("backbone."), p) for name, p in self.named_parameters())

    def weights(self) -> dict[str, Tensor]:
        """The state dict of the same model in torchvision or timm (where `fc_norm` is of global_pool="avg")."""
        return {name.removeprefix("backbone."): t for name, t in self.state_dict().items()}

    def optimizer(self, protocol: TuningProtocol) -> torch.optim.Optimizer:
        """The protocol's, over groups with an `lr_scale`: what each group's learning rate is of the schedule's."""
        if protocol.optimizer == "adamw":
            depth = len(self.backbone.blocks)
            groups = split_by_layer(self.named(), depth=depth, layer_decay=protocol.layer_decay, weight_decay=protocol.weight_decay)
            return torch.optim.AdamW(groups, lr=protocol.base_lr, betas=(0.9, 0.999), fused=True)
        new = list(self.get_submodule(self.layer).parameters())
        groups = [
            {"params": list(self.backbone.parameters()), "lr_scale": 1.0},
            {"params": new, "lr_scale": (protocol.head_lr or protocol.base_lr) / protocol.base_lr},
        ]
        return torch.optim.SGD(groups, lr=protocol.base_lr, momentum=0.9, weight_decay=protocol.weight_decay, fused=True)


def resize_positions(vit: Backbone, image_size: int) -> None:
    """Make the position table that of images of `image_size` pixels: bicubic, by size (methods/sere.md 9)."""
    grid = image_size // vit.patch_size
    if grid == vit.grid:
        return
    if grid < 1:
        raise ConfigError(f"Crops of {image_size} pixels are smaller than a patch ({vit.patch_size} pixels): raise --crop.")
    cls, patches = vit.pos_embed.detach().split((1, vit.grid**2), dim=1)
    table = patches.unflatten(1, (vit.grid, vit.grid)).permute(0, 3, 1, 2)
    resized = F.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False)
    vit.pos_embed = nn.Parameter(torch.cat((cls, resized.flatten(2).transpose(1, 2)), dim=1))
    vit.grid = grid


def set_drop_path(vit: Backbone, rate: float) -> None:
    """`rate` for the last block, growing linearly from 0."""
    from timm.layers import DropPath  # timm takes seconds to load, and ResNets need none of it

    last = max(len(vit.blocks) - 1, 1)
    for i, block in enumerate(vit.blocks):
        block.drop_path1, block.drop_path2 = (DropPath(rate * i / last) if rate * i else nn.Identity() for _ in range(2))
