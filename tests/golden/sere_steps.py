"""SERE's whole training steps through the engine, with gradient accumulation."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import torch

from fastssl.batch import Views, masked_patches
from fastssl.config import AdamW, EfficiencyConfig, ModelConfig, RunConfig, TrainConfig
from fastssl.engine import prepare, train_step
from fastssl.method import StepOutput
from fastssl.methods.sere import SERE
from fastssl.models.vit import ViT
from fastssl.optim.schedules import Schedules
from tests.golden.dino_family import ALONE, grouped
from tests.golden.ibot_family import ours as ibot_name
from tests.golden.kind import Arrays
from tests.golden.sere_family import Fp32Grids, boxes_and_flips, dump_statistics, head_name, load_heads, tensor


def modules_of(arrays: Arrays, prefix: str) -> dict[str, dict[str, str]]:
    """Official prefixes of the relation modules: crop -> head -> prefix."""
    found = {"global": "_sere.", "local": "_sere_local."}
    names = {crop: {head: f"{prefix}backbone.{head}{suffix}" for head in ("channel", "pixel")} for crop, suffix in found.items()}
    return {crop: heads for crop, heads in names.items() if any(k.startswith(heads["pixel"]) for k in arrays)}


def sere_name(official: str, net: str = "student") -> str:
    """Official name of a parameter -> ours in the method."""
    relation_head = re.match(r"backbone\.(channel|pixel)_sere(_local)?\.(.*)", official)
    if relation_head is None:
        own = ibot_name(official)
        return own if own == "masked_embed" else f"{net}.{own}"
    head, local, rest = relation_head.groups()
    return f"{net}_relations.{'local' if local else 'global'}.{head}.{head_name(rest)}"


def sere_method(arrays: Arrays) -> SERE:
    size, patch = arrays["iter0/images_global_u8"].shape[-1], int(arrays["patch_size"])
    cls, patches = arrays["teacher_temp_per_epoch"], arrays["teacher_temp_patch_per_epoch"]
    # Both reach their final values in the last epoch of one warm-up.
    epochs = 1 + max(int(np.argmax(t == t[-1])) for t in (cls, patches))
    cfg = SERE.Config(
        **{name: int(arrays[name]) for name in ("out_dim", "freeze_last_layer")},
        **{name: float(arrays[name]) for name in ("alpha", "beta", "temperature_pixel", "temperature_channel")},
        **{name: bool(arrays[name]) for name in ("shared_head", "norm_last_layer")},
        patch_out_dim=int(arrays.get("patch_out_dim", arrays["out_dim"])),
        hidden=int(arrays["head_hidden"]),
        bottleneck=int(arrays["head_bottleneck"]),
        head_layers=sum(bool(re.fullmatch(r"student_init/head\.mlp\.\d+\.weight", k)) for k in arrays),
        overlap_size=tuple(arrays["overlap_size"].tolist()),
        relation_divisors=tuple(int(arrays[f"channel_divisor_{crop}"]) for crop in ("global", "local")),
        local_relations=int(arrays["n_local"]) > 0,
        warmup_teacher_temp=float(cls[0]),
        teacher_temp=float(cls[-1]),
        warmup_teacher_patch_temp=float(patches[0]),
        teacher_patch_temp=float(patches[-1]),
        warmup_teacher_temp_epochs=epochs,
    )
    shape = (int(arrays[name]) for name in ("embed_dim", "depth", "num_heads"))
    return SERE(cfg, lambda: ViT(*shape, patch, image_size=size), "sync").double()


def load_step_state(method: SERE, arrays: Arrays, statistics: str) -> None:
    own = dict(method.named_parameters())
    for net in ("student", "teacher"):
        prefix = f"{net}_init/"
        if not any(k.startswith(prefix) for k in arrays):
            prefix = "student_init/"
        for k, a in arrays.items():
            official = k.removeprefix(prefix)
            if k.startswith(prefix) and "running" not in official and (net, official) != ("teacher", "backbone.masked_embed"):
                parameter = own[sere_name(official, net)]
                parameter.data.copy_(tensor(a).reshape(parameter.shape))
        for crop, heads in modules_of(arrays, prefix).items():
            load_heads(method.get_submodule(f"{net}_relations.{crop}"), arrays, heads, statistics)


def step_views(arrays: Arrays, it: str) -> Views:
    kinds = ("global", "local") if f"{it}images_local_u8" in arrays else ("global",)
    crops = [(x / 255 - 0.5) / 0.25 for kind in kinds for x in arrays[f"{it}images_{kind}_u8"].astype(np.float64)]
    views = grouped(crops)
    views.boxes, views.flips = boxes_and_flips(np.concatenate([arrays[f"{it}boxes_{kind}_xywh_flip"] for kind in kinds], axis=1))
    masks = arrays[f"{it}masks"].astype(bool).swapaxes(0, 1)
    return replace(views, masks=torch.from_numpy(masks), masked=torch.from_numpy(masked_patches(masks)))


def dump_step_state(method: SERE, arrays: Arrays, prefix: str, net: str, statistics: str) -> Arrays:
    """The network's parameters, and running statistics of the heads called `statistics`, as the file has them."""
    own, out = dict(method.named_parameters()), {}
    for crop, heads in modules_of(arrays, prefix).items():
        out |= dump_statistics(method.get_submodule(f"{net}_relations.{crop}"), statistics, heads[statistics])
    for k, a in arrays.items():
        if k.startswith(prefix) and "running" not in k:
            out[k] = own[sere_name(k.removeprefix(prefix), net)].detach().numpy().reshape(a.shape).copy()
    return {k: v for k, v in out.items() if k in arrays}


