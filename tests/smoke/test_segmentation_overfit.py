"""That images, labels, loss, upsampling and scores belong together: a segmenter learns a few photographs by heart."""

import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.segmentation.__main__ import measure
from eval.segmentation.datasets import open_annotated
from eval.segmentation.protocols import SEGMENTATION_PROTOCOLS, changed
from fastssl.distributed import Dist
from fastssl.models.backbones import build_backbone

IMAGES = (2, 11, 15, 28)
"""Of the training list: a motorbike, two persons and a cat, large enough for maps of every eighth pixel: labels that small, enlarged
again, have an mIoU of 90."""


@pytest.mark.slow
def test_fcn_learns_four_images_by_heart(tmp_path):
    """The FCN of voc/fcn-a on a dilated ResNet-18, without random sizes and colours, measured on its training images."""
    archive = Path(os.environ.get("FASTSSL_DATA", "")) / "voc_mini.tar"
    if not archive.is_file():
        pytest.skip("FASTSSL_DATA has no voc_mini.tar")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    data = open_annotated(str(tmp_path / "VOCdevkit"), "voc")
    pairs = [data.train[i] for i in IMAGES]
    few = replace(data, train=pairs, val=pairs)
    protocol = changed(SEGMENTATION_PROTOCOLS["voc/fcn-a"], steps=150, batch=4, crop=80)
    protocol = replace(protocol, scale=(1.0, 1.0), colours="none", largest_share=1.0)
    torch.manual_seed(0)
    result = measure(build_backbone("resnet18"), few, protocol, dist=Dist(0, 1, 0, 1, torch.device("cpu")), workers=1)
    assert result["mIoU"] > 80
