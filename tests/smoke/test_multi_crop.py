"""SFRIK's multi-crop modes as a user runs them: two ranks, from .beton, a subset, a smaller last batch kept."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from fastssl.metrics import read_jsonl
from tests.conftest import run_train

SMALL = (
    *("--method.mlp", "32-48", "--train.global-batch-size", "14", "--train.epochs", "2", "--optim.warmup-epochs", "1"),
    *("--log.every-steps", "1", "--efficiency.dtype", "fp32", "--eval.resize", "32", "--eval.crop", "32", "--data.subset", "first:12"),
)
SIZES = {
    "sfrik_r18_100ep_in20_obow": (32, 32, 32, 48),  # the original, two crops, the crop that patches are cut from
    "sfrik_r18_100ep_in20_swav": (32, 32, *6 * (16,)),
}
OPTIONS = {
    "sfrik_r18_100ep_in20_obow": ("--views.0.crop.resize", "36", "--views.3.crop.patch-size", "16"),
    "sfrik_r18_100ep_in20_swav": (),
}


@pytest.mark.slow
@pytest.mark.parametrize("preset", SIZES)
def test_two_ranks(preset: str, beton_data: Path, tmp_path: Path):
    sizes = [flag for v, size in enumerate(SIZES[preset]) for flag in (f"--views.{v}.crop.size", str(size))]
    done = run_train("--preset", preset, *SMALL, *sizes, *OPTIONS[preset], "--data.path", str(beton_data), cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    records = [r for r in read_jsonl(tmp_path / "runs" / preset / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in records] == list(range(1, 7))  # 36 images: 14 + 14 + 8, twice
    assert all(math.isfinite(r[f"train/{name}"]) for r in records for name in ("loss", "align", "mmd"))
