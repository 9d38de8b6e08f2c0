"""Label maps of whole images by the rules of the protocols (methods/transfer.md 5.3, 5.6 and 5.7)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import resize

from eval.resize import inside_box
from eval.segmentation.heads import resized
from eval.segmentation.images import bilinear
from eval.segmentation.model import Segmenter
from eval.segmentation.protocols import SegmentationProtocol

LARGE, LARGE_SIDE = 10**6, 1000
"""ImageNet-S: above so many pixels the logits are enlarged to so many a side only, and the labels to the rest."""


def windows(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int, int, int]]:
    """top, left, bottom, right of the windows that cover an image, row by row.  The last ones are moved inside, and overlap more."""

    def along(length: int) -> list[tuple[int, int]]:
        count = max(length - crop + stride - 1, 0) // stride + 1
        ends = [min(k * stride + crop, length) for k in range(count)]
        return [(max(end - crop, 0), end) for end in ends]

    return [(top, left, bottom, right) for top, bottom in along(height) for left, right in along(width)]


def slide(logits: Callable[[Tensor], Tensor], x: Tensor, crop: int, stride: int) -> Tensor:
    """The mean over all windows that see a pixel of what `logits` says of them: [B, 3, h, w] -> [B, classes, h, w]."""
    total, count = None, x.new_zeros(x.shape[2:])
    for top, left, bottom, right in windows(*x.shape[2:], crop, stride):
        found = logits(x[:, :, top:bottom, left:right])
        if total is None:
            total = found.new_zeros(*found.shape[:2], *x.shape[2:])
        total[:, :, top:bottom, left:right] += found
        count[top:bottom, left:right] += 1
    return total / count


@torch.no_grad()
def label_map(model: Segmenter, image: Image.Image, protocol: SegmentationProtocol, normalised: Callable[[np.ndarray], Tensor]) -> Tensor:
    """int64 [h, w], a class for every pixel of the RGB image.  The model is in eval mode.

    normalised: uint8 [h, w, 3] -> float32 [3, h, w] on the model's device
    """
    height, width = image.height, image.width
    if protocol.test == "short_side":
        x = normalised(np.asarray(resize(image, protocol.test_side)))[None]
        size = height, width
        if height * width > LARGE:
            size = (LARGE_SIDE, int(LARGE_SIDE * width / height)) if height > width else (int(LARGE_SIDE * height / width), LARGE_SIDE)
        found = resized(model(x)[0].float(), size).argmax(1)
        return F.interpolate(found[None].float(), (height, width), mode="nearest")[0, 0].long()
    size = (height, width) if protocol.test_box is None else inside_box(height, width, protocol.test_box)
    x = normalised(bilinear(np.asarray(image), size))[None]
    logits = slide(model.upsampled, x, protocol.crop, protocol.stride) if protocol.test == "slide" else model.upsampled(x)
    return resized(logits, (height, width), model.align_corners).argmax(1)[0]