def sere_step(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for statistics in ("channel", "pixel"):  # the file's modules start from other statistics, ours share them: once for each
        out |= sere_steps(arrays, statistics)
    return out


def sere_steps(arrays: Arrays, statistics: str) -> Arrays:
    """The engine's own steps, of as many micro-batches as the file says; one epoch a step."""
    steps, accumulation = int(arrays["n_steps"]), int(arrays["accum_iter"])
    method = sere_method(arrays)
    load_step_state(method, arrays, statistics)
    lr, wd, momentum = (arrays[f"{name}_per_iter"].reshape(steps, accumulation) for name in ("lr", "wd", "momentum"))
    *betas, eps = arrays.get("adam_betas_eps", np.array([0.9, 0.999, 1e-8])).tolist()
    cfg = RunConfig(
        preset="golden",
        method=method.cfg,
        model=ModelConfig(norm="sync"),
        views=(),
        optim=AdamW(base_lr=1.0, betas=betas, eps=eps, clip_grad=float(arrays["clip_grad"]), not_decayed="norm_weights", warmup_epochs=0),
        train=TrainConfig(epochs=steps, global_batch_size=int(arrays["batch"]) * accumulation, accumulation_steps=accumulation),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
    )
    state = prepare(method, cfg, ALONE, 1)
    state.schedules = Schedules(lambda s: s, lambda s: float(lr[s, 0]), lambda s: float(wd[s, 0]), lambda s: float(momentum[s, -1]))
    official = {sere_name(k): k for k in (n.removeprefix("student_init/") for n in arrays if n.startswith("student_init/"))}
    trainable = {official[name]: p for name, p in method.named_parameters() if p.requires_grad}
    decayed = {id(p) for group in state.optimizer.param_groups if not group["excluded"] for p in group["params"]}
    listed = {
        "param_names_decay": [name for name, p in trainable.items() if id(p) in decayed],
        "param_names_nodecay": [name for name, p in trainable.items() if id(p) not in decayed],
        "param_names_frozen": [name for name in official.values() if name not in trainable and "running" not in name],
    }
    out: Arrays = {key: in_order_of(arrays[key], names) for key, names in listed.items() if key in arrays}
    losses: list[dict[str, float]] = []

    def before_clip(*_) -> None:
        prefix = f"step{state.step}/"
        grads = {name: p.grad for name, p in trainable.items() if p.grad is not None}
        if f"{prefix}grad_names" in arrays:
            order = out[f"{prefix}grad_names"] = in_order_of(arrays[f"{prefix}grad_names"], list(grads))
            out[f"{prefix}grad_norms_before_clip"] = np.array([grads[name].norm().item() for name in order])
        clipped = f"{prefix}grad_before_clip/"
        out.update({k: grads[k.removeprefix(clipped)].numpy().reshape(a.shape).copy() for k, a in arrays.items() if k.startswith(clipped)})

    def before_optimizer(*_) -> None:
        key = f"step{state.step}/grad_none_names"
        if key in arrays:
            out[key] = in_order_of(arrays[key], [name for name, p in trainable.items() if p.grad is None])

    def after_forward(_, __, step: StepOutput) -> None:
        losses.append({"total": step.loss.item()} | {k.removeprefix("loss_"): v.item() for k, v in step.logs.items()})

    state.metrics.add_skipped = before_clip  # between the last backward pass and clipping
    state.optimizer.register_step_pre_hook(before_optimizer)
    method.register_forward_hook(after_forward)
    for step in range(steps):
        train_step(state, [step_views(arrays, f"iter{step * accumulation + k}/") for k in range(accumulation)])
        temperatures = (method.teacher_temp.item(), method.teacher_patch_temp.item())
        expected = (arrays["teacher_temp_per_epoch"][step], arrays["teacher_temp_patch_per_epoch"][step])
        np.testing.assert_allclose(temperatures, expected, rtol=1e-12)
        for net in ("student", "teacher"):
            out |= dump_step_state(method, arrays, f"step{step}/{net}/", net, statistics)
        for name, key in (("cls", "center_cls"), ("patch", "center_patch")):
            if f"step{step}/{key}" in arrays:
                out[f"step{step}/{key}"] = method.centers[name].numpy().reshape(arrays[f"step{step}/{key}"].shape).copy()
    for i, loss in enumerate(losses):
        loss["ibot"] = loss["cls"] + loss["patch"]
        out |= {f"iter{i}/loss_{name}": np.array(loss[name]) for name in ("cls", "patch", "ibot", "pixel", "channel", "total")}
    return out


def in_order_of(listed: np.ndarray, names: list[str]) -> np.ndarray:
    """Names in the order the file lists them, others behind."""
    position = {name: i for i, name in enumerate(listed.tolist())}
    return np.array(sorted(names, key=lambda name: position.get(name, len(position))), dtype=listed.dtype)


KINDS = {
    "sere/step": Fp32Grids(
        sere_step,
        (
            *("n_steps", "n_local", "batch", "accum_iter", "patch_size", "num_heads", "depth", "embed_dim", "head_hidden"),
            *("head_bottleneck", "out_dim", "patch_out_dim", "shared_head*", "norm_last_layer", "clip_grad", "freeze_last_layer"),
            *("alpha", "beta", "temperature_*", "overlap_size", "channel_divisor_*", "*_per_iter", "teacher_temp_*", "adam_betas_eps"),
            *("image_transform", "teacher_init_note", "student_init/*", "teacher_init/*", "iter*/images_*", "iter*/masks", "iter*/boxes_*"),
            "step*/teacher/*predictor.1.running_*",  # the teacher's predictors never run
        ),
    ),
}
