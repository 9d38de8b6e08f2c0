"""Killed with SIGKILL in the middle of an epoch and resumed: the same losses as without the kill."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from fastssl.metrics import read_jsonl
from tests.conftest import SMALL, SMALL_MONTAGES, SMALL_MULTI_CROP, SMALL_QUEUE, environment, run_train, train_command
from tests.smoke.test_train import wait_for_step

STEPS_PER_EPOCH = 4


def losses(log: Path) -> dict[int, float]:
    return {r["step"]: r["train/loss"] for r in read_jsonl(log) if "train/loss" in r}


@pytest.mark.parametrize(
    ("preset", "ranks"),
    [
        pytest.param("lewel_mini", 1, marks=pytest.mark.slow),
        pytest.param("byol_mini", 2, marks=pytest.mark.slow),
        pytest.param("lewel_mini", 2, marks=pytest.mark.slow),
        pytest.param("dino_vit_mini", 2, marks=pytest.mark.slow),
        pytest.param("scfs_mini", 2, marks=pytest.mark.slow),
        pytest.param("ibot_mini", 2, marks=pytest.mark.slow),
        pytest.param("sere_mini", 2, marks=pytest.mark.slow),
        pytest.param("mocov2_mini", 2, marks=pytest.mark.slow),
        pytest.param("mocov3_mini", 2, marks=pytest.mark.slow),
        pytest.param("w2ssl_mini", 2, marks=pytest.mark.slow),
    ],
)
def test_losses_after_a_kill(preset: str, ranks: int, beton_data: Path, tmp_path: Path):
    special = {"byol_mini": SMALL, "lewel_mini": SMALL, "mocov3_mini": SMALL, "mocov2_mini": SMALL_QUEUE, "w2ssl_mini": SMALL_MONTAGES}
    small = special.get(preset, SMALL_MULTI_CROP)
    flags = (
        *("--preset", preset, *small, "--data.path", str(beton_data), "--train.epochs", "6", "--log.pictures", "False"),
        *("--eval.knn-every-epochs", "0"),
    )
    whole = run_train(*flags, "--log.name", "whole", cwd=tmp_path, ranks=ranks)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen(
        train_command(*flags, "--log.name", "killed", ranks=ranks),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log = tmp_path / "runs/killed/metrics.jsonl"
    wait_for_step(log, 2 * STEPS_PER_EPOCH + 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    saved = torch.load(log.parent / "checkpoint_last.pt", weights_only=True)["step"]
    assert saved % STEPS_PER_EPOCH == 0 and saved >= STEPS_PER_EPOCH
    resumed = run_train(*flags, "--log.name", "killed", "--train.resume", "auto", cwd=tmp_path, ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(log) == losses(tmp_path / "runs/whole/metrics.jsonl")
    assert list(losses(log)) == list(range(1, 6 * STEPS_PER_EPOCH + 1))
