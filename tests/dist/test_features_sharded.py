"""Kept features and what is measured on them: two processes give the files and the numbers of one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import environment

FLAGS = (
    "--checkpoint",
    "random:resnet18:1",
    "--forward",
    "4",
    "--workers",
    "1",
    "--resize",
    "36",
    "--crop",
    "32",
    "--loader",
    "torchvision",
)


def run(module: str, ranks: int, *flags: str) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
    done = subprocess.run([sys.executable, *launcher, "-m", module, *FLAGS, *flags], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_give_what_one_gives(beton_data: Path, tmp_path: Path):
    for ranks in (1, 2):
        data = ("--data", str(beton_data), "--features", str(tmp_path / f"{ranks}"))
        run("eval.logreg", ranks, *data, "--epochs", "3", "--out", str(tmp_path / f"logreg{ranks}.json"))
        run("eval.knn", ranks, *data, "--k", "1", "5", "--out", str(tmp_path / f"knn{ranks}.json"))
    for part in ("train", "val"):
        for kind in ("features", "labels", "index"):
            one, two = (np.load(tmp_path / f"{ranks}/{part}.{kind}.npy") for ranks in (1, 2))
            # a batch of another size may round differently
            np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5, err_msg=f"{part} {kind}")
        assert sorted(p.name for p in (tmp_path / "2").glob(f"{part}.*")) == sorted(p.name for p in (tmp_path / "1").glob(f"{part}.*"))
    for name in ("logreg", "knn"):
        one, two = (json.loads((tmp_path / f"{name}{ranks}.json").read_text()) for ranks in (1, 2))
        for key in one.keys() - {"features", "loss_last"}:
            assert two[key] == one[key], key
    assert one["knn1_top1"] > 0
