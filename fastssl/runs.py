"""The run folder: its name, what describes the run in it, and which checkpoint to continue from."""

from __future__ import annotations

import glob
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from fastssl import checkpoint
from fastssl.config import ConfigError, RunConfig, flags, to_dict
from fastssl.distributed import Dist
from fastssl.files import whole
from fastssl.models.weights import load_backbone

if TYPE_CHECKING:
    from fastssl.engine import State

log = logging.getLogger("fastssl")


def open_run(cfg: RunConfig, dist: Dist) -> tuple[Path, Path | None]:
    """-> (run folder, checkpoint to resume or None), the same on every rank.

    Order: --train.resume PATH continues in PATH's folder; `auto` continues the named run if it has a checkpoint; otherwise a
    new folder, numbered when the name is taken.  ConfigError when `auto` could mean several runs of the name.
    """
    return dist.broadcast_object(_open(cfg) if dist.is_main else None)


def _open(cfg: RunConfig) -> tuple[Path, Path | None]:
    if cfg.train.resume not in ("", "auto"):
        path = Path(cfg.train.resume)
        checkpoint.check_method(checkpoint.load(path), path, cfg.method.name)
        return path.parent, path
    base = Path(cfg.log.dir) / (cfg.log.name or cfg.preset)
    if cfg.train.resume == "auto":
        refuse_several(base)
        if (base / checkpoint.LAST).exists():
            return base, base / checkpoint.LAST
    folder, number = base, 2
    while cfg.train.resume != "auto" and folder.exists() and any(folder.iterdir()):
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Cannot create the run folder {folder}: {error.strerror}. Choose another with --log.dir DIR.") from error
    return folder, None


def refuse_several(base: Path) -> None:
    """ConfigError when other runs were numbered because `base` was taken, and any of them all can be continued: which, is not known."""
    numbered = [folder for folder in base.parent.glob(f"{glob.escape(base.name)}-*") if name_asked_for(folder) == base.name]
    found = [path for folder in (base, *sorted(numbered)) if (path := folder / checkpoint.LAST).exists()]
    if numbered and found:
        raise ConfigError(
            f"--train.resume auto could mean several runs: {base} and {', '.join(map(str, sorted(numbered)))}. Give the checkpoint: "
            f"--train.resume {' or '.join(map(str, found))}; or leave --train.resume out to start a new run."
        )


def name_asked_for(folder: Path) -> str:
    """The name that the run in `folder` would have had, were it free; empty if no run is there."""
    try:
        cfg = json.loads((folder / "config.json").read_text())["config"]
        return cfg["log"]["name"] or cfg["preset"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def initialise(state: State, path: Path) -> str:
    """Start a new run from the weights of `path`, and say from which.

    A checkpoint of the same method gives all networks.  Any other file that evaluations read (backbone.safetensors, another method's
    checkpoint, torchvision's, timm's and the papers' weights) gives the backbone, of the target network too; heads start afresh.
    CheckpointError when it does not fit.
    """
    method, cfg = state.method, state.cfg
    if path.suffix == ".pt" and (saved := _run_of(path)) and saved["method"] == cfg.method.name:
        checkpoint.load_weights(method, saved, path)
        return f"all networks of {path}, step {saved['step']}"
    backbone, about = load_backbone(str(path), arch=cfg.model.arch)
    for prefix in filter(None, (method.backbone_prefix, method.target_backbone_prefix)):
        try:
            method.get_submodule(prefix.rstrip(".")).load_state_dict(backbone.state_dict())
        except RuntimeError as error:
            raise checkpoint.CheckpointError(
                f"{path} does not fit --model.arch {cfg.model.arch} with --model.image-size {cfg.model.image_size} "
                f"({str(error).splitlines()[1].strip()}). Set both to those of the weights."
            ) from error
    return f"the backbone of {path} ({about['arch']}, {about['network']} network); heads start afresh"


def _run_of(path: Path) -> dict | None:
    """The training checkpoint at `path`; None if it is something else."""
    try:
        return checkpoint.load(path)
    except checkpoint.CheckpointError:
        return None


def describe_run(folder: Path, cfg: RunConfig, dist: Dist, *, step: int = 0) -> None:
    """config.json: the resolved configuration, versions, commit and device.

    A run that is continued with other values says which, and keeps those it had until now as config.until_step<N>.json.
    """
    if dist.is_main:
        path = folder / "config.json"
        if step and (changed := _changes(path, cfg)):
            path.replace(folder / f"config.until_step{step}.json")
            log.warning(f"from step {step} on other values hold: {', '.join(changed)}")
        text = json.dumps({"config": to_dict(cfg), "versions": checkpoint.versions(), "world": dist.world}, indent=2)
        whole(path, lambda partial: partial.write_text(text + "\n"))


def _changes(path: Path, cfg: RunConfig) -> list[str]:
    """Flags of `cfg` that the config.json at `path` has otherwise; none where it cannot be read."""
    try:
        before = flags(json.loads(path.read_text())["config"])
    except (OSError, ValueError, KeyError):
        return []
    now = {flag: text for flag, text in flags(to_dict(cfg)).items() if flag not in ("--train.resume", "--train.init-from")}
    return [f"{flag} {before.get(flag, '-')} -> {text}" for flag, text in now.items() if before.get(flag) != text]
