"""Pretrain a backbone.

python train.py --method lewel --data.path data/imagenet                       one GPU, or a CPU
torchrun --nproc-per-node 8 train.py --method lewel                            one node
torchrun --nproc-per-node 8 train.py --preset byol_eman_r50_200ep --optim.base-lr 1.8 --dry-run
"""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from eval.knn import evaluate
from fastssl import checkpoint, cli, hooks, runs
from fastssl.augment.augmenter import Augmenter
from fastssl.config import ConfigError, RunConfig
from fastssl.distributed import Dist, session
from fastssl.engine import State, compiles, fit, prepare
from fastssl.methods import build_method
from loaders.build import build_loader
from loaders.errors import DataError
from loaders.open import has_split

log = logging.getLogger("fastssl")


def main() -> None:
    world, main_rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0") == "0"
    try:
        cfg, dry_run = cli.parse_cli()
        warnings = cli.check(cfg, world)
    except ConfigError:
        if main_rank:
            raise
        sys.exit(1)  # the first rank says why
    for warning in warnings:
        if main_rank:
            log.warning(warning)
    if dry_run:
        print(cli.describe(cfg, world))
        return
    with session() as dist:
        if cfg.efficiency.find_batch:
            from fastssl.bench.find_batch import find_batch  # no other run needs what measures

            find_batch(cfg, dist, log.info)
            return
        train(cfg, dist)


def train(cfg: RunConfig, dist: Dist) -> State:
    e, t = cfg.efficiency, cfg.train
    loader = build_loader(
        cfg.data.path,
        "train",
        cfg.views,
        dist=dist,
        batch=cli.rank_batch(cfg, dist.world),
        accumulation_steps=t.accumulation_steps,
        seed=t.seed,
        order=cfg.data.order,
        last_batch=cfg.data.last_batch,
        subset=cfg.data.subset,
        backend=e.loader,
        workers=e.workers,
        prefetch=e.prefetch,
    )
    cli.check_last_batch(loader.smallest_batch)
    folder, resume = runs.open_run(cfg, dist)
    torch.manual_seed(t.seed)
    state = prepare(build_method(cfg), cfg, dist, loader.steps_per_epoch)
    state.data, state.samples = loader.digest, loader.num_samples
    checkpoint.check_free_space(state, folder)
    if resume:
        checkpoint.restore(state, resume)
    elif t.init_from:
        found = runs.initialise(state, Path(t.init_from))
        if dist.is_main:
            log.info(f"starting from {found}")
    runs.describe_run(folder, cfg, dist, step=state.step)
    if dist.is_main:
        log.info(
            f"{cfg.preset}: {loader.num_samples} images ({loader.backend}), {loader.steps_per_epoch} steps an epoch, batch "
            f"{t.global_batch_size} = {dist.world} x {t.accumulation_steps} x {cli.rank_batch(cfg, dist.world)}, {dist.device}, "
            f"{state.dtype}, step {state.step} -> {state.total_steps}, in {folder}"
        )
    augment = Augmenter(
        cfg.views,
        device=dist.device,
        dtype=state.dtype,
        seed=t.seed,
        channels_last=e.channels_last,
        compile=compiles(cfg, dist.device) and dist.device.type == "cuda",
    )
    fit(state, loader, augment, build_hooks(cfg, dist, folder, state.dtype, labelled=loader.labels is not None))
    if dist.is_main and not state.stop:
        files = ("backbone.safetensors", "metrics.jsonl", *(["curves.png"] if cfg.log.pictures else []))
        log.info(f"done: step {state.step}; {', '.join([str(folder / checkpoint.LAST), *files])}")
    return state


def build_hooks(cfg: RunConfig, dist: Dist, folder: Path, dtype: torch.dtype, *, labelled: bool) -> list[hooks.Hook]:
    """In the order they run: evaluation before the checkpoint, and what they all left behind is collected last."""
    progress = hooks.Progress(folder)
    chosen: list[hooks.Hook] = [hooks.Preemption(folder), progress, hooks.NonFinite(folder, max_bad_steps=cfg.train.max_bad_steps)]
    chosen.append(hooks.CollapseAlarm())
    e = cfg.eval
    if e.knn_every_epochs and not (labelled and has_split(cfg.data.path, "val")):
        if dist.is_main:
            log.info(f"no online k-NN: it needs labels and a validation split in {cfg.data.path}")
    elif e.knn_every_epochs:
        knn = partial(
            evaluate,
            data_path=cfg.data.path,
            subset=cfg.data.subset,
            dist=dist,
            k=e.knn_k,
            resize=e.resize,
            crop=e.crop,
            normalisation=cfg.views[0].photometric,
            dtype=dtype,
            backend=cfg.efficiency.loader,
            workers=cfg.efficiency.workers,
        )
        chosen.append(hooks.OnlineEvaluation(knn, progress.write, every_epochs=e.knn_every_epochs))
    chosen.append(hooks.Checkpointer(folder, every_epochs=cfg.log.checkpoint_every_epochs, keep_every=cfg.log.keep_every))
    if cfg.log.pictures:
        chosen.append(hooks.Pictures(folder))
    chosen.append(hooks.GarbageCollection())
    return chosen


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        with logging_redirect_tqdm():  # lines go above the bar, not through it
            main()
    except (ConfigError, DataError, checkpoint.CheckpointError, hooks.Diverged) as error:
        sys.exit(f"train.py: {error}")
