"""A detection data set of a few small images, in COCO's and in VOC's form, and presets with detectors that are small."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eval.detection.presets import DETECTION_PRESETS, DetectionPreset
from fastssl.distributed import Dist
from fastssl.models.backbones import build_backbone

SIZES = ((60, 90), (90, 60), (70, 80), (64, 96))
"""Height and width of each split's images."""
VOC_NAMES = ("cat", "dog")
ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


def write_detection_data(root: Path, seed: int = 0) -> Path:
    """root/{train2017,val2017,annotations} and root/VOC2012: light rectangles of two colours on dark ground, one class each."""
    rng = np.random.default_rng(seed)
    voc = root / "VOC2012"
    for folder in ("annotations", "train2017", "val2017", *(f"VOC2012/{n}" for n in ("Annotations", "ImageSets/Main", "JPEGImages"))):
        (root / folder).mkdir(parents=True)
    for first, split, short in ((1, "train2017", "train"), (101, "val2017", "val")):
        images, annotations, names = [], [], []
        for number, (h, w) in enumerate(SIZES, first):
            levels = rng.integers(0, 60, (h, w, 3)).astype(np.uint8)
            boxes = [(4, 6, 4 + w // 3, 6 + h // 2), (w // 2, h // 4, w - 3, h - 5)]
            for label, (x0, y0, x1, y1) in enumerate(boxes):
                levels[y0:y1, x0:x1, label] = 230
                polygon = [x0, y0, x1, y0, x1, y1, x0, y1]
                area = (x1 - x0) * (y1 - y0)
                about = {"id": 10 * number + label, "image_id": number, "category_id": (7, 3)[label], "iscrowd": 0, "area": area}
                annotations.append(about | {"bbox": [x0, y0, x1 - x0, y1 - y0], "segmentation": [polygon]})
            name = f"{number:06d}.jpg"
            for path in (root / split / name, voc / "JPEGImages" / name):
                Image.fromarray(levels).save(path, quality=95)
            images.append({"id": number, "file_name": name, "height": h, "width": w})
            (voc / "Annotations" / f"{number:06d}.xml").write_text(xml(h, w, boxes))
            names.append(f"{number:06d}")
        (voc / "ImageSets" / "Main" / f"{short}.txt").write_text("\n".join(names) + "\n")
        categories = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def xml(height: int, width: int, boxes) -> str:
    """VOC's file; its pixels count from 1, both ends inside."""
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax>"
        f"<ymax>{y1}</ymax></bndbox></object>"
        for name, (x0, y0, x1, y1) in zip(VOC_NAMES, boxes, strict=True)
    )
    return f"<annotation><size><width>{width}</width><height>{height}</height><depth>3</depth></size>{objects}</annotation>"


def small(name: str = "coco_c4_mini", iterations: int = 2) -> DetectionPreset:
    preset = DETECTION_PRESETS[name]
    tiny = {"rpn_pre_nms_train": 20, "rpn_pre_nms_test": 20, "rpn_post_nms_train": 20, "rpn_post_nms_test": 5, "roi_batch": 8}
    detector = replace(preset.detector, arch="resnet18", score_threshold=0.0, detections=5, **tiny)
    return replace(preset, detector=detector, train_sides=(48, 64), test_side=64, precise_bn=1).of_iterations(iterations)


def backbone_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_backbone("resnet18").state_dict()
