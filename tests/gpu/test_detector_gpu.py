"""The detector on a GPU: the CPU's losses, gradients and detections."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.detection.model import Detections, Detector, DetectorConfig, Target, postprocess

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("head", ["c4", "fpn"])
def test_losses_gradients_and_detections(head):
    few = {"rpn_pre_nms_train": 50, "rpn_pre_nms_test": 50, "rpn_post_nms_train": 24, "rpn_post_nms_test": 12, "detections": 8}
    everything = {"rpn_batch": 20000, "roi_batch": 4000}  # generators differ between the devices, so nothing is drawn
    config = DetectorConfig(head=head, classes=3, mask=True, arch="resnet18", score_threshold=0.0, **few, **everything)
    torch.manual_seed(0)
    reference = Detector(config).double()
    detector = copy.deepcopy(reference).float().cuda().to(memory_format=torch.channels_last)
    images = [torch.randn(3, 64, 96, dtype=torch.float64), torch.randn(3, 80, 70, dtype=torch.float64)]
    boxes = torch.tensor([[10.0, 10, 40, 50], [30, 5, 69, 60]])
    square = np.array([10.0, 10, 40, 10, 40, 50, 10, 50])
    target = Target(boxes, torch.tensor([0, 2]), [[square], [square + 20]])
    there = replace(target, boxes=boxes.cuda(), classes=target.classes.cuda())

    expected = reference.train()(images, [target] * 2)
    losses = detector.train()([x.float().cuda() for x in images], [there] * 2)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name].double().cpu(), loss, rtol=1e-3, atol=1e-5)
    for parts in (expected, losses):
        sum(parts.values()).backward()
    norms = [{n: p.grad.norm().item() for n, p in d.named_parameters()} for d in (reference, detector)]
    assert norms[1] == pytest.approx(norms[0], rel=0.02, abs=1e-3)

    detector.load_state_dict(reference.state_dict())
    with torch.no_grad():
        expected, found = reference.eval()(images), detector.eval()([x.float().cuda() for x in images])
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f.boxes.double().cpu(), e.boxes, rtol=0, atol=0.05)
        torch.testing.assert_close(f.masks.double().cpu(), e.masks, rtol=0, atol=1e-3)
        same = Detections(e.boxes.cuda(), e.scores.cuda(), e.classes.cuda(), e.masks.cuda())
        assert torch.equal(postprocess(same, (64, 96), (128, 192)).masks.cpu(), postprocess(e, (64, 96), (128, 192)).masks)
