"""Training steps against the authors' numbers with every efficiency switch as the golden files' own checks do not have it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastssl.config import EfficiencyConfig
from tests.golden.kind import Kind
from tests.golden.kinds import KINDS
from tests.golden.test_golden import FOLDER, kind_of, load

SWITCHES = {"checkpointing": {"checkpointing": "stages"}, "contiguous": {"channels_last": False}, "compiled": {"compile": "on"}}
QUICK = {"checkpointing": ("ibot_step_b",), "contiguous": ("byol_step_bn",), "compiled": ()}
STEPS = sorted(p for pattern in ("*_step*", "*_trainloop*", "*_train") for p in FOLDER.glob(f"{pattern}.npz"))
CASES = [
    pytest.param(switch, path, id=f"{switch}-{path.stem}", marks=() if path.stem in quick else pytest.mark.slow)
    for switch, quick in QUICK.items()
    for path in STEPS
]


@pytest.mark.parametrize(("switch", "path"), CASES)
def test_golden_with(switch: str, path: Path, monkeypatch):
    """Within the tolerance that the file's own check has."""
    plain, made = EfficiencyConfig.__init__, []

    def switched(self, **given) -> None:
        plain(self, **{**given, **SWITCHES[switch]})
        made.append(self)

    monkeypatch.setattr(EfficiencyConfig, "__init__", switched)
    kind: Kind = KINDS[kind_of(path)]
    monkeypatch.setattr(kind, "_done", {})
    kind(load(path))
    if not made:
        pytest.skip("this file's steps are not the engine's")
