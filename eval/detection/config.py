"""What a detector is made of, what it learns from and what it finds."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from torch import Tensor

from fastssl.config import ConfigError

_PROPOSALS = {
    "c4": {"rpn_pre_nms_train": 12000, "rpn_pre_nms_test": 6000, "rpn_post_nms_train": 2000, "rpn_post_nms_test": 1000},
    "fpn": {"rpn_pre_nms_train": 2000, "rpn_pre_nms_test": 1000, "rpn_post_nms_train": 1000, "rpn_post_nms_test": 1000},
}

ObjectMask = list[np.ndarray] | dict
"""Polygons [x0, y0, x1, y1, ...] in pixels of the image, or pycocotools' compressed RLE {"size", "counts"} of the image's size."""


@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """Faster R-CNN, or with `mask` Mask R-CNN, as Detectron2 configures them for self-supervised ResNets (methods/transfer.md, 1).

    ConfigError where a value cannot work.
    """

    head: Literal["c4", "fpn"]
    """Two-stage heads on layer3's map with layer4 as the head, or on a feature pyramid."""
    classes: int
    """K, without the background."""
    mask: bool
    mask_norm: bool = True
    """BatchNorm in the pyramid's mask head; without it the convolutions have biases.  C4's mask head has none of both."""
    arch: Literal["resnet18", "resnet50"] = "resnet50"
    syncbn: Literal["sync", "naive"] = "sync"
    """Statistics over the ranks weighted by their counts, or MoCo's: equal weights, biased running variance."""
    rpn_batch: int = 256
    """Anchors an image in the loss, at most half of them positive."""
    rpn_pre_nms_train: int | None = None
    """Proposals an image and level before suppression; None: 12000 for C4, 2000 for FPN."""
    rpn_pre_nms_test: int | None = None
    """None: 6000 for C4, 1000 for FPN."""
    rpn_post_nms_train: int | None = None
    """Proposals an image after it; None: 2000 for C4, 1000 for FPN."""
    rpn_post_nms_test: int | None = None
    """None: 1000."""
    rpn_nms: float = 0.7
    roi_batch: int = 512
    """Regions an image in the loss, at most a quarter of them objects."""
    score_threshold: float = 0.05
    nms: float = 0.5
    """Overlap above which the lower of two detections of one class goes."""
    detections: int = 100
    """Kept an image."""

    def __post_init__(self):
        if self.head not in _PROPOSALS:
            raise ConfigError(f"There is no detection head '{self.head}'. Choose c4 or fpn.")
        for name, value in _PROPOSALS[self.head].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in (f.name for f in fields(self) if f.type.startswith("int")):
            if getattr(self, name) < 1:
                raise ConfigError(f"A detector's {name} is {getattr(self, name)}. Set it to 1 or more.")


@dataclass(frozen=True)
class Target:
    """The objects of one training image."""

    boxes: Tensor
    """float32 [n, 4]: x0, y0, x1, y1 in pixels of the image as the network gets it, inside it, not empty."""
    classes: Tensor
    """int64 [n], 0..K-1."""
    polygons: list[ObjectMask] | None = None
    """Of each object; Mask R-CNN needs them."""


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first."""

    boxes: Tensor
    """float32 [n, 4], x0, y0, x1, y1 in pixels."""
    scores: Tensor
    """float32 [n]."""
    classes: Tensor
    """int64 [n]."""
    masks: Tensor | None = None
    """From the network float32 [n, M, M], probabilities inside the box; after `postprocess` bool [n, H, W]."""
