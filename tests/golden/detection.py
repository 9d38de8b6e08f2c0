"""The detector's parts: anchors, offsets, matching, losses, proposals, pooling, masks, precise-BN (golden/transfer.md)."""

from __future__ import annotations

import numpy as np
import torch
from pycocotools import mask as coco_masks
from torch import Tensor, nn
from torchvision.ops import box_iou

from eval.detection import anchors as anchor_boxes
from eval.detection import boxes as box_rules
from eval.detection import masks as mask_rules
from eval.detection import pooling, roi, rpn
from eval.detection.precise_bn import precise_bn
from tests.golden.kind import Arrays, Kind, compare

TOLERANCE = 1e-5


class Part(Kind):
    def compare(self, name: str, actual: np.ndarray, expected: np.ndarray) -> None:
        compare(name, actual, expected, TOLERANCE if expected.dtype.kind == "f" else None)


def tensor(a: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(a))


def numpy(outputs: dict[str, Tensor | np.ndarray]) -> Arrays:
    return {name: a.detach().numpy() if isinstance(a, Tensor) else np.asarray(a) for name, a in outputs.items()}


def anchors(a: Arrays) -> Arrays:
    cells = {head: [anchor_boxes.cell_anchors(sizes) for sizes in anchor_boxes.SIZES[head]] for head in ("c4", "fpn")}
    strides = anchor_boxes.STRIDES["fpn"]
    out = {"fpn_strides": np.array(strides), "fpn_cell": torch.stack(cells["fpn"]), "c4_cell": cells["c4"][0]}
    out["c4_anchors"] = anchor_boxes.grid_anchors(tuple(a["c4_grid"].tolist()), anchor_boxes.STRIDES["c4"][0], cells["c4"][0])
    big = []
    for level, (stride, cell) in enumerate(zip(strides, cells["fpn"], strict=True)):
        out[f"fpn_p{level + 2}"] = anchor_boxes.grid_anchors(tuple(a["fpn_grids"][level].tolist()), stride, cell)
        big.append(anchor_boxes.grid_anchors(tuple(a["big_grids"][level].tolist()), stride, cell))
    out["big_sum"] = torch.stack([b.double().sum(0) for b in big])
    out["big_last"] = torch.stack([b[-1] for b in big])
    return numpy(out)


def boxcoder(a: Arrays) -> Arrays:
    out = {"clamp": np.array(box_rules.MAX_LOG_SCALE)}
    for name, weights in (("rpn", rpn.WEIGHTS), ("roi", roi.WEIGHTS)):
        source = tensor(a[f"{name}_src"])
        out[f"{name}_deltas"] = box_rules.encode(source, tensor(a[f"{name}_tgt"]), weights)
        out[f"{name}_decoded"] = box_rules.decode(source, tensor(a[f"{name}_pred"]), weights)
    return numpy(out)


def matcher(a: Arrays) -> Arrays:
    iou = box_iou(tensor(a["gt"]), tensor(a["anchors"]))
    out = {"iou": iou}
    rules = {
        "rpn": (iou[:-1], 0.3, 0.7, True),
        "roi": (iou[:-1], 0.5, 0.5, False),
        "cascade7": (iou[:-1], 0.7, 0.7, False),
        "quirk": (iou, 0.3, 0.7, True),
        "empty": (iou[:0], 0.3, 0.7, True),
    }
    for name, (overlaps, low, high, each_object) in rules.items():
        out[f"{name}_idx"], out[f"{name}_label"] = box_rules.match(overlaps, low, high, each_object=each_object)
    labels = tensor(a["sample_labels"])
    positive, negative = (labels >= 0) & (labels != 7), labels == 7
    for name, number, seed in (("a", 64, 7), ("b", 400, 8)):
        torch.manual_seed(seed)
        out[f"sample_{name}_pos"], out[f"sample_{name}_neg"] = box_rules.sample(positive, negative, number, 0.25)
    return numpy(out)


def rpn_stage(a: Arrays) -> Arrays:
    levels = range(sum(name.startswith("logits") for name in a))
    anchors, logits, deltas = ([tensor(a[f"{name}{i}"]) for i in levels] for name in ("anchors", "logits", "deltas"))
    leaves = [t.requires_grad_() for t in (*logits, *deltas)]
    number = int(a["batch_size_per_image"])
    losses = rpn.rpn_losses(torch.cat(anchors), logits, deltas, tensor(a["labels"]), tensor(a["matched_gt"]), number)
    sum(losses.values()).backward()
    out = {"loss_cls": losses["rpn_cls"], "loss_loc": losses["rpn_loc"]}
    out |= {f"g_{name}{i}": leaves[len(levels) * part + i].grad for part, name in enumerate(("logits", "deltas")) for i in levels}
    sizes = [tuple(hw) for hw in a["image_sizes"].tolist()]
    for phase, before, after in (("train", 40, 25), ("test", 30, 15)):
        limits = {"before": before, "after": after, "nms": 0.7, "training": phase == "train"}
        for i, (boxes, scores) in enumerate(rpn.propose(anchors, logits, deltas, sizes, **limits)):
            out |= {f"prop_{phase}_{i}": boxes, f"score_{phase}_{i}": scores}
    return numpy(out)


