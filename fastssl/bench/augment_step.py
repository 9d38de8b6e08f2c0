"""The share of a training step that augmentation takes: a preset's whole step on one device, with and without it."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

from fastssl.bench.augment_clock import clock
from fastssl.bench.training import one_rank
from fastssl.config import RunConfig
from fastssl.distributed import Dist
from fastssl.engine import compiles, train_step

WARM_UP = 3
"""Steps that are not measured: compilation, cuDNN's choice of algorithms."""


def step_share(
    cfg: RunConfig, device: torch.device, *, seconds: float, rounds: int, say: Callable[[str], None] = lambda message: None
) -> dict:
    """Times of one rank's step, of augmenting its batch, and of both together; one rank has the batch it was published with.

    The share is augmentation's time over that of the step without it.  In training, kernels of the one can run while the other is
    being launched: what augmentation adds to a step is given, too.
    """
    batch = cfg.train.published_rank_batch or cfg.train.global_batch_size
    rank = one_rank(cfg, Dist(0, 1, 0, 1, device), batch)
    state, augment, images, views = rank.state, rank.augment, rank.images, rank.views
    runs = {
        "step": lambda: train_step(state, [views]),
        "augment": lambda: augment(images),
        "step_and_augment": lambda: train_step(state, [augment(images)]),
    }
    say(f"warming up a step of {cfg.preset}, batch {batch}")
    for _ in range(WARM_UP):
        for run in runs.values():
            run()
    say("measuring steps")
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(clock(run, device, seconds).ms)
    return {
        "preset": cfg.preset,
        "arch": cfg.model.arch,
        "images": batch,
        "views": len(cfg.views),
        "size": cfg.views[0].crop.size,
        "dtype": str(state.dtype).removeprefix("torch."),
        "compiled": compiles(cfg, device),
        **{f"{name}_ms": median(values) for name, values in times.items()},
        **{f"{name}_ms_rounds": values for name, values in times.items()},
        "share_of_step": median(a / s for a, s in zip(times["augment"], times["step"], strict=True)),
        "added_to_step": median(both / s - 1 for both, s in zip(times["step_and_augment"], times["step"], strict=True)),
    }
