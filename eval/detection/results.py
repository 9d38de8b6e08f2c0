"""What a detector finds in images, and what COCO's evaluator says of it (methods/transfer.md section 4.1)."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from eval.detection.annotations import DetectionSet, Photo
from eval.detection.data import Sample, ahead, normalised, sample
from eval.detection.model import Detector, postprocess
from fastssl.distributed import Dist

STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""The first six of COCO's twelve: over sizes, and at IoU 0.5 and 0.75."""


@dataclass(frozen=True)
class Found:
    """In one image, in its own pixels, best first."""

    boxes: np.ndarray
    """float64 [n, 4]: x0, y0, x1, y1."""
    scores: np.ndarray
    """float64 [n]."""
    labels: np.ndarray
    """int64 [n]."""
    masks: list[dict] | None = None
    """Of each, pycocotools' compressed RLE."""


@torch.no_grad()
def detect(detector: Detector, photos: Sequence[Photo], *, side: int, longest: int, dist: Dist, threads: int) -> list[Found]:
    """What is found in each of the photos, on every rank.  Each rank looks at its share of them, one at a time."""
    detector.eval()
    shares = [range(rank, len(photos), dist.world) for rank in range(dist.world)]
    mine = [photos[i] for i in shares[dist.rank]]
    samples = ahead(partial(sample, side=side, longest=longest), mine, threads=threads, depth=2 * threads)
    found = [_found(detector, photo, image, dist.device) for photo, image in zip(mine, samples, strict=True)]
    every: list[Found | None] = [None] * len(photos)
    for share, part in zip(shares, dist.gather_objects(found), strict=True):
        every[share.start :: dist.world] = part
    return every


def _found(detector: Detector, photo: Photo, image: Sample, device: torch.device) -> Found:
    (detections,) = detector([normalised(image.pixels, device)])
    detections = postprocess(detections, tuple(image.pixels.shape[1:]), (photo.height, photo.width))
    masks = None
    if detections.masks is not None:
        masks = rle.encode(np.asfortranarray(detections.masks.permute(1, 2, 0).cpu().numpy().astype(np.uint8)))
    return Found(detections.boxes.double().cpu().numpy(), detections.scores.double().cpu().numpy(), detections.classes.cpu().numpy(), masks)


# ------------------------------------------------------------------------------------------------ COCO's evaluator


def coco_ap(data: DetectionSet, found: Sequence[Found], *, masks: bool) -> dict[str, dict]:
    """{"box": ..., "mask": ...}: STATISTICS in percent, None where no object is of the size, and per_class AP of classes with objects.

    The images count all, also those without an object.  Data without COCO's annotation file are brought into its form.
    """
    truth = COCO()
    truth.dataset = numbered(data.dataset or as_coco(data))
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    kinds = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}
    return {name: _statistics(truth, _results(data, found, kind), kind, data) for name, kind in kinds.items()}


def numbered(dataset: dict) -> dict:
    """The annotations numbered from 1: pycocotools knows them by their ids, and takes a match with the id 0 for none."""
    return dataset | {"annotations": [a | {"id": number} for number, a in enumerate(dataset["annotations"], 1)]}


def _results(data: DetectionSet, found: Sequence[Found], kind: str) -> list[dict]:
    """COCO's result list.  Masks come without boxes, else their sizes would be those of the boxes."""
    results = []
    for photo, here in zip(data.photos, found, strict=True):
        for i, (x0, y0, x1, y1) in enumerate(here.boxes.tolist()):
            one = {"image_id": photo.name, "category_id": data.category_ids[here.labels[i]], "score": float(here.scores[i])}
            results.append(one | ({"bbox": [x0, y0, x1 - x0, y1 - y0]} if kind == "bbox" else {"segmentation": here.masks[i]}))
    return results


def _statistics(truth: COCO, results: list[dict], kind: str, data: DetectionSet) -> dict:
    if not results:  # pycocotools cannot load none
        return dict.fromkeys(STATISTICS, 0.0) | {"per_class": {}}
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats = {n: None if s < 0 else 100 * float(s) for n, s in zip(STATISTICS, evaluation.stats, strict=False)}
    of_class = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all sizes, 100 detections
    per_class = {name: 100 * float(p.mean()) for name, p in zip(data.classes, of_class.transpose(2, 0, 1), strict=True) if p.min() >= 0}
    return stats | {"per_class": per_class}


def as_coco(data: DetectionSet) -> dict:
    """COCO's annotation file of data that have none; difficult objects become crowds, which are neither right nor wrong."""
    images = [{"id": p.name, "height": p.height, "width": p.width} for p in data.photos]
    annotations = []
    for photo in data.photos:
        for o in photo.objects:
            x0, y0, x1, y1 = o.box.tolist()
            about = {"id": len(annotations) + 1, "image_id": photo.name, "category_id": data.category_ids[o.label]}
            shape = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0), "iscrowd": int(o.difficult)}
            annotations.append(about | shape)
    categories = [{"id": number, "name": name} for number, name in zip(data.category_ids, data.classes, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}
