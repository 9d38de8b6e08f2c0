"""Segmentation on two processes: synchronised BatchNorm, losses over all ranks' pixels, every validation image counted once."""

from dataclasses import replace

import pytest
import torch

from eval.segmentation import training
from eval.segmentation.__main__ import measure
from eval.segmentation.datasets import open_annotated
from eval.segmentation.protocols import SEGMENTATION_PROTOCOLS, changed
from fastssl.distributed import Dist
from fastssl.models.backbones import build_backbone
from fastssl.models.vit import ViT
from tests.ranks import run_ranks
from tests.segments import write_imagenets, write_voc


def evaluated(rank: int, world: int, name: str, folder: str) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    training.SHOWN = 1
    fcn = name.startswith("voc")
    backbone = build_backbone("resnet18") if fcn else ViT(24, 2, 2, 8, image_size=32)
    protocol = changed(SEGMENTATION_PROTOCOLS[name], batch=4, crop=32, lr=0.001, **({"steps": 3} if fcn else {"epochs": 3}))
    data = open_annotated(folder, protocol.data)
    dist = Dist(rank, world, rank, world, torch.device("cpu"))
    # ranks draw what to drop by themselves
    result = measure(backbone, data, replace(protocol, drop_path=0.0), dist=dist, workers=1, quiet=True)
    return {key: value for key, value in result.items() if key != "processes"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "write"), [("voc/fcn-b", write_voc), ("imagenets/sere", write_imagenets)])
def test_two_processes_train_and_measure_as_one(name, write, tmp_path):
    folder = str(write(tmp_path / "data"))
    alone = evaluated(0, 1, name, folder)
    first, second = run_ranks(2, evaluated, name, folder)
    assert first == second
    assert [r["loss"] for r in first["curve"]] == pytest.approx([r["loss"] for r in alone["curve"]], rel=1e-3)
    assert first["mIoU"] == pytest.approx(alone["mIoU"], abs=0.5)
    assert first["num_val"] == alone["num_val"] == 3
