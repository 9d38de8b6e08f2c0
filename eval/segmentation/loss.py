"""Cross-entropy of pixels, in float32 or wider (methods/transfer.md 5.2 and 5.7).  B images, C classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.segmentation.heads import resized
from fastssl.collectives import total, world_size
from fastssl.precision import wide


def pixel_loss(logits: Tensor, labels: Tensor, *, ignore: int, align_corners: bool = False, valid_only: bool = False) -> Tensor:
    """mmsegmentation's: logits [B, C, h, w], brought to the labels' size, against labels int64 [B, H, W].

    The sum over the pixels that are not ignored is divided by the number of all, or with `valid_only` of those.
    """
    return _mean(resized(wide(logits), labels.shape[1:], align_corners), labels, ignore, valid_only)


def doubled_loss(logits: Tensor, labels: Tensor, *, ignore: int) -> Tensor:
    """ImageNetSegModel's: both at twice the size of the logits, labels by their nearest; the mean over pixels that are not ignored."""
    size = [2 * side for side in logits.shape[2:]]
    labels = F.interpolate(labels[:, None].float(), size, mode="nearest")[:, 0].long()
    return _mean(resized(wide(logits), size), labels, ignore, valid_only=True)


def _mean(logits: Tensor, labels: Tensor, ignore: int, valid_only: bool) -> Tensor:
    loss = F.cross_entropy(logits, labels, ignore_index=ignore, reduction="sum")
    if not valid_only:
        return loss / labels.numel()
    # of all ranks, so that the average of their gradients is that of one process
    valid = total((labels != ignore).sum()) / world_size()
    return loss / torch.clamp(valid, min=1)
