"""The command line of train.py: --method or --preset picks a preset, every leaf of it is a dotted flag, nothing else passes."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Sequence

import torch
import tyro
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.config import ConfigError, RunConfig, flags, to_dict
from fastssl.methods import METHODS, build_method
from fastssl.presets import DEFAULTS, PRESETS

DESCRIPTION = """Pretrain a backbone.  --method NAME takes that method's default preset, --preset NAME any.  Every value of a preset is a
flag: --preset NAME --help lists them, --dry-run prints the resolved values and stops."""


def parse_cli(argv: Sequence[str] | None = None) -> tuple[RunConfig, bool]:
    """-> (configuration, dry run).  Unknown names and flags end with a suggestion and exit status 2."""
    parser = argparse.ArgumentParser(prog="train.py", description=DESCRIPTION, add_help=False, allow_abbrev=False)
    parser.add_argument("--method", metavar="NAME", help=" | ".join(METHODS))
    parser.add_argument("--preset", metavar="NAME", help=" | ".join(PRESETS))
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    known, rest = parser.parse_known_args(argv)
    if known.method is None and known.preset is None:
        parser.print_help()
        if known.help:
            raise SystemExit(0)
        raise ConfigError("Name what to train: --method " + " | ".join(METHODS) + ", or --preset NAME.")
    if known.method is not None:
        check_name("method", known.method, METHODS)
        check_name("default preset of the method", known.method, DEFAULTS)
    name = known.preset or DEFAULTS[known.method]
    preset = check_name("preset", name, PRESETS)()
    if known.method is not None and preset.method.name != known.method:
        raise ConfigError(f"Preset {name} is of the method {preset.method.name}, not {known.method}. Leave one of the two flags out.")
    cfg = tyro.cli(
        RunConfig,
        prog=f"train.py --preset {name}",
        description=(PRESETS[name].__doc__ or "").strip(),
        default=preset,
        args=[*rest, *(["--help"] if known.help else [])],
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
    return cfg, known.dry_run


def check_name(kind: str, name: str, table: dict):
    """table[name]; otherwise a ConfigError with the nearest names."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}? `python train.py` lists all." if near else f"Known: {', '.join(table)}."
    raise ConfigError(f"There is no {kind} '{name}'. {hint}")


