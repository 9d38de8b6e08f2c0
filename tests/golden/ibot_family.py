"""Kinds of the iBOT files about its parts: backbone, head, losses, temperatures."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor, nn

from eval.attention_maps import attention_weights
from fastssl.batch import Views, masked_patches
from fastssl.losses.distillation import patch_weights
from fastssl.methods.ibot import IBOT, Logits
from fastssl.models.features import Backbone, Features
from fastssl.models.heads import IBOTHead
from fastssl.models.vit import ViT, probe_features
from fastssl.optim.schedules import Sched
from tests.golden.kind import Arrays, Kind

# Official names of parameters -> ours.
NAMES = (
    (r"^backbone\.masked_embed$", "masked_embed"),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
    (r"last_layer\.weight_([gv])$", r"last.\1"),
    (r"last_layer2\.weight_([gv])$", r"patch_last.\1"),
)


def ours(official: str) -> str:
    for pattern, own in NAMES:
        official = re.sub(pattern, own, official)
    return official


def tensor(a: np.ndarray, *, grad: bool = False) -> Tensor:
    return torch.from_numpy(np.array(a)).requires_grad_(grad)


def load(module: nn.Module, arrays: Arrays, prefix: str) -> None:
    module.load_state_dict({ours(k.removeprefix(prefix)): tensor(a) for k, a in arrays.items() if k.startswith(prefix)})


def transformed(images: np.ndarray) -> Tensor:
    """The image_transform of all files: uint8 -> (u8 / 255 - 0.5) / 0.25, float64."""
    return (torch.from_numpy(images).double() / 255 - 0.5) / 0.25


# ------------------------------------------------------------------------------------------------ backbone


def ibot_posembed(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for i in range(int(arrays["n_cases"])):
        image_size, patch_size, h, w = arrays[f"case{i}/spec_img_patch_h_w"].tolist()
        table = tensor(arrays[f"case{i}/pos_embed"])
        vit = ViT(table.shape[-1], 1, 1, patch_size, image_size=image_size).to(table.dtype)
        vit.pos_embed.data.copy_(table)
        out[f"case{i}/out"] = vit.positions(h, w).detach().numpy()
    return out


def ibot_vit(arrays: Arrays) -> Arrays:
    side = round((arrays["param/pos_embed"].shape[1] - 1) ** 0.5) * int(arrays["patch_size"])
    shape = (int(arrays[name]) for name in ("embed_dim", "depth", "num_heads", "patch_size"))
    vit = ViT(*shape, image_size=side, layer_scale=float(arrays["init_values"])).double().eval()
    assert vit.norm.eps == arrays["ln_eps"]
    weights = {k: a for k, a in arrays.items() if k != "param/masked_embed"}
    load(vit, weights, "param/")

    def tokens(images: str, *masked: Tensor) -> np.ndarray:
        features = vit(transformed(arrays[images]), *masked)
        return torch.cat((features.pooled.unsqueeze(1), features.tokens), 1).numpy()

    with torch.no_grad():
        mask = tensor(arrays["mask"]).bool()
        x = transformed(arrays["images_u8"])
        blocks = vit.last_blocks(x, min(4, len(vit.blocks)))
        last = blocks[-1]
        # what the last block hands on is normalised to what the method sees
        torch.testing.assert_close(vit.norm(last.unnormed), last.tokens, rtol=1e-12, atol=1e-12)
        attended = vit.embed(x)
        for block in vit.blocks[:-1]:
            attended = block(attended)
        attention = attention_weights(vit.blocks[-1].attn, vit.blocks[-1].norm1(attended), 1)
        return {
            "tokens_masked": tokens("images_u8", mask, tensor(arrays["param/masked_embed"])),
            "tokens": tokens("images_u8"),
            "tokens_local": tokens("images_local_u8"),
            "tokens_rect": tokens("images_rect_u8"),
            "cls_only": vit(x).pooled.numpy(),
            "intermediate_normed": np.stack([torch.cat((f.pooled.unsqueeze(1), f.tokens), 1).numpy() for f in blocks]),
            "feat_avgpool0": probe_features(blocks).numpy(),
            "feat_avgpool1": last.tokens.mean(1).numpy(),
            "feat_avgpool2_n1": torch.cat((last.pooled, last.tokens.mean(1)), -1).numpy(),
            "last_selfattention_cls_row": attention[:, :, 0].numpy(),
        }


# ------------------------------------------------------------------------------------------------ head


def head_options(arrays: Arrays, prefix: str) -> dict:
    """Of `IBOTHead`, and by the same names of the method's Config, from the shapes of the weights."""
    linears = sorted(int(m[1]) for k in arrays if (m := re.fullmatch(rf"{re.escape(prefix)}mlp\.(\d+)\.weight", k)))
    first, last = (arrays[f"{prefix}mlp.{i}.weight"] for i in (linears[0], linears[-1]))
    return {"layers": len(linears), "hidden": len(first), "bottleneck": len(last)}


def ibot_head(arrays: Arrays) -> Arrays:
    assert str(arrays["act"]) == "gelu"
    own = None if arrays["shared_head"] else len(arrays["param/last_layer2.weight_v"])
    options = head_options(arrays, "param/")
    assert options["layers"] == arrays["n_layers"]
    x = tensor(arrays["tokens"], grad=True)
    out_features = len(arrays["param/last_layer.weight_v"])
    head = IBOTHead(x.shape[-1], out_features, patch_out_features=own, norm_last_layer=False, **options).to(x.dtype)
    load(head, arrays, "param/")
    units = head.bottleneck(x)
    cls, patches = head.logits(units[:, 0], units[:, 1:].flatten(0, 1))
    patches = patches.unflatten(0, (len(x), -1))
    ((cls * tensor(arrays["cot_cls"])).sum() + (patches * tensor(arrays["cot_patch"])).sum()).backward()
    named = dict(head.named_parameters())
    with torch.no_grad():
        alone, _ = head.logits(head.bottleneck(x[:, 0]), units[:0, 0])
        return {
            "cls_logits": cls.numpy(),
            "patch_logits": patches.numpy(),
            "cls_logits_from_2d_input": alone.numpy(),
            "patch_logits_mean_over_tokens": head.patch_logits(units[:, 1:].mean(1)).numpy(),
            "grad_tokens": x.grad.numpy(),
            **{k: named[ours(k.removeprefix("grad/"))].grad.numpy() for k in arrays if k.startswith("grad/")},
        }


