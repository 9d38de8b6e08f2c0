"""The session of a run."""

from __future__ import annotations

import pytest
import torch

from fastssl.config import ConfigError
from fastssl.distributed import session


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    """By every rank, before any waits for the others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="4 ranks.*2 GPUs.*--nproc-per-node 2"), session():
        pass
