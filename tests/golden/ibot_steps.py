"""Kinds of the iBOT files about training: schedules, and whole steps of the engine."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
from torch import Tensor

from fastssl.batch import Views
from fastssl.config import AdamW, EfficiencyConfig, ModelConfig, RunConfig, TrainConfig
from fastssl.engine import prepare, train_step
from fastssl.methods.ibot import IBOT
from fastssl.models.vit import ViT
from fastssl.optim.build import build_schedules
from fastssl.optim.schedules import Sched, Schedules
from fastssl.recipes import ibot
from tests.golden.dino_family import ALONE, grouped
from tests.golden.ibot_family import Unused, head_options, masked_views, ours, temperatures, tensor, transformed
from tests.golden.kind import Arrays, Kind


def run_config(method: IBOT.Config, optim: AdamW, **train) -> RunConfig:
    return RunConfig(
        preset="golden",
        method=method,
        model=ModelConfig(),
        views=ibot(),
        optim=optim,
        train=TrainConfig(**train),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
    )


def ibot_schedules(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for preset in (k.removesuffix("/args") for k in arrays if k.endswith("/args")):
        a = dict(zip(arrays["arg_names"].tolist(), arrays[f"{preset}/args"].tolist(), strict=True))
        cfg = IBOT.Config(
            **{name: a[name] for name in ("warmup_teacher_temp", "teacher_temp", "warmup_teacher_patch_temp", "teacher_patch_temp")},
            warmup_teacher_temp_epochs=int(a["warmup_teacher_temp_epochs"]),
            pred_start_epoch=int(a["pred_start_epoch"]),
            **{"out_dim": 2, "hidden": 1, "bottleneck": 1},
        )
        optim = AdamW(
            base_lr=a["lr"],
            base_batch_size=256,
            min_lr=a["min_lr"],
            weight_decay=a["wd"],
            weight_decay_end=a["wd_end"],
            schedule="dino",
            warmup_epochs=int(a["warmup_epochs"]),
        )
        train = {"epochs": int(a["epochs"]), "global_batch_size": int(a["global_batch"]), "ema_momentum": a["momentum"]}
        at = build_schedules(run_config(cfg, optim, **train), int(a["niter_per_epoch"])).at
        scheds = [at(int(i)) for i in arrays[f"{preset}/iters"]]
        for name, field in (("lr", "lr"), ("wd", "weight_decay"), ("momentum", "ema_momentum")):
            out[f"{preset}/{name}"] = np.array([getattr(s, field) for s in scheds])
        by_epoch = temperatures(IBOT(cfg, Unused, "local").double(), int(a["epochs"]))
        out |= {f"{preset}/{name}_by_epoch": values for name, values in by_epoch.items()}
    return out


# ------------------------------------------------------------------------------------------------ steps


class Given(IBOT):
    """iBOT whose teacher temperatures are a file's, step for step."""

    def given(self, arrays: Arrays) -> None:
        self.series = [arrays[name].tolist() for name in ("teacher_temp_per_step", "teacher_temp_patch_per_step")]

    def before_step(self, sched: Sched) -> None:
        super().before_step(sched)
        for buffer, series in zip((self.teacher_temp, self.teacher_patch_temp), self.series, strict=True):
            buffer.fill_(series[sched.epoch])


def of_method(net: str, official: str) -> str:
    """Official name in the student or teacher -> name in the method."""
    name = ours(official)
    return name if name == "masked_embed" else f"{net}.{name}"


