"""The second stage: regions drawn from the proposals, classified, moved and masked (methods/transfer.md, 1.5 to 1.10)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from eval.detection.anchors import STRIDES
from eval.detection.boxes import clip, decode, encode, match, sample
from eval.detection.config import Detections, DetectorConfig, Target
from eval.detection.masks import MaskHead, mask_loss, mask_targets
from eval.detection.pooling import pool
from eval.detection.trunk import ConvNorm, Norm, channels_of, resnet_stage

WEIGHTS = (10.0, 10.0, 5.0, 5.0)
"""Of the offsets."""


@dataclass(frozen=True)
class Regions:
    """Drawn regions of one image, those with an object first."""

    boxes: Tensor
    """[n, 4]"""
    classes: Tensor
    """int64 [n]; K: background."""
    objects: Tensor
    """int64 [n]: the object that each overlaps most; 0 where there is none."""
    found: int
    """The first so many are on an object."""


def draw_regions(proposals: Tensor, target: Target, classes: int, number: int) -> Regions:
    """`number` of an image's proposals [n, 4] and of its objects' own boxes, at most a quarter of them on an object (overlap 0.5)."""
    boxes = torch.cat((proposals, target.boxes.to(proposals.dtype)))
    which, label = match(box_iou(target.boxes.to(boxes.dtype), boxes), 0.5, 0.5)
    positive, negative = sample(label == 1, label == 0, number, 0.25)
    drawn = torch.cat((positive, negative))
    background = torch.full_like(which, classes)
    known = torch.where(label == 1, target.classes[which], background) if len(target.classes) else background
    return Regions(boxes[drawn], known[drawn], which[drawn], len(positive))


def region_losses(scores: Tensor, deltas: Tensor, boxes: Tensor, classes: Tensor, goals: Tensor) -> dict[str, Tensor]:
    """scores [n, K + 1], deltas [n, 4 K] of regions [n, 4] of `classes` [n] that belong to the boxes `goals` [n, 4] (any for
    background): mean cross-entropy, and L1 of the own class's offsets of regions on objects / n."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    number = max(len(classes), 1)
    cls = F.cross_entropy(scores.to(wide), classes, reduction="sum") / number
    on_object = (classes < scores.shape[1] - 1).nonzero()[:, 0]
    chosen = deltas.unflatten(1, (-1, 4))[on_object, classes[on_object]]
    box_reg = (chosen.to(wide) - encode(boxes[on_object], goals[on_object], WEIGHTS)).abs().sum() / number
    return {"cls": cls, "box_reg": box_reg}


