"""End-to-end evaluations on two processes: without BatchNorm and mixing, the same training as on one."""

import pytest
import torch

from eval.tuning_command import measure
from eval.tuning_protocols import TUNING_PROTOCOLS, changed
from fastssl.distributed import Dist
from fastssl.models.backbones import build_backbone
from fastssl.models.vit import ViT
from tests.ranks import run_ranks


def evaluated(rank: int, world: int, name: str, data: str) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    backbone = build_backbone("resnet18") if name == "resnet" else ViT(24, 2, 2, 8, image_size=32)
    small = {"subset": "random:8", "epochs": 2, "batch": 10, "crop": 32, "resize": 36}
    protocol = changed(TUNING_PROTOCOLS["semi/sfrik-10pct"], **small)
    dist = Dist(rank, world, rank, world, torch.device("cpu"))
    return measure(backbone, data, protocol, dist=dist, quiet=True, workers=1)


@pytest.mark.slow
def test_two_processes_train_as_one(class_folders):
    alone = evaluated(0, 1, "vit", str(class_folders))
    first, second = run_ranks(2, evaluated, "vit", str(class_folders))
    assert first == second
    losses = [[r["loss"] for r in result["curve"]] for result in (alone, first)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert first["num_val"] == alone["num_val"] == 12


@pytest.mark.slow
def test_ranks_agree_with_batchnorm(class_folders):
    """Each has its own statistics while training; all are measured with those of the first."""
    first, second = run_ranks(2, evaluated, "resnet", str(class_folders))
    assert first == second