def ibot_step(arrays: Arrays) -> Arrays:
    prefix = "student_init/head."
    options = head_options(arrays, prefix)
    method = Given(
        IBOT.Config(
            out_dim=int(arrays["out_dim"]),
            patch_out_dim=int(arrays["patch_out_dim"]),
            shared_head=bool(arrays["shared_head"]),
            head_layers=options.pop("layers"),
            norm_last_layer=bool(arrays["norm_last_layer"]),
            freeze_last_layer=int(arrays["freeze_last_layer"]),
            **options,
        ),
        partial(
            ViT,
            *(int(arrays[name]) for name in ("embed_dim", "depth", "num_heads", "patch_size")),
            image_size=arrays["step0/images_global_u8"].shape[-1],
        ),
        "local",
    ).double()
    method.given(arrays)
    official = {net: [k.partition("/")[2] for k in arrays if k.startswith(f"{net}_init/")] for net in ("student", "teacher")}
    states = {of_method(net, n): tensor(arrays[f"{net}_init/{n}"]) for net in official for n in official[net]}
    missing, unexpected = method.load_state_dict(states, strict=False)
    assert not unexpected and set(missing) == {"centers.cls", "centers.patch"}

    beta1, beta2, eps = arrays["adam_betas_eps"].tolist()
    optim = AdamW(
        base_lr=1.0, weight_decay=1.0, betas=(beta1, beta2), eps=eps, schedule="dino", warmup_epochs=0, clip_grad=float(arrays["clip_grad"])
    )
    steps = int(arrays["n_steps"])
    state = prepare(method, run_config(method.cfg, optim, epochs=steps, global_batch_size=int(arrays["batch"])), ALONE, 1)
    lr, wd, momentum = (arrays[f"{name}_per_step"].tolist() for name in ("lr", "wd", "momentum"))
    state.schedules = Schedules(epoch=int, lr=lr.__getitem__, weight_decay=wd.__getitem__, ema_momentum=momentum.__getitem__)

    named = dict(method.named_parameters())
    params = {n: named[of_method("student", n)] for n in sorted(official["student"])}
    grads: dict[str, Tensor] = {}
    for n, p in params.items():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(lambda p, n=n: grads.update({n: p.grad.clone()}))
    decayed = {n for group in state.optimizer.param_groups if not group["excluded"] for n in group["names"]}
    trained = {n: of_method("student", n) in decayed for n, p in params.items() if p.requires_grad}
    out: Arrays = {
        "param_names_decay": np.array([n for n, decays in trained.items() if decays]),
        "param_names_nodecay": np.array([n for n, decays in trained.items() if not decays]),
        "param_names_frozen": np.array([n for n in params if n not in trained], "U64"),
    }
    for t in range(steps):
        step = f"step{t}/"
        grads.clear()
        dropped = {id(p) for p in method.dropped_gradients(state.schedules.at(t))}
        result = train_step(state, [views_of_step(arrays, step)])
        out |= {
            f"{step}loss": result.loss.detach().numpy(),
            f"{step}loss_cls": result.logs["loss_cls"].numpy(),
            f"{step}loss_patch": result.logs["loss_patch"].numpy(),
            f"{step}center_cls": method.centers["cls"].numpy().copy(),
            f"{step}center_patch": method.centers["patch"].numpy().copy()[None],
            f"{step}grad_names": np.array(sorted(grads)),
            f"{step}grad_norms_before_clip": np.array([grads[n].norm().item() for n in sorted(grads)]),
            f"{step}grad_none_names": np.array([n for n, p in params.items() if id(p) in dropped and p.requires_grad], "U64"),
            **{f"{step}grad_before_clip/{n}": g.numpy() for n, g in grads.items()},
        }
        for net, names in official.items():
            out |= {f"{step}{net}/{n}": method.state_dict()[of_method(net, n)].numpy().copy() for n in names}
    return out


def views_of_step(arrays: Arrays, step: str) -> Views:
    crops = [transformed(x).numpy() for x in arrays[f"{step}images_global_u8"]]
    if f"{step}images_local_u8" in arrays:
        crops += [transformed(x).numpy() for x in arrays[f"{step}images_local_u8"]]
    masked = masked_views(arrays[f"{step}masks"])
    return dataclasses.replace(grouped(crops), masks=masked.masks, masked=masked.masked)


KINDS = {
    "ibot/schedules": Kind(ibot_schedules, ("arg_names", "*/args", "*/iters")),
    "ibot/step": Kind(
        ibot_step,
        (
            *("n_steps", "n_local", "batch", "patch_size", "num_heads", "depth", "embed_dim", "head_hidden", "head_bottleneck", "out_dim"),
            *("patch_out_dim", "shared_head", "shared_head_teacher", "norm_last_layer", "clip_grad", "freeze_last_layer", "*_per_step"),
            *("adam_betas_eps", "image_transform", "student_init/*", "teacher_init/*", "step*/images_*", "step*/masks"),
        ),
    ),
}
