"""Training without labels, in chunks, with the last batch kept; what needs labels says so before it works."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch

import train
from eval.features import extract
from eval.knn import evaluate
from fastssl import cli
from fastssl.augment.augmenter import Augmenter
from fastssl.distributed import Dist
from fastssl.metrics import read_jsonl
from fastssl.models.backbones import build_backbone
from fastssl.recipes import center_crop
from loaders.beton import Beton, BetonWriter
from loaders.build import build_eval_loader
from loaders.errors import DataError
from tests.conftest import SMALL, run_train

ALONE = Dist(rank=0, world=1, local_rank=0, local_world=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def unlabelled(beton_data: Path, tmp_path_factory) -> Path:
    """train.beton and val.beton with the images of `beton_data` and no labels: 48 and 12."""
    folder = tmp_path_factory.mktemp("unlabelled")
    for split in ("train", "val"):
        source = Beton.open(beton_data / f"{split}.beton")
        with BetonWriter(folder / f"{split}.beton", len(source), labels=False) as writer:
            for i in range(len(source)):
                writer.append(source.sample(i).tobytes(), int(source.mode[i]), int(source.height[i]), int(source.width[i]))
            writer.finish(source.names)
    return folder


@pytest.mark.slow
def test_training(unlabelled: Path, tmp_path: Path, caplog):
    flags = ("--data.path", unlabelled, "--data.order", "chunks", "--data.last-batch", "keep", "--train.global-batch-size", "14")
    settings = ("--train.epochs", "2", "--train.accumulation-steps", "2", "--log.dir", tmp_path)
    cfg, _ = cli.parse_cli(["--preset", "byol_mini", *SMALL, *map(str, (*flags, *settings))])
    with caplog.at_level(logging.INFO):
        state = train.train(cfg, ALONE)
    assert "no online k-NN: it needs labels" in caplog.text
    records = read_jsonl(tmp_path / "byol_mini/metrics.jsonl")
    assert [r["step"] for r in records] == list(range(1, 9))  # 48 images: 14 + 14 + 14 + 6
    assert state.steps_per_epoch == 4 and len(state.images) == 3 and state.images.label is None
    assert (tmp_path / "byol_mini/views.png").exists() and (tmp_path / "byol_mini/curves.png").exists()


def test_evaluation(unlabelled: Path):
    backbone = build_backbone("resnet18").eval()
    with pytest.raises(DataError, match="train split of .* has no labels, and k-NN needs them"):
        evaluate(backbone, str(unlabelled), dist=ALONE, resize=32, crop=32, forward=4, workers=1)
    spec = center_crop(size=32, resize=36)
    loader = build_eval_loader(str(unlabelled), "val", spec, dist=ALONE, batch=5, workers=1)
    bank = extract(backbone, loader, Augmenter(spec, device="cpu", dtype=torch.float32, seed=0), torch.float32, count=loader.num_samples)
    assert bank.labels is None and bank[3:7].labels is None
    assert bank.features.shape == (12, 512) and bank.index.tolist() == list(range(12))


@pytest.mark.slow
def test_two_ranks_share_a_kept_last_batch(beton_data: Path, tmp_path: Path):
    flags = ("--data.path", str(beton_data), "--data.last-batch", "keep", "--data.subset", "random:13", "--train.global-batch-size", "16")
    settings = ("--train.epochs", "3", "--eval.knn-every-epochs", "3", "--log.pictures", "False")
    done = run_train("--preset", "byol_mini", *SMALL, *flags, *settings, cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    records = read_jsonl(tmp_path / "runs/byol_mini/metrics.jsonl")
    losses = [r["train/loss"] for r in records if "train/loss" in r]
    assert len(losses) == 9 and all(map(math.isfinite, losses))  # 39 images an epoch: 16 + 16 + 7, which becomes 8
