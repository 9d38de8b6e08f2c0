"""Data and processes that several tests share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    # Before anything imports Triton: without a GPU its kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).parent.parent


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def write_class_folders(root: Path, *, classes: int, per_class: int, seed: int = 0) -> Path:
    """root/train and root/val: smooth random JPEGs of varied size; each class has a colour of its own."""
    rng = np.random.default_rng(seed)
    for split, n in (("train", per_class), ("val", max(2, per_class // 4))):
        for c in range(classes):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(n):
                h, w = rng.integers(40, 90, 2)
                small = rng.integers(0, 120, (6, 6, 3)) + np.array([120 * (c == k) for k in range(3)])
                Image.fromarray(small.astype(np.uint8)).resize((int(w), int(h)), Image.BICUBIC).save(folder / f"{i:03d}.jpg", quality=92)
    return root


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory) -> Path:
    """3 classes, 48 training and 12 validation JPEGs."""
    return write_class_folders(tmp_path_factory.mktemp("folders"), classes=3, per_class=16)


@pytest.fixture(scope="session")
def beton_data(class_folders: Path, tmp_path_factory) -> Path:
    """A folder with train.beton and val.beton of `class_folders`."""
    from convert.imagenet import convert_folder

    out = tmp_path_factory.mktemp("beton")
    classes = sorted(p.name for p in (class_folders / "train").iterdir())
    for split in ("train", "val"):
        convert_folder(class_folders / split, out / f"{split}.beton", classes=classes, workers=1, progress=False)
    return out


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


# Small enough for a step in a fraction of a second.
_SMALL = (
    *("--views.0.crop.size", "32", "--views.1.crop.size", "32", "--train.global-batch-size", "12", "--method.hidden", "32"),
    *("--log.every-steps", "1", "--efficiency.dtype", "fp32", "--optim.warmup-epochs", "1"),
)
SMALL = (*_SMALL, "--method.dim", "16")
"""For byol_mini, lewel_mini and mocov3_mini."""
SMALL_QUEUE = (*SMALL, "--method.queue-size", "24")
"""For mocov2_mini."""
SMALL_MONTAGES = (*SMALL, "--views.2.crop.size", "32", "--views.3.crop.size", "32")
"""For w2ssl_mini."""
SMALL_MULTI_CROP = (
    *(*_SMALL, "--method.out-dim", "24", "--method.bottleneck", "16"),
    *(flag for v in range(2, 6) for flag in (f"--views.{v}.crop.size", "16")),
)
"""For the mini presets of DINO and SCFS."""


def train_command(*args: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *launcher, str(ROOT / "train.py"), *args]


def run_train(*args: str, cwd: Path, ranks: int = 1, timeout: float = 240) -> subprocess.CompletedProcess:
    return subprocess.run(
        train_command(*args, ranks=ranks), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
