"""Kinds of the data files: ImageNet subsets, crop boxes from recorded draws, W2SSL's strips."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from fastssl.recipes import W2SSL_HALVES, W2SSL_QUADRANTS
from fastssl.views import Crop
from loaders.class_folders import listing
from loaders.geometry import FIRST_TRY, FLIP, LEFT, SLOTS, TOP, random_box, region_box
from loaders.subsets import imagenet_list, select
from tests.golden.kind import Arrays, Kind


def sha256(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sfrik_subset(arrays: Arrays) -> Arrays:
    folders = defaultdict(list)
    for file in arrays["files"].tolist():
        folder, _, name = file.decode().rpartition("/")
        folders[folder].append(name)
    classes = sorted({folder.partition("/")[0] for folder in folders})
    files, labels = listing(folders.items(), classes)
    out = {"full_samples": np.array([f.encode() for f in files]), "full_targets": labels, "full_sha256": sha256(files)}
    first_of_class = np.searchsorted(labels, np.arange(len(classes)))
    for part, rule in (("train", "first"), ("val", "after")):
        ids = select(f"{rule}:{int(arrays['subset'])}", labels=labels, names=lambda: files, classes=classes, path=Path("tree"))
        (start,) = set((ids.reshape(len(classes), -1)[:, 0] - first_of_class).tolist())
        chosen = sha256([files[i] for i in ids])
        out |= {f"{part}_start": start, f"{part}_index": ids, f"{part}_targets": labels[ids], f"{part}_sha256": chosen}
    return out


def sfrik_semi_lists(arrays: Arrays) -> Arrays:
    out = {}
    for percent in sorted(name.removeprefix("class_") for name in arrays if name.startswith("class_")):
        lines = imagenet_list(f"{percent}percent")
        wnid, number = zip(*(line.removesuffix(".JPEG").split("_") for line in lines), strict=True)
        wnids = sorted(set(wnid))
        label = {name: i for i, name in enumerate(wnids)}
        out |= {f"class_{percent}": [label[w] for w in wnid], f"number_{percent}": [int(n) for n in number]}
        out |= {"wnids": np.array([w.encode() for w in wnids]), f"sha256_{percent}": sha256([*lines, ""])}
    return out


def sere_crop_boxes(arrays: Arrays) -> Arrays:
    out = {}
    for cfg in range(int(arrays["n_cfg"])):
        prefix = f"cfg{cfg}/"
        result = recorded_boxes({name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)})
        out |= {prefix + name: a for name, a in result.items()}
    return out


def recorded_boxes(arrays: Arrays) -> Arrays:
    """The boxes of one configuration, and between what its draws lay."""
    width, height = arrays["image_wh"].tolist()
    scale, ratio = arrays["scale"], arrays["ratio"]
    low, high = (np.array((scale[i], math.log(ratio[i]))) for i in (0, 1))
    boxes, draw_lo, draw_hi = [], [], []
    for start, end in pairwise(arrays["draw_offsets"].tolist()):
        kind, value = arrays["draw_kind"][start:end], arrays["draw_value"][start:end]
        tries, corner = value[kind == 0].reshape(-1, 2), value[kind == 1]
        u = np.zeros(SLOTS)
        (u[FLIP],) = value[kind == 3]
        u[FIRST_TRY : FIRST_TRY + tries.size] = ((tries - low) / (high - low)).ravel()
        limits = np.concatenate((scale, ratio))
        top, left, h, w = random_box(u, height, width, limits)
        room = np.array((height - h, width - w))[: corner.size]
        if corner.size:  # where a box lies is drawn after its size: once more, with the middle of each whole number's share
            u[[TOP, LEFT]] = (corner + 0.5) / (room + 1)
            top, left, h, w = random_box(u, height, width, limits)
        boxes.append((left, top, w, h, u[FLIP] < Crop().flip))
        draw_lo += [*np.tile(low, len(tries)), *np.zeros(corner.size), 0.0]
        draw_hi += [*np.tile(high, len(tries)), *room, 1.0]
    return {"boxes_xywh_flip": np.array(boxes, np.int64), "draw_lo": np.array(draw_lo), "draw_hi": np.array(draw_hi)}


def w2ssl_crops(arrays: Arrays) -> Arrays:
    def boxes(regions: tuple) -> np.ndarray:
        """[M, regions, 4]: left, top, right, bottom."""
        found = [[region_box(r, 1.0, height, width) for r in regions] for width, height in arrays["sizes_wh"].tolist()]
        top, left, height, width = np.moveaxis(np.array(found), 2, 0)
        return np.stack((left, top, left + width, top + height), 2)

    return {"half_boxes_xyxy": boxes(W2SSL_HALVES), "quad_boxes_xyxy": boxes(W2SSL_QUADRANTS)}


KINDS = {
    "sfrik/subset": Kind(sfrik_subset, ("files", "subset")),
    "sfrik/semi_lists": Kind(sfrik_semi_lists, ()),
    "sere/crop_boxes": Kind(
        sere_crop_boxes, ("n_cfg", "*/image_wh", "*/scale", "*/ratio", "*/draw_kind", "*/draw_value", "*/draw_offsets")
    ),
    "w2ssl/crops": Kind(w2ssl_crops, ("sizes_wh",)),
}
