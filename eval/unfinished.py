"""States of evaluations that were interrupted, refused where they are of something else."""

from __future__ import annotations

from pathlib import Path

import torch

from fastssl.checkpoint import CheckpointError
from fastssl.config import ConfigError


def read_state(path: Path, identity: dict[str, object]) -> dict:
    """What `path` holds, if its own `identity` is equal.  CheckpointError for an unreadable file, ConfigError for other settings."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        theirs = saved["identity"]
    except Exception as error:
        raise CheckpointError(f"{path} cannot be continued from ({type(error).__name__}). Delete it to start again.") from error
    if different := [n for n in {**theirs, **identity} if theirs.get(n) != identity.get(n)]:
        shown = ", ".join(f"{n} was {theirs.get(n)} and is {identity.get(n)}" for n in different)
        raise ConfigError(
            f"{path} is of an unfinished evaluation with other settings: {shown}. Finish it with those, delete it, or write elsewhere "
            f"with --out FILE.json."
        )
    return saved