def rank_batch(cfg: RunConfig, world: int) -> int:
    """Images of one micro-batch of one rank.  ConfigError when the global batch does not divide."""
    t = cfg.train
    if t.accumulation_steps < 1:
        raise ConfigError(f"--train.accumulation-steps must be at least 1, got {t.accumulation_steps}.")
    share = world * t.accumulation_steps
    if t.global_batch_size % share or t.global_batch_size < share:
        below = max(t.global_batch_size // share, 1) * share
        raise ConfigError(
            f"--train.global-batch-size {t.global_batch_size} does not divide into {world} ranks x {t.accumulation_steps} accumulation "
            f"steps. Take {below} or {below + share}, or another number of ranks."
        )
    return t.global_batch_size // share


def check(cfg: RunConfig, world: int) -> list[str]:
    """Everything about a configuration that can be known before data is touched -> warnings; ConfigError when it cannot run."""
    batch = rank_batch(cfg, world)
    method = METHODS[cfg.method.name]
    method.check(cfg)
    method.check_ranks(cfg, world)
    if cfg.model.norm not in method.norm_policies:
        raise ConfigError(f"{cfg.method.name} has no --model.norm {cfg.model.norm}. Take one of {', '.join(method.norm_policies)}.")
    o, t = cfg.optim, cfg.train
    positive = {
        "--train.epochs": t.epochs,
        "--train.global-batch-size": t.global_batch_size,
        "--optim.base-batch-size": 1 if o.base_batch_size is None else o.base_batch_size,
        "--log.every-steps": cfg.log.every_steps,
        "--log.checkpoint-every-epochs": cfg.log.checkpoint_every_epochs,
        "--efficiency.prefetch": cfg.efficiency.prefetch,
        "--train.max-steps": 1 if t.max_steps is None else t.max_steps,
        "--train.max-bad-steps": t.max_bad_steps,
        "--eval.knn-k": min(cfg.eval.knn_k, default=0),
    }
    for flag, value in positive.items():
        if value < 1:
            raise ConfigError(f"{flag} must be at least 1, got {value}.")
    if not 0 <= t.ema_momentum <= 1:
        raise ConfigError(f"--train.ema-momentum must be between 0 and 1, got {t.ema_momentum}.")
    if not math.isfinite(o.base_lr) or o.base_lr <= 0:
        raise ConfigError(f"--optim.base-lr must be positive, got {o.base_lr}.")
    not_negative = {
        "--optim.min-lr": o.min_lr,
        "--optim.clip-grad": o.clip_grad,
        "--optim.weight-decay": o.weight_decay,
        "--optim.weight-decay-end": o.weight_decay_end or 0,
        "--log.keep-every": cfg.log.keep_every,
        "--eval.knn-every-epochs": cfg.eval.knn_every_epochs,
        "--efficiency.workers": cfg.efficiency.workers,
    }
    for flag, value in not_negative.items():
        if not math.isfinite(value) or value < 0:
            raise ConfigError(f"{flag} must not be negative, got {value}.")
    if o.min_lr and o.schedule != "dino":
        raise ConfigError(f"--optim.min-lr {o.min_lr} needs --optim.schedule dino: where the cosine of '{o.schedule}' ends is fixed.")
    if not 0 <= o.warmup_epochs < t.epochs:
        raise ConfigError(
            f"--optim.warmup-epochs {o.warmup_epochs} must be at least 0 and smaller than --train.epochs {t.epochs}. "
            f"For a run as short as this add --optim.warmup-epochs {t.epochs // 10}."
        )
    if t.resume not in ("", "auto") and t.init_from:
        raise ConfigError("--train.resume PATH continues a run and --train.init-from starts one: give only one of them.")
    if method.couples_batch and t.accumulation_steps > 1:
        raise ConfigError(
            f"{cfg.method.name} compares samples across the global batch: accumulation would change its loss. Use more ranks."
        )
    if cfg.efficiency.cuda_graphs and t.accumulation_steps > 1:
        raise ConfigError(
            "--efficiency.cuda-graphs True: a replay overwrites the gradients of the one before. Take --train.accumulation-steps 1."
        )
    with torch.device("meta"):  # networks without weights: what their constructors refuse
        networks = build_method(cfg)
    warnings = []
    normalises = any(isinstance(m, _BatchNorm) for m in networks.modules())
    if normalises and cfg.model.norm == "sync" and t.accumulation_steps > 1:
        warnings.append(
            f"BatchNorm sees {t.global_batch_size // t.accumulation_steps} images, those of a micro-batch of all ranks; without "
            f"accumulation it sees {t.global_batch_size}."
        )
    if normalises and cfg.model.norm != "sync" and t.published_rank_batch not in (None, batch):
        warnings.append(f"BatchNorm sees {batch} images per rank; the published run had {t.published_rank_batch}.")
    if o.min_lr > (peak := o.peak_lr(t.global_batch_size)):
        warnings.append(
            f"the learning rate rises from its peak {peak:g} to --optim.min-lr {o.min_lr:g}, which does not scale with the batch: lower it."
        )
    if batch < 2:
        raise ConfigError("BatchNorm needs at least two images per rank: raise --train.global-batch-size or use fewer ranks.")
    return warnings


def check_last_batch(batch: int) -> None:
    """ConfigError when an epoch ends with `batch` images per rank and micro-batch that BatchNorm cannot normalise."""
    if batch < 2:
        raise ConfigError(
            "The kept last batch of an epoch has one image per rank and micro-batch, and BatchNorm needs at least two: take "
            "--data.last-batch drop, or another --train.global-batch-size."
        )


def describe(cfg: RunConfig, world: int) -> str:
    """The resolved values, one flag a line, then what follows from them."""
    values = to_dict(cfg)
    method = values["method"].pop("name")
    o, t = cfg.optim, cfg.train
    scaling = "as given" if o.base_batch_size is None else f"{o.base_lr:g} x global batch {t.global_batch_size} / {o.base_batch_size}"
    derived = (
        f"  images per rank and micro-batch   {rank_batch(cfg, world)}  ({world} ranks x {t.accumulation_steps} micro-batches)\n"
        f"  peak learning rate                {o.peak_lr(t.global_batch_size):g}  ({scaling}; reached after {o.warmup_epochs} epochs)\n"
        f"  final learning rate               {o.final_lr(t.global_batch_size):g}  "
        f"({'0.001 of the peak' if o.schedule == 'vicreg' else 'whatever the batch'}; a cosine ends there after {t.epochs} epochs)"
    )
    derived += "".join(f"\n  {name:<34}{value}" for name, value in METHODS[cfg.method.name].derived(cfg, world).items())
    values.pop("preset")
    for view in values["views"]:
        if view["mask"] is None:  # no flag gives a view a mask
            del view["mask"]
    resolved = "\n".join(f"  {flag} {text}" for flag, text in flags(values).items())
    return f"preset {cfg.preset} (method {method})\n{resolved}\nderived\n{derived}"
