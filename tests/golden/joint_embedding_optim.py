"""Kinds of the SFRIK files about its optimizer and schedules."""

from __future__ import annotations

import numpy as np
from torch import nn

from fastssl.optim.build import build_optimizer, build_schedules, set_scalars
from fastssl.optim.schedules import Sched, epoch_cosine, warmup_from_zero_cosine
from tests.golden.joint_embedding import method_of, run_config, tensor
from tests.golden.kind import Arrays, Kind


def lars(arrays: Arrays) -> Arrays:
    n = int(arrays["n_params"])
    module = nn.ParameterList([tensor(arrays[f"p{i}_init"]) for i in range(n)])
    values = {"weight_decay": float(arrays["weight_decay"]), "sgd_momentum": float(arrays["momentum"]), "eta": float(arrays["eta"])}
    optimizer = build_optimizer(module, run_config(method_of("sfrik", {}), optim=values))
    out: Arrays = {}
    for s, lr in enumerate(arrays["lr"]):
        set_scalars(optimizer, Sched(epoch=0, lr=float(lr), weight_decay=values["weight_decay"], ema_momentum=1.0))
        for i, p in enumerate(module):
            p.grad = tensor(arrays[f"p{i}_grad_step{s}"])
        optimizer.step()
        for i, p in enumerate(module):
            out[f"p{i}_after_step{s}"] = p.detach().numpy().copy()
            out[f"p{i}_mu_step{s}"] = optimizer.state[p]["momentum_buffer"].numpy().copy()
    return out


def learning_rates(arrays: Arrays) -> Arrays:
    """The engine's schedule; runs that never leave the warm-up, which the engine refuses, by the function it is made of."""
    out: Arrays = {}
    for c in range(int(arrays["n_cases"])):
        epochs, per_epoch, batch = (int(arrays[f"case{c}_{k}"]) for k in ("epochs", "steps_per_epoch", "batch_size"))
        cfg = run_config(
            method_of("sfrik", {}), optim={"base_lr": float(arrays[f"case{c}_base_lr"])}, epochs=epochs, global_batch_size=batch
        )
        if epochs > cfg.optim.warmup_epochs:
            schedules = build_schedules(cfg, per_epoch)
            rates = [schedules.at(int(t)).lr for t in arrays[f"case{c}_step"]]
        else:
            peak, steps = cfg.optim.peak_lr(batch), cfg.optim.warmup_epochs * per_epoch
            rates = [warmup_from_zero_cosine(int(t), base=peak, total_steps=steps, warmup_steps=steps) for t in arrays[f"case{c}_step"]]
        out[f"case{c}_lr"] = np.array(rates)
    return out


def head_rates(arrays: Arrays) -> Arrays:
    out: Arrays = {}
    for c in range(int(arrays["n_cases"])):
        epochs, rates = int(arrays[f"case{c}_epochs"]), arrays[f"case{c}_base_lrs"].tolist()
        out[f"case{c}_lr_per_epoch"] = np.array([[epoch_cosine(e, base_lr=r, epochs=epochs) for r in rates] for e in range(epochs)])
    return out


KINDS = {
    "sfrik/lars": Kind(lars, ("lr", "weight_decay", "momentum", "eta", "n_params", "n_steps", "p*_init", "p*_grad_step*")),
    "sfrik/lr": Kind(
        learning_rates, ("n_cases", "case*_epochs", "case*_steps_per_epoch", "case*_base_lr", "case*_batch_size", "case*_step")
    ),
    "sfrik/headsched": Kind(head_rates, ("n_cases", "case*_base_lrs", "case*_epochs")),
}
