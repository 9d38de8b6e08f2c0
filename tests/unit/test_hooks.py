"""Hooks apart from runs."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace

import pytest

from fastssl import hooks


def test_garbage_is_collected_at_set_steps_only(monkeypatch):
    """In the middle of an epoch at multiples of 3, and at its end; afterwards all is as before."""
    hook, collected = hooks.GarbageCollection(every_steps=3), []
    before = gc.isenabled(), gc.get_freeze_count()
    hook.start(None)
    try:
        assert not gc.isenabled() and gc.get_freeze_count() > before[1]
        monkeypatch.setattr(gc, "collect", lambda: collected.append(step))
        for step in range(1, 8):
            hook.after_step(SimpleNamespace(step=step, at_epoch_end=step % 5 == 0))
    finally:
        hook.close()
    assert collected == [3, 5, 6] and (gc.isenabled(), gc.get_freeze_count()) == before


@pytest.mark.parametrize("compiled", [True, False])
def test_the_time_of_a_first_step_that_compiles_is_told_once(compiled: bool, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    state = SimpleNamespace(dist=SimpleNamespace(is_main=True), step=0, total_steps=9, compiled=compiled, record=None)
    progress = hooks.Progress(tmp_path)
    with caplog.at_level(logging.INFO, "fastssl"):
        progress.start(state)
        for _ in range(2):
            progress.after_step(state)
    progress.close()
    assert [("first step after" in m, m.endswith("/somewhere")) for m in caplog.messages] == [(True, True)] * compiled
