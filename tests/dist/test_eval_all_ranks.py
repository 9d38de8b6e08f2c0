"""The table of all evaluations on one and on two processes, and a full disk that only rank 0 meets."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.results import together
from fastssl.config import ConfigError
from fastssl.distributed import Dist
from tests.conftest import environment
from tests.ranks import run_ranks

FROZEN = ("knn", "logreg", "linear")
FLAGS = ("--checkpoint", "random:resnet18:1", "--epochs", "2", "--crop", "32", "--resize", "36", "--workers", "1")


@pytest.fixture(scope="module")
def hard_classes(tmp_path_factory) -> Path:
    """Two classes that a random network tells apart now and then: noise, one of them a little redder.  128 and 60 images."""
    root, rng = tmp_path_factory.mktemp("hard"), np.random.default_rng(0)
    for split, count in (("train", 64), ("val", 30)):
        for c in range(2):
            folder = root / split / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(count):
                small = rng.integers(0, 160, (6, 6, 3)) + np.array([25 * c, 0, 0])
                Image.fromarray(small.astype(np.uint8)).resize((48, 40), Image.BICUBIC).save(folder / f"{i:03d}.jpg", quality=92)
    return root


@pytest.mark.slow
def test_frozen_protocols_do_not_depend_on_the_number_of_processes(hard_classes, tmp_path):
    tables = {}
    for ranks in (1, 2):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
        command = [sys.executable, *launcher, "-m", "eval.all", *FLAGS, "--data", str(hard_classes), "--out", str(tmp_path / str(ranks))]
        done = subprocess.run([*command, "--only", *FROZEN], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        tables[ranks] = json.loads((tmp_path / str(ranks) / "all.json").read_text())["rows"]
    for one, two in zip(*tables.values(), strict=True):
        names = ("protocol", "setting", "top1", "top5", "per_class")
        assert [one[n] for n in names] == [two[n] for n in names]
        assert (
            one["per_class"] == ""
            or json.loads((tmp_path / "1" / one["per_class"]).read_text())["per_class"]
            == (json.loads((tmp_path / "2" / one["per_class"]).read_text())["per_class"])
        )
    assert len({row["top1"] for row in tables[1] if row["top1"] not in (None, 50.0, 100.0)}) > 3, "numbers that could differ"


def full_disk(rank: int, world: int, folder: str) -> str:
    dist = Dist(rank, world, rank, world, torch.device("cpu"))
    try:
        with together(dist, Path(folder) / "r.json"):
            if dist.is_main:
                raise OSError(28, "No space left on device")
    except ConfigError as error:
        return str(error)
    return "went on"


@pytest.mark.slow
def test_a_full_disk_stops_every_rank(tmp_path):
    said = run_ranks(2, full_disk, str(tmp_path))
    assert said[0] == said[1] and "No space left on device" in said[0]
