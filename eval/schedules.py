"""Learning rates of detection and segmentation, by iteration, counted from 0 (methods/transfer.md sections 2 and 5.3)."""

from __future__ import annotations

from collections.abc import Sequence

WARMUP_FACTOR = 0.001
"""Detectron2's: what the first iteration's learning rate is of the peak."""


def warmup_step_decay(i: int, *, base_lr: float, milestones: Sequence[int], warmup: int, gamma: float = 0.1) -> float:
    """Detectron2's WarmupMultiStepLR with its linear warm-up.

    base g(i) for i >= W;  base (0.001 (1 - i / W) + (i / W) g(W)) before, g being gamma^(number of milestones <= i).
    """

    def g(at: int) -> float:
        return gamma ** sum(milestone <= at for milestone in milestones)

    if i >= warmup:
        return base_lr * g(i)
    return base_lr * (WARMUP_FACTOR * (1 - i / warmup) + i / warmup * g(warmup))


def poly(i: int, *, base_lr: float, min_lr: float, power: float, steps: int) -> float:
    """(base - min) (1 - i / steps)^power + min.  mmcv's `steps` is the number of iterations, mmengine's is one less."""
    return (base_lr - min_lr) * (1 - i / steps) ** power + min_lr
