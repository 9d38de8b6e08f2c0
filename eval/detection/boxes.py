"""Boxes as offsets from other boxes, which boxes stand for which object, and which of them are learnt from (methods/transfer.md, 1).

Boxes are x0, y0, x1, y1 in continuous pixels; an image covers [0, width] x [0, height].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)
"""A box grows at most 62.5-fold a side."""
Weights = tuple[float, float, float, float]


def encode(source: Tensor, target: Tensor, weights: Weights) -> Tensor:
    """What turns boxes `source` [n, 4] into `target` [n, 4]: shifts of the centre in source sizes, logs of the sizes' ratios."""
    (sx, sy, sw, sh), (tx, ty, tw, th) = _centres(source), _centres(target)
    wx, wy, ww, wh = weights
    return torch.stack((wx * (tx - sx) / sw, wy * (ty - sy) / sh, ww * torch.log(tw / sw), wh * torch.log(th / sh)), dim=1)


def decode(source: Tensor, deltas: Tensor, weights: Weights) -> Tensor:
    """Boxes [n, 4k] that `deltas` [n, 4k] make of the boxes `source` [n, 4], in 32 bits or more."""
    deltas = deltas.to(torch.promote_types(deltas.dtype, torch.float32)).unflatten(1, (-1, 4))
    x, y, w, h = (part[:, None] for part in _centres(source.to(deltas.dtype)))
    dx, dy, dw, dh = (deltas[..., i] / weights[i] for i in range(4))
    x, y = dx * w + x, dy * h + y
    half_w, half_h = 0.5 * (torch.exp(dw.clamp(max=MAX_LOG_SCALE)) * w), 0.5 * (torch.exp(dh.clamp(max=MAX_LOG_SCALE)) * h)
    return torch.stack((x - half_w, y - half_h, x + half_w, y + half_h), dim=-1).flatten(1)


def _centres(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x0, y0, x1, y1 = boxes.unbind(1)
    w, h = x1 - x0, y1 - y0
    return x0 + 0.5 * w, y0 + 0.5 * h, w, h


def clip(boxes: Tensor, hw: tuple[int, int]) -> Tensor:
    """`boxes` [..., 4] cut to an image of hw pixels."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    h, w = hw
    return torch.stack((x0.clamp(0, w), y0.clamp(0, h), x1.clamp(0, w), y1.clamp(0, h)), dim=-1)


def not_empty(boxes: Tensor) -> Tensor:
    """bool [n]: width and height above 0."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])


def match(iou: Tensor, low: float, high: float, *, each_object: bool = False) -> tuple[Tensor, Tensor]:
    """iou [objects, boxes] -> the object int64 [boxes] that each box overlaps most, and its label int8: 1 where the overlap is
    `high` or more, 0 below `low`, -1 (neither) between.

    each_object   the boxes that an object overlaps most, ties included, are 1 too, but keep their own object: a box may stand for
                  another one than the one whose best it is.  An object that overlaps nothing makes all boxes without overlap 1.
    """
    if not len(iou):
        return iou.new_zeros(iou.shape[1], dtype=torch.int64), iou.new_zeros(iou.shape[1], dtype=torch.int8)
    best, which = iou.max(0)
    label = torch.full_like(which, -1, dtype=torch.int8)
    label[best < low] = 0
    label[best >= high] = 1
    if each_object:
        label[(iou == iou.amax(1, keepdim=True)).any(0)] = 1
    return which, label


def sample(positive: Tensor, negative: Tensor, number: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Indices of at most number * fraction of the positive (bool [n]), and of negative ones up to `number` in all; torch's generator."""
    positive, negative = positive.nonzero()[:, 0], negative.nonzero()[:, 0]
    n = min(int(number * fraction), len(positive))
    chosen = positive[torch.randperm(len(positive), device=positive.device)[:n]]
    return chosen, negative[torch.randperm(len(negative), device=negative.device)[: number - n]]
