"""Schedules, each family's exact formula, as plain functions of the step; t counts optimizer steps from 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sched:
    """The scalars of one step.  The engine sets them on the optimizer and the EMA; methods read tensors of their own."""

    epoch: int
    lr: float
    weight_decay: float
    ema_momentum: float
    step: int = 0
    """Optimizer steps before this one."""
    seed: int = 0
    """Of the run: (seed, step) keys what a method draws on all ranks alike."""


def warmup_epoch_cosine(t: int, *, base_lr: float, warmup_epochs: int, epochs: int, steps_per_epoch: int) -> float:
    """EMAN / LEWEL: linear over the steps of the warm-up, then a cosine over *epochs*, constant within each.

    lr (t + 1) / (W spe) for epoch < W;  lr (1 + cos(pi (e - W) / (E - W))) / 2 after.  Reaches base_lr at the end of the
    warm-up and never 0.
    """
    epoch = t // steps_per_epoch
    if epoch < warmup_epochs:
        return base_lr * (t + 1) / (warmup_epochs * steps_per_epoch)
    return epoch_cosine(epoch - warmup_epochs, base_lr=base_lr, epochs=epochs - warmup_epochs)


def warmup_cosine(t: int, *, base: float, final: float, total_steps: int, warmup_steps: int = 0, start: float = 0.0) -> float:
    """DINO: linear from `start` to `base` over the warm-up's n steps, then a cosine over the others (methods/dino.md section 4).

    numpy.linspace(start, base, n)[t] for t < n;  final + (base - final) (1 + cos(pi (t - n) / (T - n))) / 2 after.  So `base` is
    reached at t = n - 1 and taken again at t = n, and `final` is never reached.
    """
    n = warmup_steps
    if t < n:
        return start + (base - start) * (t / max(n - 1, 1))
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (t - n) / (total_steps - n)))


def warmup_from_zero_cosine(t: float, *, base: float, total_steps: float, warmup_steps: float, final: float = 0.0) -> float:
    """MoCo v3 (and W2SSL, VICReg; MAE's fine-tuning): linear from 0 in the first step, then a half cosine (methods/mocov3.md section 6).

    base t / n for t < n;  final + (base - final) (1 + cos(pi (t - n) / (T - n))) / 2 after.  `base` is reached at t = n.
    """
    n = warmup_steps
    if t < n:
        return base * t / n
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * (t - n) / (total_steps - n)))


def epoch_cosine(epoch: int, *, base_lr: float, epochs: int) -> float:
    """base_lr (1 + cos(pi e / E)) / 2."""
    return base_lr * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def timm_cosine(epoch: int, *, base: float, epochs: int, warmup_epochs: float, final: float, start: float) -> float:
    """timm's CosineLRScheduler by epoch, as DeiT uses it (methods/ibot.md 10).

    start + (base - start) e / W for e < W;  final + (base - final) (1 + cos(pi e / E)) / 2 after: the cosine is not shifted by the
    warm-up.
    """
    if epoch < warmup_epochs:
        return start + (base - start) * epoch / warmup_epochs
    return final + epoch_cosine(epoch, base_lr=base - final, epochs=epochs)


def step_decay(epoch: int, *, base_lr: float, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """base_lr times gamma for every milestone reached."""
    return base_lr * gamma ** sum(epoch >= m for m in milestones)


def cosine_momentum(t: int, *, base: float, total_steps: int) -> float:
    """BYOL's target momentum 1 - (1 - m0) (cos(pi t / T) + 1) / 2: m0 at t = 0, towards 1 at T."""
    return 1 - (1 - base) * (math.cos(math.pi * t / total_steps) + 1) / 2


@dataclass(frozen=True)
class Schedules:
    """step -> Sched."""

    epoch: Callable[[int], int]
    lr: Callable[[int], float]
    weight_decay: Callable[[int], float]
    ema_momentum: Callable[[int], float]
    seed: int = 0

    def at(self, t: int) -> Sched:
        return Sched(self.epoch(t), self.lr(t), self.weight_decay(t), self.ema_momentum(t), step=t, seed=self.seed)
