"""The detector beyond its goldens: weights from a backbone, first losses, images without objects or detections, precise-BN."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eval.detection.model import Detections, Detector, DetectorConfig, Target, detector_from_backbone, postprocess
from eval.detection.precise_bn import precise_bn
from fastssl.config import ConfigError
from fastssl.models.backbones import build_backbone
from fastssl.models.features import Backbone

CONFIGS = {
    head: DetectorConfig(head=head, classes=3, mask=True, arch="resnet18", roi_batch=8, rpn_post_nms_train=16, rpn_post_nms_test=4)
    for head in ("c4", "fpn")
}
SQUARE = np.array([10.0, 10, 40, 10, 40, 50, 10, 50])


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return build_backbone("resnet18").eval()


@pytest.fixture(scope="module", params=CONFIGS)
def detector(request, backbone: Backbone) -> Detector:
    torch.manual_seed(1)
    return detector_from_backbone(CONFIGS[request.param], backbone.state_dict())


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3, *hw, generator=generator) for hw in ((64, 96), (80, 70))]


def objects(*boxes: list[float]) -> Target:
    return Target(torch.tensor(boxes).reshape(-1, 4), torch.arange(len(boxes)) % 3, [[SQUARE] for _ in boxes])


TARGETS = [objects([10, 10, 40, 50], [30, 5, 90, 60]), objects()]


def test_the_trunk_is_the_backbone(detector: Detector, backbone: Backbone):
    x = images()[0][None]
    with torch.no_grad():
        stages = backbone(x).stages
        if detector.config.head == "c4":
            (layer3,) = detector.backbone.eval()(x)
            found = {"layer3": layer3, "layer4": detector.roi_heads.eval().res5[:2](layer3)}
        else:
            found = dict(zip(("layer2", "layer3", "layer4"), detector.backbone.eval().bottom_up(x)[1:], strict=True))
    for name, stage in found.items():
        torch.testing.assert_close(stage, stages[name])


def test_first_losses_and_gradients(detector: Detector):
    """Nothing is known yet, so every choice costs the log of its number; one image has no object, and nothing is frozen."""
    torch.manual_seed(0)
    losses = detector.train()(images(), TARGETS)
    sum(losses.values()).backward()
    assert losses.keys() == {"rpn_cls", "rpn_loc", "cls", "box_reg", "mask"}
    assert losses["mask"].item() == pytest.approx(math.log(2), abs=0.01)
    assert losses["cls"].item() == pytest.approx(math.log(4), abs=0.3)
    assert 0 < losses["rpn_cls"].item() < math.log(2) + 0.05
    without = [name for name, p in detector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without
    detector.zero_grad(set_to_none=True)


def test_detections_may_be_none(detector: Detector):
    detector.eval()
    with torch.no_grad():
        some = detector(images())
        detector.roi_heads.config = replace(detector.config, score_threshold=0.999)
        none = detector(images())
    detector.roi_heads.config = detector.config
    assert all(0 < len(d.boxes) <= 100 and len(d.masks) == len(d.boxes) and (d.scores > 0.05).all() for d in some)
    assert [postprocess(d, (64, 96), (128, 100)).masks.shape for d in none] == [(0, 128, 100)] * 2


def test_postprocess_scales_clips_and_pastes():
    boxes = torch.tensor([[-4.0, 2, 6, 8], [20, 2, 24, 8]])
    found = postprocess(Detections(boxes, torch.ones(2), torch.zeros(2), torch.ones(2, 4, 4)), (10, 20), (30, 40))
    assert found.boxes.tolist() == [[0, 6, 12, 24]]  # the other one is outside
    inside = found.masks[0, 6:24, :12]
    assert inside[2:-2, 2:-2].all() and found.masks.sum() == inside.sum()


def test_what_cannot_be_learnt_from_is_refused(detector: Detector):
    detector.train()
    for targets, message in (
        (None, "one Target an image"),
        ([objects(), objects()], "Leave such images out"),
        ([replace(TARGETS[0], polygons=None), TARGETS[1]], "polygons"),
    ):
        with pytest.raises(ValueError, match=message):
            detector(images(), targets)


def test_weights_of_another_network_are_refused(backbone: Backbone):
    with pytest.raises(ConfigError, match="not a resnet50"):
        detector_from_backbone(replace(CONFIGS["fpn"], arch="resnet50"), backbone.state_dict())


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match="Choose c4 or fpn"):
        DetectorConfig(head="dc5", classes=3, mask=True)
    with pytest.raises(ConfigError, match="roi_batch"):
        DetectorConfig(head="fpn", classes=3, mask=True, roi_batch=0)


def test_precise_bn_leaves_everything_else():
    """A layer that never runs keeps its statistics; modes and momenta come back."""
    model = nn.ModuleDict({"used": nn.BatchNorm2d(2), "unused": nn.BatchNorm2d(2)}).eval()
    model.forward = lambda x: model["used"](x)
    x = torch.randn(8, 2, 3, 3, generator=torch.Generator().manual_seed(0)) * 3 + 1
    precise_bn(model, [(x[:3],), (x[3:],)])
    torch.testing.assert_close(model["used"].running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(model["used"].running_var, x.var((0, 2, 3), correction=0))
    assert model["unused"].running_var.tolist() == [1, 1]
    assert not model.training and model["used"].momentum == 0.1
