"""The largest batch that a GPU's memory holds (--efficiency.find-batch): real steps of the configured run on random images."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import nn

from fastssl.bench.training import one_rank
from fastssl.config import ConfigError, RunConfig
from fastssl.distributed import Dist
from fastssl.engine import train_step
from fastssl.methods import METHODS

UNIT = 8
"""Batches are tried in multiples of this."""
START = 32
SHARE = 0.95
"""Of the memory that steps may take: decoded batches that wait, and NCCL, need some too."""
NOT_COUNTED = "; the rows of other ranks in its loss, which grow with their number, are not counted: leave room for them"


def largest(fits: Callable[[int], bool], *, start: int = START, unit: int = UNIT) -> int:
    """The largest multiple of `unit` that fits, or one at most 1/32 smaller; 0: not even `unit` does.

    Doubles from `start` until something does not fit, or halves until something does, then bisects.
    """
    good, bad = 0, start
    while fits(bad):
        good, bad = bad, 2 * bad
    while good == 0 and bad > unit:
        half = bad // 2 // unit * unit
        good, bad = (half, bad) if fits(half) else (0, half)
    while good and bad - good > max(unit, good // 32):
        middle = (good + bad) // 2 // unit * unit
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def bucket_bytes(cfg: RunConfig, method: nn.Module) -> int:
    """What DDP holds on each of several ranks: all gradients, in buckets that stay (alone, gradients come as activations go), and in
    bf16 a second time while they are exchanged."""
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    return trained * (4 + 2 * (cfg.efficiency.gradient_dtype == "bf16"))


def fits(cfg: RunConfig, dist: Dist, batch: int) -> bool:
    """Whether two steps (the first makes the optimizer's state) run beside `bucket_bytes` without exhausting the memory; nothing of them
    stays."""
    try:
        rank = one_rank(cfg, dist, batch)
        buckets = torch.empty(bucket_bytes(cfg, rank.state.method), dtype=torch.uint8, device=dist.device)  # noqa: F841  (lies there)
        for _ in range(2):
            train_step(rank.state, [rank.views])
        torch.cuda.synchronize(dist.device)
        return True
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        rank = None
        torch.compiler.reset()


def find_batch(cfg: RunConfig, dist: Dist, say: Callable[[str], None]) -> int:
    """Images per GPU and micro-batch, said with the flags to take.  ConfigError without CUDA, on several ranks, or when none fits."""
    if dist.device.type != "cuda":
        raise ConfigError("--efficiency.find-batch fills the memory of a CUDA device, and there is none here. Leave the flag out.")
    if dist.world > 1:
        raise ConfigError("--efficiency.find-batch looks at one GPU: run it without torchrun, on one of the kind you will use.")
    torch.cuda.set_per_process_memory_fraction(SHARE, dist.device)

    def tried(batch: int) -> bool:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(dist.device)
        good = fits(cfg, dist, batch)
        say(f"batch {batch}: " + (f"{torch.cuda.max_memory_allocated(dist.device) / 2**30:.1f} GiB" if good else "does not fit"))
        return good

    batch = largest(tried)
    if not batch:
        raise ConfigError(f"Not even {UNIT} images fit. Try --efficiency.checkpointing stages, smaller crops or a smaller --model.arch.")
    gpus = -(-cfg.train.global_batch_size // batch)
    say(
        f"{cfg.preset}: at most {batch} images per GPU; the global batch of {cfg.train.global_batch_size} needs "
        f"{gpus} GPUs, or fewer with --train.accumulation-steps where the method allows it"
        + NOT_COUNTED
        * (gpus > 1 and METHODS[cfg.method.name].couples_batch)
    )
    return batch