def detect(
    scores: Tensor, deltas: Tensor, proposals: Tensor, hw: tuple[int, int], *, threshold: float, nms: float, number: int
) -> tuple[Detections, Tensor]:
    """Detections of one image of hw pixels, and the proposal that each comes from, int64 [n].  A proposal may give several classes."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(1)[:, :-1]
    boxes = decode(proposals, deltas, WEIGHTS).unflatten(1, (-1, 4))
    finite = boxes.isfinite().flatten(1).all(1) & scores.isfinite().all(1)
    source, classes = ((scores > threshold) & finite[:, None]).nonzero().unbind(1)
    boxes, scores = clip(boxes[source, classes], hw), scores[source, classes]
    kept = batched_nms(boxes, scores, classes, nms)[:number]
    return Detections(boxes[kept], scores[kept], classes[kept]), source[kept]


class BoxPredictor(nn.Module):
    """features [n, D] -> scores [n, K + 1], the background last, and offsets [n, 4 K] of each class."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.cls_score = nn.Linear(features, classes + 1)
        self.bbox_pred = nn.Linear(features, 4 * classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


class RoIHeads(nn.Module):
    """`losses` of maps, proposals and objects of the images, or `detections` of maps, proposals and sizes."""

    box_predictor: BoxPredictor
    mask_head: MaskHead

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.config = config

    def box_features(self, maps: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Features [n, D] of the boxes, and the maps [n, C, m, m] that they come from."""
        raise NotImplementedError

    def mask_features(self, maps: list[Tensor], boxes: list[Tensor], known: Tensor | None = None) -> Tensor:
        """What the mask head takes of the boxes: [n, C, m, m].  known: box_features' maps of the same boxes."""
        raise NotImplementedError

    def losses(self, maps: list[Tensor], proposals: list[Tensor], targets: list[Target]) -> dict[str, Tensor]:
        drawn = [draw_regions(p, t, self.config.classes, self.config.roi_batch) for p, t in zip(proposals, targets, strict=True)]
        boxes, classes = [r.boxes for r in drawn], torch.cat([r.classes for r in drawn])
        goals = [t.boxes[r.objects] if len(t.boxes) else r.boxes for r, t in zip(drawn, targets, strict=True)]
        if self.config.mask:  # copied before the heads' work is queued: the masks are drawn while a GPU does it
            masks = [t.polygons[i] for r, t in zip(drawn, targets, strict=True) for i in r.objects[: r.found].tolist()]
            places = torch.cat([r.boxes[: r.found] for r in drawn]).cpu()
        features, known = self.box_features(maps, boxes)
        scores, deltas = self.box_predictor(features)
        losses = {}
        if self.config.mask:
            known = torch.cat([part[: r.found] for part, r in zip(known.split([len(b) for b in boxes]), drawn, strict=True)])
            logits = self.mask_head(self.mask_features(maps, [r.boxes[: r.found] for r in drawn], known))
            shown = torch.cat([r.classes[: r.found] for r in drawn])
            losses["mask"] = mask_loss(logits, shown, mask_targets(masks, places, logits.shape[-1]).to(logits.device))
        return region_losses(scores, deltas, torch.cat(boxes), classes, torch.cat(goals)) | losses

    def detections(self, maps: list[Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]) -> list[Detections]:
        scores, deltas = self.box_predictor(self.box_features(maps, proposals)[0])
        counts = [len(p) for p in proposals]
        limits = {"threshold": self.config.score_threshold, "nms": self.config.nms, "number": self.config.detections}
        images = zip(scores.split(counts), deltas.split(counts), proposals, sizes, strict=True)
        found = [detect(s, d, p, hw, **limits)[0] for s, d, p, hw in images]
        if not self.config.mask:
            return found
        logits = self.mask_head(self.mask_features(maps, [d.boxes for d in found]))
        classes = torch.cat([d.classes for d in found])
        masks = logits[torch.arange(len(classes), device=classes.device), classes]
        masks = masks.to(torch.promote_types(masks.dtype, torch.float32)).sigmoid().split([len(d.boxes) for d in found])
        return [Detections(d.boxes, d.scores, d.classes, m) for d, m in zip(found, masks, strict=True)]


class C4Heads(RoIHeads):
    """layer4 of the ResNet, whose weights are pretrained, on each region, a BatchNorm of its own behind it."""

    def __init__(self, config: DetectorConfig, channels: int, norm: Norm):
        super().__init__(config)
        width = channels_of(config.arch, 5)
        self.res5 = resnet_stage(config.arch, 5, norm)
        self.res5.add_module("norm", norm(width))
        self.box_predictor = BoxPredictor(width, config.classes)
        if config.mask:
            self.mask_head = MaskHead(width, config.classes, convs=0, norm=None)

    def box_features(self, maps: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = self.res5(pool(maps, STRIDES["c4"], boxes, 14))
        return x.mean((2, 3)), x

    def mask_features(self, maps: list[Tensor], boxes: list[Tensor], known: Tensor | None = None) -> Tensor:
        return self.box_features(maps, boxes)[1] if known is None else known


class BoxHead(nn.Module):
    """regions [n, 256, 7, 7] -> features [n, 1024]: four convolutions and one linear layer."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        for i in range(4):
            self.add_module(f"conv{i + 1}", ConvNorm(channels, 256, 3, norm=norm))
        self.fc1 = nn.Linear(256 * 7 * 7, 1024)
        nn.init.kaiming_uniform_(self.fc1.weight, a=1)
        nn.init.zeros_(self.fc1.bias)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(conv(x))
        return F.relu(self.fc1(x.flatten(1)))


class FPNHeads(RoIHeads):
    """Heads on the pyramid's p2, ..., p5; 7x7 pixels a region for boxes, 14x14 for masks."""

    def __init__(self, config: DetectorConfig, channels: int, norm: Norm):
        super().__init__(config)
        self.box_head = BoxHead(channels, norm)
        self.box_predictor = BoxPredictor(1024, config.classes)
        if config.mask:
            self.mask_head = MaskHead(channels, config.classes, convs=4, norm=norm if config.mask_norm else None)

    def box_features(self, maps: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        x = pool(maps[:4], STRIDES["fpn"][:4], boxes, 7)
        return self.box_head(x), x

    def mask_features(self, maps: list[Tensor], boxes: list[Tensor], known: Tensor | None = None) -> Tensor:
        return pool(maps[:4], STRIDES["fpn"][:4], boxes, 14)
