"""The run folder: its name, what describes the run in it, and which checkpoint to continue from."""

from __future__ import annotations

import glob
import json
from pathlib import Path

from fastssl import checkpoint
from fastssl.config import ConfigError, RunConfig, to_dict
from fastssl.distributed import Dist


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


def describe_run(folder: Path, cfg: RunConfig, dist: Dist) -> None:
    """config.json: the resolved configuration, versions, commit and device."""
    if dist.is_main:
        text = json.dumps({"config": to_dict(cfg), "versions": checkpoint.versions(), "world": dist.world}, indent=2)
        temporary = folder / "config.json.partial"
        temporary.write_text(text + "\n")
        temporary.replace(folder / "config.json")
