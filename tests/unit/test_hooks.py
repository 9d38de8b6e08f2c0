"""Hooks apart from runs."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import train
from fastssl import hooks
from fastssl.distributed import Dist
from fastssl.metrics import Metrics, RunLog, read_jsonl
from fastssl.presets import PRESETS


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
    state.metrics, restarted = Metrics(), []
    monkeypatch.setattr(state.metrics, "restart_clock", lambda: restarted.append(True))
    progress = hooks.Progress(tmp_path)
    with caplog.at_level(logging.INFO, "fastssl"):
        progress.start(state)
        for _ in range(2):
            progress.after_step(state)
    progress.close()
    assert [("first step after" in m, m.endswith("/somewhere")) for m in caplog.messages] == [(True, True)] * compiled
    assert restarted == [True] * compiled  # rates and the remaining time leave it out


@pytest.mark.parametrize(
    ("dtype", "step", "skipped", "warned"),
    [
        (torch.bfloat16, 50, 1, True),
        (torch.bfloat16, 50, 0, False),
        (torch.float16, 50, 16, False),  # the first scale is looked for
        (torch.float16, 50, 17, True),
        (torch.float16, 100, 1, False),  # a larger scale was tried
        (torch.float16, 100, 2, True),
    ],
)
def test_more_skipped_steps_than_normal_are_told(dtype: torch.dtype, step: int, skipped: int, warned: bool, tmp_path, caplog):
    """Those from before a restart were told before it."""
    metrics = Metrics()
    metrics.load_state_dict({"sums": {}, "steps": 0, "skipped": torch.tensor(100.0), "bad_run": torch.tensor(0.0)}, torch.device("cpu"))
    state = SimpleNamespace(step=step, dtype=dtype, metrics=metrics, dist=SimpleNamespace(is_main=True), cfg=PRESETS["byol_mini"]())
    hook = hooks.NonFinite(tmp_path, max_bad_steps=20)
    hook.start(state)
    state.cfg = replace(state.cfg, log=replace(state.cfg.log, every_steps=50))
    state.record = {"train/skipped_steps": 100.0 + skipped, "train/bad_run": 0.0}
    hook.after_step(state)
    assert [r.levelname for r in caplog.records] == ["WARNING"] * warned


@pytest.mark.parametrize(("from_step", "expected"), [(0, [(0, 7.0), (2, 8.0)]), (2, [(0, 1.0), (2, 2.0), (4, 8.0)])])
def test_a_used_folder_shows_one_run(from_step: int, expected: list[tuple[int, float]], tmp_path):
    """In metrics.jsonl and as TensorBoard reads its files: what the interrupted run wrote after `from_step` is gone."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = [(0, 1.0), (2, 2.0), (4, 3.0)]
    for start, lines in ((0, first), (from_step, [line for line in expected if line not in first])):
        runlog = RunLog(tmp_path, from_step=start)
        for step, value in lines:
            runlog.write({"step": step, "eval/top1": value})
        runlog.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("eval/top1")] == expected
    assert [(r["step"], r["eval/top1"]) for r in read_jsonl(tmp_path / "metrics.jsonl")] == expected


def test_online_knn_reads_with_the_decoder_threads_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "has_split", lambda path, split: True)
    cfg = PRESETS["byol_mini"]()
    cfg = replace(cfg, eval=replace(cfg.eval, knn_every_epochs=1), efficiency=replace(cfg.efficiency, workers=3))
    chosen = train.build_hooks(cfg, Dist(0, 1, 0, 1, torch.device("cpu")), tmp_path, torch.float32, labelled=True)
    (online,) = (hook for hook in chosen if isinstance(hook, hooks.OnlineEvaluation))
    assert online.evaluate.keywords["workers"] == 3
