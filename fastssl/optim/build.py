"""The configured optimizer and schedules: what the engine asks for, by the names of config.py."""

from __future__ import annotations

import torch
from torch import nn

from fastssl.config import AdamW, BarlowLars, ConfigError, Lars, RunConfig, Sgd
from fastssl.optim.lars import LARS, BarlowLARS
from fastssl.optim.param_groups import split_by_name, split_by_shape
from fastssl.optim.schedules import Sched, Schedules, cosine_momentum, warmup_cosine, warmup_epoch_cosine, warmup_from_zero_cosine


def build_schedules(cfg: RunConfig, steps_per_epoch: int) -> Schedules:
    """The schedules of the configured family."""
    o, t = cfg.optim, cfg.train
    peak, total, warmup = o.peak_lr(t.global_batch_size), t.epochs * steps_per_epoch, o.warmup_epochs * steps_per_epoch

    def lr(s: int) -> float:
        if o.schedule == "dino":
            return warmup_cosine(s, base=peak, final=o.min_lr, total_steps=total, warmup_steps=warmup)
        if o.schedule in ("mocov3", "vicreg"):
            return warmup_from_zero_cosine(s, base=peak, final=o.final_lr(t.global_batch_size), total_steps=total, warmup_steps=warmup)
        return warmup_epoch_cosine(s, base_lr=peak, warmup_epochs=o.warmup_epochs, epochs=t.epochs, steps_per_epoch=steps_per_epoch)

    wd_end = o.weight_decay if o.weight_decay_end is None else o.weight_decay_end
    return Schedules(
        epoch=lambda s: s // steps_per_epoch,
        lr=lr,
        weight_decay=lambda s: warmup_cosine(s, base=o.weight_decay, final=wd_end, total_steps=total),
        ema_momentum=lambda s: (
            t.ema_momentum if t.ema_schedule == "constant" else cosine_momentum(s, base=t.ema_momentum, total_steps=total)
        ),
        seed=t.seed,
    )


def build_optimizer(method: nn.Module, cfg: RunConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the method's trainable parameters, grouped by its rule."""
    o, named = cfg.optim, method.named_parameters()
    common = {"lr": o.peak_lr(cfg.train.global_batch_size), "weight_decay": o.weight_decay}
    match o:
        case Lars():
            return LARS(split_by_name(named, o.exclude), **common, sgd_momentum=o.sgd_momentum, eta=o.eta)
        case BarlowLars():
            return BarlowLARS(split_by_shape(named), **common, sgd_momentum=o.sgd_momentum, eta=o.eta)
        case Sgd():
            sgd = torch.optim.SGD(split_by_shape(named, o.not_decayed), **common, momentum=o.sgd_momentum, fused=True)
            for p in method.parameters():
                # torch makes the buffers in the first step, of uninitialised memory when that step is skipped, and cannot mix
                # parameters with and without one.  From zeros the first step is the same.
                if p.requires_grad:
                    sgd.state[p]["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            return sgd
        case AdamW():
            return torch.optim.AdamW(split_by_shape(named, o.not_decayed), **common, betas=o.betas, eps=o.eps, fused=True)
        case other:
            raise ConfigError(f"no optimizer for {type(other).__name__}")


def set_scalars(optimizer: torch.optim.Optimizer, sched: Sched) -> None:
    """The step's learning rate in every group, its weight decay where the group decays."""
    for group in optimizer.param_groups:
        group["lr"] = sched.lr
        if not group["excluded"]:
            group["weight_decay"] = sched.weight_decay
