"""Average precision on PASCAL VOC by Detectron2's evaluator, which published transfer numbers use (methods/transfer.md section 4.2).

Not COCO's: boxes are VOC's, whose coordinates are whole pixels counted from 1, both ends inside; a box counts where its IoU is above the
threshold, not at it.  Scores are rounded to 3 decimals and coordinates to 1: part of the protocol, it makes ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eval.detection.annotations import DetectionSet
from eval.detection.results import Found

THRESHOLDS = np.arange(50, 100, 5) / 100
RECALLS = np.arange(0, 1.1, 0.1)


class Matches(NamedTuple):
    """Detections of one class, in falling order of their scores; equal scores stay in the order they came."""

    overlap: np.ndarray
    """float64 [d]: IoU with the object of the same image that it is largest with; -1 where the image has none."""
    row: np.ndarray
    """int64 [d]: which object that is, -1 for none."""


def matched(objects: np.ndarray, detections: np.ndarray) -> Matches:
    """objects [g, 6]: image, x0, y0, x1, y1, difficult.  detections [d, 6]: image, score, x0, y0, x1, y1."""
    detections = detections[np.argsort(-detections[:, 1], kind="stable")]
    overlap, row = np.full(len(detections), -1.0), np.full(len(detections), -1)
    by_image = np.argsort(detections[:, 0], kind="stable")
    for part in np.split(by_image, np.flatnonzero(np.diff(detections[by_image, 0])) + 1):
        there = np.flatnonzero(objects[:, 0] == detections[part[0], 0]) if len(part) else part
        if len(there):
            iou = _iou(detections[part, 2:], objects[there, 1:5])
            overlap[part], row[part] = iou.max(1), there[iou.argmax(1)]
    return Matches(overlap, row)


def _iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, 4], [m, 4] with both ends inside -> [n, m]."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    common = np.maximum(high - low + 1, 0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2] + 1).prod(1) for boxes in (a, b)]
    return common / (areas[0][:, None] + areas[1][None] - common)


def recall_precision(difficult: np.ndarray, matches: Matches, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """difficult: bool [g] of all objects -> float64 [d] each, after every detection.

    The first detection of an object is right, later ones are wrong; those of a difficult object count as neither.
    """
    found = matches.overlap > threshold
    ignored = np.zeros(len(found), bool)
    ignored[found] = difficult[matches.row[found]]
    candidates = np.flatnonzero(found & ~ignored)
    right = np.zeros(len(found))
    right[candidates[np.unique(matches.row[candidates], return_index=True)[1]]] = 1
    wrong = 1 - right - ignored
    right, wrong = right.cumsum(), wrong.cumsum()
    return right / max((~difficult).sum(), 1), right / np.maximum(right + wrong, np.finfo(np.float64).eps)


def average_precision(recall: np.ndarray, precision: np.ndarray, *, eleven_points: bool) -> float:
    """VOC 2007's mean over eleven recalls of the highest precision from there on; later years': the area below that envelope."""
    if eleven_points:
        return sum(precision[recall >= r].max(initial=0.0) for r in RECALLS) / 11
    recall = np.concatenate(([0.0], recall, [1.0]))
    envelope = np.maximum.accumulate(np.concatenate(([0.0], precision, [0.0]))[::-1])[::-1]
    return float((np.diff(recall) * envelope[1:]).sum())


def voc_ap(data: DetectionSet, found: Sequence[Found], *, eleven_points: bool) -> dict:
    """AP, AP50 and AP75 in percent, per_class AP, and classes_with_objects, the number of classes they are means over.

    found   in each image of `data`

    Classes without an object that is not difficult take no part in the means: Detectron2's count as 0, which no complete VOC set has.
    """
    objects = np.array(
        [(i, o.label, *(o.box + (1, 1, 0, 0)), o.difficult) for i, photo in enumerate(data.photos) for o in photo.objects]
    ).reshape(-1, 7)
    detections = np.array(
        [
            (i, label, round(score, 3), round(x0 + 1, 1), round(y0 + 1, 1), round(x1, 1), round(y1, 1))
            for i, here in enumerate(found)
            for label, score, (x0, y0, x1, y1) in zip(here.labels.tolist(), here.scores.tolist(), here.boxes.tolist(), strict=True)
        ]
    ).reshape(-1, 7)
    table = {}
    for label, name in enumerate(data.classes):
        of_class = np.delete(objects[objects[:, 1] == label], 1, axis=1)
        difficult = of_class[:, 5].astype(bool)
        if difficult.all():
            continue
        matches = matched(of_class, np.delete(detections[detections[:, 1] == label], 1, axis=1))
        curves = [recall_precision(difficult, matches, t) for t in THRESHOLDS]
        table[name] = [100 * average_precision(*curve, eleven_points=eleven_points) for curve in curves]
    means = np.mean(list(table.values()), axis=0) if table else np.zeros(len(THRESHOLDS))
    statistics = {"AP": float(means.mean()), "AP50": float(means[0]), "AP75": float(means[5])}
    return statistics | {"per_class": {name: float(np.mean(row)) for name, row in table.items()}, "classes_with_objects": len(table)}
