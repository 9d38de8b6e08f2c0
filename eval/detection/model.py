"""The detector: images and objects -> losses in training, images -> detections otherwise."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from eval.detection.boxes import clip, not_empty
from eval.detection.config import Detections, DetectorConfig, Target
from eval.detection.masks import paste_masks
from eval.detection.norm import NORMS
from eval.detection.roi import C4Heads, FPNHeads
from eval.detection.rpn import RPN
from eval.detection.trunk import C4, FPN
from fastssl.config import ConfigError
from fastssl.models.keymaps import detectron2_c4, detectron2_fpn, renamed

__all__ = ["Detections", "Detector", "DetectorConfig", "Target", "detector_from_backbone", "postprocess", "weight_decay_groups"]


class Detector(nn.Module):
    """Images float32 [3, h, w] each, normalised, of any sizes -> losses {rpn_cls, rpn_loc, cls, box_reg[, mask]} whose plain sum is
    minimised, in training; otherwise one Detections an image, in pixels of that image.  Names of weights are Detectron2's.

    In training: ValueError for a batch without any object where masks are learnt, or with a target without masks;
    FloatingPointError once it has diverged.
    """

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.config = config
        norm = NORMS[config.syncbn]
        trunk, heads = (C4, C4Heads) if config.head == "c4" else (FPN, FPNHeads)
        self.backbone = trunk(config.arch, norm)
        self.proposal_generator = RPN(config, self.backbone.out_channels)
        self.roi_heads = heads(config, self.backbone.out_channels, norm)

    def forward(self, images: list[Tensor], targets: list[Target] | None = None) -> dict[str, Tensor] | list[Detections]:
        if self.training:
            self._check(images, targets)
        sizes = [tuple(image.shape[1:]) for image in images]
        maps = self.backbone(_batch(images, multiple=32 if self.config.head == "fpn" else 1))
        found, losses = self.proposal_generator(maps, sizes, targets if self.training else None)
        proposals = [boxes for boxes, _ in found]
        if self.training:
            return losses | self.roi_heads.losses(maps, proposals, targets)
        return self.roi_heads.detections(maps, proposals, sizes)

    def _check(self, images: list[Tensor], targets: list[Target] | None) -> None:
        if targets is None or len(targets) != len(images):
            raise ValueError(f"A detector in training takes one Target an image, got {len(images)} images and {targets}.")
        if self.config.mask:
            if any(t.polygons is None or len(t.polygons) != len(t.boxes) for t in targets):
                raise ValueError("Mask R-CNN learns from the masks of all objects: give each Target its polygons.")
            if not any(len(t.boxes) for t in targets):
                raise ValueError("No image of this batch has an object, and the mask head learns from objects only. Leave such images out.")


def _batch(images: list[Tensor], multiple: int) -> Tensor:
    """[B, 3, H, W]: zeros to the right and below, up to the largest sides, rounded up to multiples."""
    height, width = (-(-max(image.shape[side] for image in images) // multiple) * multiple for side in (1, 2))
    batch = images[0].new_zeros((len(images), 3, height, width))
    for row, image in zip(batch, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return batch


def postprocess(detections: Detections, in_hw: tuple[int, int], out_hw: tuple[int, int]) -> Detections:
    """Detections in an image of in_hw pixels (height, width) in those of the original of out_hw; empty boxes dropped, masks pasted:
    bool [n, H, W]."""
    scale = detections.boxes.new_tensor((out_hw[1] / in_hw[1], out_hw[0] / in_hw[0]) * 2)
    boxes = clip(detections.boxes * scale, out_hw)
    kept = not_empty(boxes)
    boxes = boxes[kept]
    masks = None if detections.masks is None else paste_masks(detections.masks[kept], boxes, out_hw)
    return Detections(boxes, detections.scores[kept], detections.classes[kept], masks)


def detector_from_backbone(config: DetectorConfig, backbone_state: dict[str, Tensor]) -> Detector:
    """A detector whose trunk is a pretrained ResNet (torchvision's names, as `load_backbone(...)[0].state_dict()`), the rest fresh
    from torch's generator.  ConfigError where the weights are not exactly those of `config.arch`."""
    state = renamed(backbone_state, detectron2_c4 if config.head == "c4" else detectron2_fpn)
    with torch.device("meta"):
        own = Detector(config).state_dict()
    trunk = {n for n in own if n.startswith(("backbone.", "roi_heads.res5.")) and not re.search(r"fpn_|res5\.norm|batches_tracked", n)}
    missing, wrong = trunk - state.keys(), [n for n, t in state.items() if n not in own or own[n].shape != t.shape]
    if missing or wrong:
        raise ConfigError(
            f"These weights are not a {config.arch}: {len(missing)} are missing, and {len(wrong)} do not fit ({', '.join(wrong[:2])}). "
            f"Detection takes ResNets without their classifier; set the detector's arch to the name of this one."
        )
    detector = Detector(config)
    detector.load_state_dict(state, strict=False)
    return detector


def weight_decay_groups(detector: Detector, weight_decay: float) -> list[dict]:
    """For torch.optim.SGD: weight decay on weights and biases, none on those of BatchNorms (methods/transfer.md, 2)."""
    norms = {p for m in detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters(recurse=False)}
    decayed = [p for p in detector.parameters() if p not in norms]
    free = [p for p in detector.parameters() if p in norms]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
