"""fp16 with a GradScaler: a step that overflows changes no weight, lowers the scale, and still advances the target."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastssl.config import EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.methods.byol import BYOL
from fastssl.presets import PRESETS
from tests.golden.toy import ToyBackbone, two_views


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_skipped_step(device: str):
    cfg = dataclasses.replace(PRESETS["byol_mini"](), efficiency=EfficiencyConfig(dtype="fp16", compile="off"))
    torch.manual_seed(0)
    method = BYOL(BYOL.Config(hidden=32, dim=16), lambda: ToyBackbone(8, 16), "eman")
    state = prepare(method, cfg, Dist(0, 1, 0, 1, torch.device(device)), steps_per_epoch=4)
    assert state.scaler.get_scale() == 2.0**16

    def step() -> None:
        generator = torch.Generator().manual_seed(state.step)
        views = two_views(*torch.randn(2, 8, 3, 16, 16, generator=generator).half().numpy())
        views.groups[0].pixels = views.groups[0].pixels.to(device)
        train_step(state, [views])

    step()  # the scaler makes its tensors now
    state.scaler.update(new_scale=2.0**8)
    step()
    assert state.metrics._bad_run.item() == 0
    skipped = state.metrics._skipped.item()
    weights = {k: v.clone() for k, v in method.online.named_parameters()}
    target = method.target[0].conv1.weight.clone()
    state.scaler.update(new_scale=2.0**60)  # gradients overflow
    step()
    torch.testing.assert_close(dict(method.online.named_parameters()), weights, rtol=0, atol=0)
    assert state.scaler.get_scale() == 2.0**59
    assert state.metrics._skipped.item() == skipped + 1
    state.scaler.update(new_scale=2.0**8)
    step()
    assert not torch.equal(method.online.backbone.conv1.weight, weights["backbone.conv1.weight"])
    assert not torch.equal(method.target[0].conv1.weight, target)
