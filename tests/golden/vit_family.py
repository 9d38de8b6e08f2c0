"""Kinds of the vision transformers' files: position tables of any image size, whole networks forward and backward."""

from __future__ import annotations

import re

import torch

from fastssl.models.vit import ViT, probe_features
from tests.golden.kind import Arrays, Kind

# Official names of parameters -> ours, which are timm's.
NAMES = (
    (r"^block(\d+)\.(qkv|proj)\.", r"blocks.\1.attn.\2."),
    (r"^block(\d+)\.(fc1|fc2)\.", r"blocks.\1.mlp.\2."),
    (r"^block(\d+)\.", r"blocks.\1."),
    (r"^patch_embed\.(weight|bias)$", r"patch_embed.proj.\1"),
)


def vit_name(official: str) -> str:
    for pattern, own in NAMES:
        official = re.sub(pattern, own, official)
    return official


def vit_posembed(arrays: Arrays) -> Arrays:
    table = torch.from_numpy(arrays["pos_embed"])
    vit = ViT(table.shape[-1], 1, 1, int(arrays["patch_size"]), image_size=int(arrays["train_img_size"])).to(table.dtype)
    vit.pos_embed.data.copy_(table)
    return {f"pos_{h}x{w}": vit.positions(int(h), int(w)).detach().numpy() for h, w in arrays["sizes_hw"]}


def vit_forward(arrays: Arrays) -> Arrays:
    shape = (int(arrays[name]) for name in ("embed_dim", "depth", "num_heads", "patch_size"))
    vit = ViT(*shape, image_size=int(arrays["train_img_size"])).to(torch.from_numpy(arrays["param/pos_embed"]).dtype)
    vit.load_state_dict({vit_name(k.removeprefix("param/")): torch.from_numpy(a) for k, a in arrays.items() if k.startswith("param/")})
    out: Arrays = {}
    for size in (k.removeprefix("image_") for k in arrays if k.startswith("image_")):
        images = torch.from_numpy(arrays[f"image_{size}"])
        vit.zero_grad()
        pooled = vit(images).pooled
        out[f"cls_output_{size}"] = pooled.detach().numpy()
        if f"grad_output_{size}" in arrays:
            pooled.backward(torch.from_numpy(arrays[f"grad_output_{size}"]))
            out[f"grad_pos_embed_{size}"] = vit.pos_embed.grad.numpy().copy()
            for i, block in enumerate(vit.blocks):
                out[f"grad_qkv{i}_weight_{size}"] = block.attn.qkv.weight.grad.numpy().copy()
        with torch.no_grad():
            for n in range(1, len(vit.blocks) + 1):
                out[f"last{n}_cls_concat_{size}"] = probe_features(vit.last_blocks(images, n)).numpy()
            interleaved = probe_features(vit.last_blocks(images, 1), average=True)
        out[f"last1_cls_avgpool_interleaved_{size}"] = interleaved.numpy()
    return out


KINDS = {
    "dino/vit_forward": Kind(
        vit_forward, ("embed_dim", "depth", "num_heads", "patch_size", "train_img_size", "param/*", "image_*", "grad_output_*")
    ),
    "dino/vit_posembed": Kind(vit_posembed, ("pos_embed", "patch_size", "train_img_size", "sizes_hw")),
}
