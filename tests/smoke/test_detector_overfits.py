"""Mask R-CNN with a pyramid learns four photographs by heart: targets, losses, decoding and pasting belong together."""

from __future__ import annotations

import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.detection.annotations import DetectionSet, Photo
from eval.detection.coco import read_coco
from eval.detection.data import sample
from eval.detection.model import Detector
from eval.detection.precise_bn import precise_bn
from eval.detection.presets import DETECTION_PRESETS
from eval.detection.results import coco_ap, detect
from eval.detection.training import Training
from fastssl.distributed import Dist

ITERATIONS = 200
SIDE = 96
"""Pixels of the shorter side: an iteration takes two seconds of one core."""


def smallest_share(photo: Photo) -> float:
    """Of the image, that an object's box has."""
    return min((o.box[2:] - o.box[:2]).prod() for o in photo.objects) / (photo.height * photo.width)


def four_photos(folder: Path) -> DetectionSet:
    """Those of several objects that are still to be seen at SIDE pixels, and their part of the annotation file."""
    archive = Path(os.environ.get("FASTSSL_DATA", "")) / "coco_mini.tar"
    if not archive.is_file():
        pytest.skip("FASTSSL_DATA has no coco_mini.tar")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    data = read_coco(folder / "coco_mini", "train2017")
    photos = [p for p in data.learnable(masks=True) if len(p.objects) > 1]
    photos = sorted(photos, key=smallest_share)[-4:]
    names = {p.name for p in photos}
    part = {
        "images": [i for i in data.dataset["images"] if i["id"] in names],
        "annotations": [a for a in data.dataset["annotations"] if a["image_id"] in names],
    }
    return replace(data, photos=photos, dataset=data.dataset | part)


@pytest.mark.slow
def test_four_photographs(tmp_path: Path):
    data = four_photos(tmp_path)
    alone = Dist(0, 1, 0, 1, torch.device("cpu"))
    preset = DETECTION_PRESETS["coco_fpn_mini"].of_iterations(ITERATIONS)
    detector = Detector(replace(preset.detector, arch="resnet18", roi_batch=16, rpn_post_nms_train=200, rpn_post_nms_test=100))
    training = Training(detector, preset, None, alone)
    samples = [sample(p, side=SIDE, longest=preset.longest, masks=True) for p in data.photos]
    for training.iteration in range(ITERATIONS):
        losses = training.step(samples)
        if training.iteration % 20 == 0:
            print(training.iteration, {name: round(float(loss), 3) for name, loss in losses.items()}, flush=True)
    precise_bn(detector, [training._inputs(samples)])
    found = detect(detector, data.photos, side=SIDE, longest=preset.longest, dist=alone, threads=1)
    scores = coco_ap(data, found, masks=True)
    print({kind: scores[kind]["AP50"] for kind in scores})
    assert scores["box"]["AP50"] > 80
    assert scores["mask"]["AP50"] > 70
