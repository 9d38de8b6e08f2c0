"""Segmentation on CUDA: the losses and label maps of the CPU, and mixed precision near them."""

import pytest
import torch
from timm.layers import DropPath

from eval.segmentation.datasets import open_annotated
from eval.segmentation.protocols import SEGMENTATION_PROTOCOLS, changed
from eval.segmentation.training import Segmentation
from fastssl.distributed import Dist
from fastssl.models.backbones import build_backbone
from fastssl.models.vit import ViT
from tests.segments import write_voc

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("voc/fcn-a", torch.float32, 1e-2), ("ade20k/upernet-vits", torch.float32, 1e-2), ("ade20k/upernet-vits", torch.float16, 3e-2)],
)
def test_a_step_is_that_of_the_cpu(name, dtype, tolerance, tmp_path):
    data = open_annotated(str(write_voc(tmp_path / "voc")), "voc")
    protocol = changed(SEGMENTATION_PROTOCOLS[name], steps=2, batch=4, crop=64)
    losses, maps = [], []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        backbone = build_backbone("resnet18") if name.startswith("voc") else ViT(24, 6, 2, 8, image_size=64)
        dist = Dist(0, 1, 0, 1, torch.device(device))
        run = Segmentation(backbone, protocol, data, dist, dtype if device == "cuda" else torch.float32, workers=1)
        run.model.train()
        for module in run.model.modules():
            if isinstance(module, torch.nn.Dropout2d | DropPath):  # each device draws its own
                module.eval()
        losses.append(run.step(*next(run.batches.from_step(0)), 0).cpu())
        run.model.eval()
        maps.append(next(run.predicted(range(1)))[2].cpu())
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=0)
    assert (maps[0] == maps[1]).float().mean() > 0.9
