"""Masks of objects: what is learnt inside a box, the head, and pasting into the image (methods/transfer.md, 1.7 to 1.10)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_masks
from torch import Tensor, nn
from torchvision.ops import roi_align

from eval.detection.config import ObjectMask
from eval.detection.trunk import ConvNorm, Norm

HIDDEN = 256


class MaskHead(nn.Module):
    """regions [n, C, m, m] -> logits [n, K, 2m, 2m], one map a class.  `convs` 3x3 convolutions come first."""

    def __init__(self, channels: int, classes: int, *, convs: int, norm: Norm | None):
        super().__init__()
        self.convs = [f"mask_fcn{i + 1}" for i in range(convs)]
        for name in self.convs:
            self.add_module(name, ConvNorm(channels, HIDDEN, 3, norm=norm))
            channels = HIDDEN
        self.deconv = nn.ConvTranspose2d(channels, HIDDEN, 2, stride=2)
        self.predictor = nn.Conv2d(HIDDEN, classes, 1)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predictor.weight, std=0.001)
        for layer in (self.deconv, self.predictor):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.convs:
            x = F.relu(getattr(self, name)(x))
        return self.predictor(F.relu(self.deconv(x)))


def mask_targets(masks: Sequence[ObjectMask], boxes: Tensor, side: int) -> Tensor:
    """What lies of each object's mask in its box [n, 4], on the CPU: bool [n, side, side].

    Polygons are moved into the box and drawn by pycocotools at side x side; other masks are averaged by RoIAlign and cut at 0.5,
    which differs by a few pixels on the border.
    """
    drawn = [_draw(mask, box, side) for mask, box in zip(masks, boxes, strict=True)]
    return torch.stack(drawn) if drawn else boxes.new_zeros((0, side, side), dtype=torch.bool)


def _draw(mask: ObjectMask, box: Tensor, side: int) -> Tensor:
    if isinstance(mask, dict):
        bitmap = torch.from_numpy(coco_masks.decode(mask)).to(box.dtype)
        roi = torch.cat((box.new_zeros(1), box))
        return roi_align(bitmap[None, None], roi[None], side, 1.0, 0, aligned=True)[0, 0] >= 0.5
    x0, y0, x1, y1 = box.numpy()
    corner, scale = np.array([x0, y0]), side / np.maximum((x1 - x0, y1 - y0), 0.1)
    moved = [((polygon.reshape(-1, 2) - corner) * scale).ravel() for polygon in mask]
    return torch.from_numpy(coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(moved, side, side)))).bool()


def mask_loss(logits: Tensor, classes: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [n, K, m, m] at the objects' classes [n] with targets bool [n, m, m]; 0 for none."""
    chosen = logits[torch.arange(len(classes), device=classes.device), classes]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    if not len(chosen):
        return chosen.sum()
    return F.binary_cross_entropy_with_logits(chosen, targets.to(chosen.dtype))


def paste_masks(masks: Tensor, boxes: Tensor, hw: tuple[int, int]) -> Tensor:
    """Probabilities [n, M, M] inside boxes [n, 4] -> bool [n, H, W]: sampled bilinearly at the centres of the pixels, 0 beyond the
    map, 0.5 and more is object."""
    height, width = hw
    out = torch.zeros((len(masks), height, width), dtype=torch.bool, device=masks.device)
    first, end = (boxes - 1).floor().long().clamp(min=0).tolist(), (boxes + 1).ceil().long().tolist()  # outside a box below 0.5
    for i, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        rows, columns = range(first[i][1], min(end[i][3], height)), range(first[i][0], min(end[i][2], width))
        y = _position(rows, box[1], box[3])[:, None].expand(-1, len(columns))
        x = _position(columns, box[0], box[2]).expand(len(rows), -1)
        sampled = F.grid_sample(mask[None, None], torch.stack((x, y), dim=-1)[None], align_corners=False)
        out[i, rows.start : rows.stop, columns.start : columns.stop] = sampled[0, 0] >= 0.5
    return out


def _position(pixels: range, low: Tensor, high: Tensor) -> Tensor:
    """Of the pixels' centres in [low, high], which is -1 to 1."""
    centres = torch.arange(pixels.start, pixels.stop, dtype=low.dtype, device=low.device) + 0.5
    return (centres - low) / (high - low) * 2 - 1
