"""Kinds of the DINO files about optimizers, clipping and schedules."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import torch
from torch import nn

from fastssl.config import AdamW, BarlowLars, EfficiencyConfig, ModelConfig, OptimConfig, RunConfig, Sgd, TrainConfig
from fastssl.losses.distillation import teacher_temperature
from fastssl.methods.byol import BYOL
from fastssl.optim.build import build_optimizer, build_schedules, set_scalars
from fastssl.optim.clip import clip_each_
from fastssl.optim.schedules import Sched, warmup_cosine
from fastssl.recipes import byol_asymmetric
from tests.golden.kind import Arrays, Kind

OPTIMIZERS = {"lars": BarlowLars, "sgd": Sgd, "adamw": AdamW}


def run_config(optim: OptimConfig, **train) -> RunConfig:
    """`optim` in a run; nothing else of it matters here."""
    return RunConfig(
        preset="golden",
        method=BYOL.Config(),
        model=ModelConfig(),
        views=byol_asymmetric(),
        optim=optim,
        train=TrainConfig(**train),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
    )


def named_tensors(arrays: Arrays, prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): torch.from_numpy(np.array(a)) for k, a in arrays.items() if k.startswith(prefix)}


def dino_optim(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for name in OPTIMIZERS:
        if f"{name}/lr" in arrays:
            out |= optimizer_steps(arrays, name)
    if "clip_value" in arrays:
        out |= clipped(arrays)
    return out


def optimizer_steps(arrays: Arrays, name: str) -> Arrays:
    module, grads = nn.ParameterDict(named_tensors(arrays, "init/")), named_tensors(arrays, "grad/")
    optimizer = build_optimizer(module, run_config(OPTIMIZERS[name](base_lr=1.0)))
    out: Arrays = {}
    for t, (lr, weight_decay) in enumerate(zip(arrays[f"{name}/lr"], arrays["weight_decay"], strict=True)):
        set_scalars(optimizer, Sched(epoch=0, lr=float(lr), weight_decay=float(weight_decay), ema_momentum=1.0))
        for k, p in module.items():
            frozen = (t, k) == (0, "weight")  # golden/dino.md
            p.grad = None if frozen else grads[k][t].clone()
        optimizer.step()
        out |= {f"{name}/step{t}/{k}": p.detach().numpy().copy() for k, p in module.items()}
    return out


def clipped(arrays: Arrays) -> Arrays:
    grads = named_tensors(arrays, "clip_in/")
    params = {k: nn.Parameter(torch.zeros_like(g)) for k, g in grads.items()}
    for k, p in params.items():
        p.grad = grads[k]
    norms = dict(zip(params, clip_each_(params.values(), float(arrays["clip_value"])).numpy(), strict=True))
    out = {f"clip_out/{k}": p.grad.numpy() for k, p in params.items()}
    prefix = "clip_norms_in_order_"
    return out | {k: np.array([norms[n] for n in k.removeprefix(prefix).split("_")]) for k in arrays if k.startswith(prefix)}


def dino_schedules(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for key, values in arrays.items():
        if match := re.fullmatch(r"(cosine\d+)_base_final_epochs_niter_warmupepochs_start", key):
            base, final, *counts, start = values.tolist()
            out[f"{match[1]}_schedule"] = cosine(base, final, start, *map(int, counts))
        elif match := re.fullmatch(r"(teachertemp\d+)_warmup_final_warmupepochs_nepochs", key):
            first, last, warmup, epochs = values.tolist()
            temperature = partial(teacher_temperature, warmup=first, final=last, warmup_epochs=int(warmup))
            out[f"{match[1]}_schedule"] = np.array([temperature(e) for e in range(int(epochs))])
    return out


def cosine(base: float, final: float, start: float, epochs: int, per_epoch: int, warmup_epochs: int) -> np.ndarray:
    """The engine's schedules where they can be this one (it warms up from 0 and then goes on), which must agree; else the function they
    are made of."""
    steps = range(epochs * per_epoch)
    if start or warmup_epochs >= epochs:
        n = warmup_epochs * per_epoch
        return np.array([warmup_cosine(t, base=base, final=final, total_steps=len(steps), warmup_steps=n, start=start) for t in steps])
    optim = OptimConfig(base_lr=base, min_lr=final, weight_decay=base, weight_decay_end=final, schedule="dino", warmup_epochs=warmup_epochs)
    schedules = build_schedules(run_config(optim, epochs=epochs, ema_momentum=base), per_epoch)
    scheds = [schedules.at(t) for t in steps]
    assert [s.epoch for s in scheds] == [t // per_epoch for t in steps]
    lr = np.array([s.lr for s in scheds])
    if not warmup_epochs:
        np.testing.assert_allclose([s.weight_decay for s in scheds], lr, rtol=1e-12)
        if final == 1:
            np.testing.assert_allclose([s.ema_momentum for s in scheds], lr, rtol=1e-12)
    return lr


KINDS = {
    "dino/optim": Kind(dino_optim, ("init/*", "grad/*", "weight_decay", "*/lr", "clip_in/*", "clip_value")),
    "dino/schedules": Kind(dino_schedules, ("*_warmupepochs_start", "*_warmupepochs_nepochs")),
}
