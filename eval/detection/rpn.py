"""Region proposals: anchors scored and moved (methods/transfer.md, 1.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from eval.detection.anchors import RATIOS, SIZES, STRIDES, cell_anchors, grid_anchors
from eval.detection.boxes import clip, decode, encode, match, not_empty, sample
from eval.detection.config import DetectorConfig, Target

WEIGHTS = (1.0, 1.0, 1.0, 1.0)
"""Of the offsets."""


class RPNHead(nn.Module):
    """maps [B, C, h, w] -> for each the logits [B, h*w*A] that an anchor is an object, and offsets [B, h*w*A, 4]; by row, column,
    anchor."""

    def __init__(self, channels: int, anchors: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness_logits = nn.Conv2d(channels, anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, anchors * 4, 1)
        for layer in self.children():
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = [], []
        for x in maps:
            x = F.relu(self.conv(x))
            logits.append(self.objectness_logits(x).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.anchor_deltas(x).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3))
        return logits, deltas


class RPN(nn.Module):
    """maps, sizes of the images in them (height, width)[, objects] -> proposals [n, 4] and their logits [n] of each image, and the
    losses in training."""

    def __init__(self, config: DetectorConfig, channels: int):
        super().__init__()
        self.config = config
        self.rpn_head = RPNHead(channels, len(SIZES[config.head][0]) * len(RATIOS))

    def forward(
        self, maps: list[Tensor], sizes: list[tuple[int, int]], targets: list[Target] | None
    ) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
        logits, deltas = self.rpn_head(maps)
        anchors = [
            grid_anchors(tuple(x.shape[2:]), stride, cell_anchors(sides).to(x.device))
            for x, stride, sides in zip(maps, STRIDES[self.config.head], SIZES[self.config.head], strict=True)
        ]
        losses = {}
        if targets is not None:
            all_anchors = torch.cat(anchors)
            labels, boxes = zip(*(label_anchors(all_anchors, t.boxes, self.config.rpn_batch) for t in targets), strict=True)
            losses = rpn_losses(all_anchors, logits, deltas, torch.stack(labels), torch.stack(boxes), self.config.rpn_batch)
        training = targets is not None
        proposals = propose(
            anchors,
            logits,
            deltas,
            sizes,
            before=self.config.rpn_pre_nms_train if training else self.config.rpn_pre_nms_test,
            after=self.config.rpn_post_nms_train if training else self.config.rpn_post_nms_test,
            nms=self.config.rpn_nms,
            training=training,
        )
        return proposals, losses


def label_anchors(anchors: Tensor, objects: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """For one image: label int8 [A], 1 object, 0 none, -1 not in the loss (all but `number` drawn ones), and the box [A, 4] to
    regress to.  Anchors that leave the image take part."""
    which, label = match(box_iou(objects, anchors), 0.3, 0.7, each_object=True)
    positive, negative = sample(label == 1, label == 0, number, 0.5)
    drawn = torch.full_like(label, -1)
    drawn[positive] = 1
    drawn[negative] = 0
    return drawn, objects[which] if len(objects) else torch.zeros_like(anchors)


def rpn_losses(
    anchors: Tensor, logits: list[Tensor], deltas: list[Tensor], labels: Tensor, boxes: Tensor, number: int
) -> dict[str, Tensor]:
    """anchors [A, 4] of all levels, logits [B, A_l] and deltas [B, A_l, 4] by level, labels [B, A] and boxes [B, A, 4] by
    `label_anchors`: cross-entropy and L1 over the drawn anchors / (number * B), however many were drawn."""
    logits, deltas = torch.cat(logits, dim=1), torch.cat(deltas, dim=1)
    wide = torch.promote_types(logits.dtype, torch.float32)
    drawn, positive = labels >= 0, labels == 1
    divisor = number * len(labels)
    cls = F.binary_cross_entropy_with_logits(logits[drawn].to(wide), labels[drawn].to(wide), reduction="sum")
    goal = encode(anchors.expand_as(boxes)[positive], boxes[positive], WEIGHTS)
    loc = (deltas[positive].to(wide) - goal).abs().sum()
    return {"rpn_cls": cls / divisor, "rpn_loc": loc / divisor}


@torch.no_grad()
def propose(
    anchors: list[Tensor],
    logits: list[Tensor],
    deltas: list[Tensor],
    sizes: list[tuple[int, int]],
    *,
    before: int,
    after: int,
    nms: float,
    training: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Of each image the `after` best boxes [n, 4] and their logits [n], best first: of each level the `before` best, moved, cut to
    the image and freed of overlaps above `nms` within the level.

    FloatingPointError in training where the network gives no finite numbers; in testing such boxes are dropped.
    """
    boxes, scores, levels = [], [], []
    for level, (a, score, delta) in enumerate(zip(anchors, logits, deltas, strict=True)):
        score, top = score.to(torch.promote_types(score.dtype, torch.float32)).topk(min(before, score.shape[1]), dim=1)
        delta = delta.gather(1, top[..., None].expand(-1, -1, 4))
        boxes.append(decode(a[top].flatten(0, 1), delta.flatten(0, 1), WEIGHTS).unflatten(0, top.shape))
        scores.append(score)
        levels.append(torch.full_like(top[0], level))
    boxes, scores, levels = torch.cat(boxes, dim=1), torch.cat(scores, dim=1), torch.cat(levels)
    finite = boxes.isfinite().all(2) & scores.isfinite()
    if training and not finite.all():
        raise FloatingPointError("The proposals are not finite: the detector's training diverged. Lower its learning rate.")
    found = []
    for box, score, usable, hw in zip(boxes, scores, finite, sizes, strict=True):
        box = clip(box, hw)
        usable = (usable & not_empty(box)).nonzero()[:, 0]
        box, score = box[usable], score[usable]
        kept = batched_nms(box, score, levels[usable], nms)[:after]
        found.append((box[kept], score[kept]))
    return found
