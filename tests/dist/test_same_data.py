"""Ranks that would train on different data say so, every one of them."""

from pathlib import Path

import pytest
import torch

from fastssl.distributed import Dist
from fastssl.recipes import center_crop
from loaders.build import build_eval_loader
from loaders.errors import DataError
from tests.loaders.stored import samples, train_loader, write
from tests.ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities:DeprecationWarning")


def opened(rank: int, world: int, folders: list[str]) -> list[str]:
    dist, told = Dist(rank, world, rank, world, torch.device("cpu")), []
    folder = Path(folders[rank])
    for build in (
        lambda: train_loader(folder, dist=dist, batch=2, workers=1),
        lambda: build_eval_loader(str(folder), "val", center_crop(size=32, resize=36), dist=dist, batch=2, workers=1),
    ):
        try:
            told.append(build().digest)
        except DataError as error:
            told.append(str(error))
    return told


def test_an_old_copy_on_one_machine_is_noticed(tmp_path):
    stored = samples(raw=False, count=12)
    for name, train in (("a", stored), ("b", stored), ("old", stored[:11])):
        write(tmp_path / name / "train.beton", train)
        write(tmp_path / name / "val.beton", stored if name != "old" else [*stored[:4], stored[11], *stored[5:]])
    a, b, old = (str(tmp_path / name) for name in ("a", "b", "old"))
    same = run_ranks(2, opened, [a, b])
    assert same[0] == same[1] and len(set(same[0])) == 1 and len(same[0][0]) == 16
    for rank, (train, val) in enumerate(run_ranks(2, opened, [a, old])):
        assert f"{(a, old)[rank]}/train.beton is not the same for all ranks" in train and "Copy the data" in train
        assert "rank 0 has 12 images, and these have others: 1 (11 images)" in train
        assert "rank 0 has 12 images, and these have others: 1 (12 images)" in val
