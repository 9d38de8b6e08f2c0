"""Checks of the detection protocol's goldens: image sizes, learning rates and PASCAL VOC's average precision."""

from __future__ import annotations

import numpy as np

from eval.detection.voc_ap import THRESHOLDS, average_precision, matched, recall_precision
from eval.resize import inside_box, shortest_side
from eval.schedules import poly, warmup_step_decay
from tests.golden.kind import Arrays, Kind

LONGEST = 1333
SEGMENTATION_BOX = 2048, 512


def resize(arrays: Arrays) -> Arrays:
    """transfer/resize: sizes [n, 2] of Detectron2 for each shorter side, of mmsegmentation in its box, and in the box times a ratio."""
    sizes = arrays["hw"].tolist()
    out = {}
    if "short" in arrays:
        out["d2_hw"] = [shortest_side(h, w, side, LONGEST) for (h, w), side in zip(sizes, arrays["short"].tolist(), strict=True)]
    out["mmseg_hw"] = [inside_box(h, w, SEGMENTATION_BOX) for h, w in sizes]
    if "ratio" in arrays:
        boxes = [tuple(int(side * ratio) for side in SEGMENTATION_BOX) for ratio in arrays["ratio"].tolist()]
        out["mmseg_ratio_hw"] = [inside_box(h, w, box) for (h, w), box in zip(sizes, boxes, strict=True)]
    return {name: np.array(value) for name, value in out.items()}


def sched(arrays: Arrays) -> Arrays:
    """transfer/sched: multipliers of Detectron2's schedules; mmengine's polynomial learning rates, which reach the end at i = N - 1."""
    out = {}
    for name in (key.removesuffix("_cfg") for key in arrays if key.endswith("_cfg")):
        at = arrays[f"{name}_it"].tolist()
        if name == "poly":
            base, low, power, iterations = arrays["poly_cfg"].tolist()
            out["poly_lr"] = [poly(i, base_lr=base, min_lr=low, power=power, steps=int(iterations) - 1) for i in at]
        else:
            _, warmup, *milestones = arrays[f"{name}_cfg"].tolist()
            out[f"{name}_mult"] = [warmup_step_decay(i, base_lr=1.0, milestones=milestones, warmup=warmup) for i in at]
    return {name: np.array(value) for name, value in out.items()}


def vocap(arrays: Arrays) -> Arrays:
    """transfer/vocap: AP of one class by the 11-point rule and by area for ten IoU thresholds; both curves at IoU 0.5."""
    difficult = arrays["gt"][:, 5].astype(bool)
    matches = matched(arrays["gt"], arrays["det"])
    curves = [recall_precision(difficult, matches, t) for t in THRESHOLDS]
    out = {name: [average_precision(*c, eleven_points=name == "ap11") for c in curves] for name in ("ap11", "ap_area")}
    out["rec50"], out["prec50"] = curves[0]
    return {name: np.array(value) for name, value in out.items()}


KINDS = {
    "transfer/resize": Kind(resize, ("hw", "short", "ratio")),
    "transfer/sched": Kind(sched, ("*_cfg", "*_it")),
    "transfer/vocap": Kind(vocap, ("gt", "det", "n_images")),
}
