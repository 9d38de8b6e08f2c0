"""Names of a backbone's weights in other libraries (methods/transfer.md section 8, methods/ibot.md section 10).

Each function takes one name, torchvision's for ResNets and timm's for ViTs, which are ours, and gives the other library's.  No
function drops anything: leave `fc.*` and `head.*` out beforehand.  Renaming a whole state dict: `renamed(state, detectron2)`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

T = TypeVar("T")
Rules = tuple[tuple[str, "str | Callable[[re.Match], str]"], ...]


def renamed(state: Mapping[str, T], name: Callable[[str], str]) -> dict[str, T]:
    """`state` under other names.  ValueError where two become one."""
    out = {name(key): value for key, value in state.items()}
    if len(out) != len(state):
        raise ValueError("two names become one")
    return out


def _apply(rules: Rules, key: str) -> str:
    """`key` after all rules, in their order."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


# ------------------------------------------------------------------------------------------------ ResNets

_DETECTRON2 = (
    (r"layer(\d)", lambda m: f"res{int(m[1]) + 1}"),
    (r"bn([123])", r"conv\1.norm"),
    (r"downsample\.0", "shortcut"),
    (r"downsample\.1", "shortcut.norm"),
)


def detectron2(key: str) -> str:
    """layer1.0.bn1.weight -> res2.0.conv1.norm.weight, conv1.weight -> stem.conv1.weight: Detectron2's trunk.

    Its checkpointer matches these by their longest suffix, in C4 and FPN detectors alike.
    """
    return _apply(_DETECTRON2, key if "layer" in key else f"stem.{key}")


def detectron2_fpn(key: str) -> str:
    """The name in the state dict of Detectron2's FPN detectors, as W2SSL's conversion writes it.  Heads (fc*) get no `stem.`."""
    return "backbone.bottom_up." + (key if key.startswith("fc") else detectron2(key))


def detectron2_c4(key: str) -> str:
    """The name in the state dict of Detectron2's C4 detectors, where layer4 belongs to the RoI heads."""
    return ("roi_heads." if key.startswith("layer4") else "backbone.") + detectron2(key)


# ------------------------------------------------------------------------------------------------ ViTs

_MMSEG_VIT = (
    (r"^norm\.", "ln1."),
    (r"^patch_embed\.proj\.", "patch_embed.projection."),
    (r"\.norm([12])\.", r".ln\1."),
    (r"\.mlp\.fc1\.", ".ffn.layers.0.0."),
    (r"\.mlp\.fc2\.", ".ffn.layers.1."),
    (r"\.attn\.qkv\.", ".attn.attn.in_proj_"),
    (r"\.attn\.proj\.", ".attn.attn.out_proj."),
    (r"^blocks\.", "layers."),
)
_TORCHVISION_VIT = (
    (r"^cls_token$", "class_token"),
    (r"^pos_embed$", "encoder.pos_embedding"),
    (r"^patch_embed\.proj\.", "conv_proj."),
    (r"^norm\.", "encoder.ln."),
    (r"\.norm([12])\.", r".ln_\1."),
    (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
    (r"\.attn\.proj\.", ".self_attention.out_proj."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.fc2\.", ".mlp.3."),
    (r"^blocks\.", "encoder.layers.encoder_layer_"),
)
_FROM_TORCHVISION_VIT = (
    (r"^class_token$", "cls_token"),
    (r"^encoder\.pos_embedding$", "pos_embed"),
    (r"^conv_proj\.", "patch_embed.proj."),
    (r"^encoder\.ln\.", "norm."),
    (r"^encoder\.layers\.encoder_layer_", "blocks."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.self_attention\.in_proj_", ".attn.qkv."),
    (r"\.self_attention\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),  # linear_1, linear_2: of torchvision 0.12, also its released weights
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
)


def mmseg_vit(key: str) -> str:
    """blocks.0.attn.qkv.weight -> layers.0.attn.attn.in_proj_weight: mmsegmentation's VisionTransformer."""
    return _apply(_MMSEG_VIT, key)


def torchvision_vit(key: str) -> str:
    """blocks.0.attn.qkv.weight -> encoder.layers.encoder_layer_0.self_attention.in_proj_weight: torchvision's VisionTransformer."""
    return _apply(_TORCHVISION_VIT, key)


def from_torchvision_vit(key: str) -> str:
    """timm's name: the inverse of `torchvision_vit`.  Heads keep their names."""
    return _apply(_FROM_TORCHVISION_VIT, key)