def roi_stage(a: Arrays) -> Arrays:
    images = range(sum(name.startswith("proposals_") for name in a))
    proposals = [tensor(a[f"proposals_{i}"]) for i in images]
    goals = [tensor(a[f"gt_boxes_{i}"]) if f"gt_boxes_{i}" in a else proposals[i] for i in images]
    classes = torch.cat([tensor(a[f"gt_classes_{i}"]) for i in images])
    scores, deltas = (tensor(a[name]).requires_grad_() for name in ("scores", "deltas"))
    losses = roi.region_losses(scores, deltas, torch.cat(proposals), classes, torch.cat(goals))
    sum(losses.values()).backward()
    out = {"loss_cls": losses["cls"], "loss_box_reg": losses["box_reg"], "g_scores": scores.grad, "g_deltas": deltas.grad}
    counts = [len(p) for p in proposals]
    limits = {"threshold": 0.05, "nms": 0.5, "number": int(a["topk"])}
    for i, s, d in zip(images, scores.split(counts), deltas.split(counts), strict=True):
        found, source = roi.detect(s, d, proposals[i], tuple(a["image_size"].tolist()), **limits)
        out |= {f"det_boxes_{i}": found.boxes, f"det_scores_{i}": found.scores}
        out |= {f"det_classes_{i}": found.classes, f"det_roi_{i}": source}
    return numpy(out)


def pooler(a: Arrays) -> Arrays:
    maps = [tensor(a[f"feat{i}"]) for i in range(4)]
    strides = anchor_boxes.STRIDES["fpn"][:4]
    boxes = [tensor(a["boxes0"]), tensor(a["boxes1"])]
    c4 = pooling.pool(maps[2:3], strides[2:3], boxes, 14)
    out = {"levels": pooling.pyramid_levels(tensor(a["level_boxes"])), "pooled7": pooling.pool(maps, strides, boxes, 7)}
    return numpy(out | {"c4_pooled14_mean": c4.mean((2, 3)), "c4_pooled14_first": c4[0]})


def packed(masks: Tensor) -> np.ndarray:
    return np.packbits(masks.numpy().ravel())


def polygons(a: Arrays) -> list[list[np.ndarray]]:
    parts = iter(np.split(a["poly_xy"], np.cumsum(a["poly_lens"])[:-1]))
    return [[next(parts) for _ in range(n)] for n in a["n_poly"]]


def bitmap(polygons: list[np.ndarray], height: int, width: int) -> Tensor:
    return tensor(coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(polygons, height, width))))


def mask_stage(a: Arrays) -> Arrays:
    objects, boxes, hw = polygons(a), tensor(a["boxes"]), tuple(a["image"].tolist())
    targets = mask_rules.mask_targets(objects, boxes, 28)
    full = torch.stack([bitmap(p, *hw) for p in objects])
    rles = [coco_masks.encode(np.asfortranarray(m)) for m in full.numpy()]
    out = {"targets28": packed(targets), "targets14": packed(mask_rules.mask_targets(objects, boxes, 14))}
    out |= {"bitmask_full": packed(full), "bitmask_targets28": packed(mask_rules.mask_targets(rles, boxes, 28))}
    logits = tensor(a["logits"]).float().requires_grad_()
    out["loss"] = mask_rules.mask_loss(logits, tensor(a["cls"]), targets)
    out["loss"].backward()
    out["g_abs_sum"] = logits.grad.abs().sum((1, 2, 3))
    out["pasted"] = packed(mask_rules.paste_masks(tensor(a["paste_prob"]), tensor(a["paste_boxes"]), hw))
    return numpy(out)


def precise_statistics(a: Arrays) -> Arrays:
    batches = [(tensor(a[name]),) for name in sorted((n for n in a if n[0] == "x"), key=lambda n: int(n[1:]))]
    norm = nn.BatchNorm2d(batches[0][0].shape[1])
    precise_bn(norm, batches)
    return numpy({"mean": norm.running_mean, "var": norm.running_var})


KINDS = {
    "transfer/anchors": Part(anchors, inputs=("fpn_grids", "c4_grid", "big_grids", "image")),
    "transfer/boxcoder": Part(boxcoder, inputs=("*_src", "*_tgt", "*_pred")),
    "transfer/matcher": Part(matcher, inputs=("gt", "anchors", "sample_labels")),
    "transfer/rpn": Part(
        rpn_stage, inputs=("anchors*", "logits*", "deltas*", "labels", "matched_gt", "batch_size_per_image", "image_sizes", "gt*")
    ),
    "transfer/roi": Part(
        roi_stage, inputs=("num_classes", "scores", "deltas", "image_size", "topk", "proposals_*", "gt_classes_*", "gt_boxes_*")
    ),
    "transfer/pooler": Part(pooler, inputs=("level_boxes", "feat*", "boxes[01]")),
    "transfer/mask": Part(
        mask_stage, inputs=("n_poly", "poly_lens", "poly_xy", "boxes", "logits", "cls", "paste_prob", "paste_boxes", "image")
    ),
    "transfer/precisebn": Part(precise_statistics, inputs=("x*",)),
}