# ------------------------------------------------------------------------------------------------ losses


class Unused(Backbone):
    """Stands for the network where a file gives logits."""

    num_features = embed_dim = mask_stride = 1

    def forward(self, x: Tensor, mask: Tensor | None = None, masked_embed: Tensor | None = None) -> Features:
        raise AssertionError("no images here")


def masked_views(masks: np.ndarray) -> Views:
    """Masks [G, B, h, w] as the loader hands them out, without images."""
    masks = masks.swapaxes(0, 1).astype(bool)
    none = torch.empty(0)
    return Views((), none, none, none, none, masks=torch.from_numpy(masks), masked=torch.from_numpy(masked_patches(masks)))


def at_epoch(epoch: int) -> Sched:
    return Sched(epoch=epoch, lr=0.0, weight_decay=0.0, ema_momentum=1.0)


def temperatures(method: IBOT, epochs: int) -> Arrays:
    found: dict[str, list[float]] = {"teacher_temp": [], "teacher_temp_patch": []}
    for epoch in range(epochs):
        method.before_step(at_epoch(epoch))
        found["teacher_temp"].append(method.teacher_temp.item())
        found["teacher_temp_patch"].append(method.teacher_patch_temp.item())
    return {name: np.array(values) for name, values in found.items()}


def ibot_loss(arrays: Arrays) -> Arrays:
    warmup, final, patch_warmup, patch_final, warmup_epochs, epochs, start = arrays["sched_args"].tolist()
    cfg = IBOT.Config(
        out_dim=arrays["student_cls"].shape[-1],
        patch_out_dim=arrays["student_patch"].shape[-1],
        shared_head=False,
        hidden=1,
        bottleneck=1,
        student_temp=float(arrays["student_temp"]),
        warmup_teacher_temp=warmup,
        teacher_temp=final,
        warmup_teacher_patch_temp=patch_warmup,
        teacher_patch_temp=patch_final,
        warmup_teacher_temp_epochs=int(warmup_epochs),
        pred_start_epoch=int(start),
        center_momentum=float(arrays["center_momentum"]),
        patch_center_momentum=float(arrays["center_momentum_patch"]),
        cls_weight=float(arrays["lambda1"]),
        patch_weight=float(arrays["lambda2"]),
    )
    method = IBOT(cfg, Unused, "local").double()
    method.centers["cls"].copy_(tensor(arrays["center_cls_in"]))
    method.centers["patch"].copy_(tensor(arrays["center_patch_in"][0]))
    schedules = temperatures(method, int(epochs))
    method.before_step(at_epoch(int(arrays["epoch"])))
    for found, given in ((method.teacher_temp, "teacher_temp"), (method.teacher_patch_temp, "teacher_temp_patch")):
        np.testing.assert_allclose(found.item(), arrays[given], rtol=1e-12)

    views = masked_views(arrays["masks"])
    masks = method.masks(views).flatten(1)
    rows, weights = views.masked.clamp(min=0), patch_weights(masks, views.masked)
    names = ("student_cls", "student_patch", "student_local_cls")
    student = {name: tensor(arrays[name], grad=True) for name in names if name in arrays}
    crops = torch.cat([t for name, t in student.items() if name != "student_patch"])
    teacher_patch = tensor(arrays["teacher_patch"])
    step = method.losses(
        Logits(crops, student["student_patch"].flatten(0, 1)[rows]),
        Logits(tensor(arrays["teacher_cls"]), teacher_patch.flatten(0, 1)[rows]),
        teacher_patch.mean(1),
        weights,
    )
    step.loss.backward()
    method.after_step(at_epoch(0))
    return {
        "loss": step.loss.detach().numpy(),
        "loss_cls": step.logs["loss_cls"].numpy(),
        "loss_patch": step.logs["loss_patch"].numpy(),
        "center_cls_out": method.centers["cls"].numpy(),
        "center_patch_out": method.centers["patch"].numpy()[None],
        **{f"grad_{name}": t.grad.numpy() for name, t in student.items()},
        **{f"{name}_schedule": values for name, values in schedules.items()},
    }


KINDS = {
    "ibot/head": Kind(ibot_head, ("tokens", "cot_cls", "cot_patch", "shared_head", "act", "n_layers", "param/*")),
    "ibot/loss": Kind(
        ibot_loss,
        (
            *("n_global", "n_local", "student_temp", "teacher_temp", "teacher_temp_patch", "lambda1", "lambda2", "epoch", "sched_args"),
            *("center_momentum", "center_momentum_patch", "center_*_in", "student_cls", "student_patch", "student_local_cls"),
            *("teacher_cls", "teacher_patch", "masks"),
        ),
    ),
    "ibot/posembed": Kind(ibot_posembed, ("n_cases", "case*/spec_*", "case*/pos_embed")),
    "ibot/vit": Kind(
        ibot_vit,
        ("images_*", "image_transform", "mask", "patch_size", "num_heads", "depth", "embed_dim", "ln_eps", "init_values", "param/*"),
    ),
}
