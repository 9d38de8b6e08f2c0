"""DINO and SCFS on the engine: nothing read back, one graph for two resolutions, views refused early, teachers that never drop."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch

from fastssl.config import ConfigError, EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import State, prepare, train_step
from fastssl.methods import METHODS
from fastssl.methods.scfs import SCFS
from fastssl.models.backbones import build_backbone
from fastssl.models.vit import ViT
from fastssl.presets import PRESETS
from fastssl.recipes import byol_asymmetric, dino
from tests.golden.dino_family import TinyConv, grouped
from tests.unit.test_engine import NoHostReads

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
SIZES = (32, 32, 16, 16, 16)
BACKBONES = {
    "dino_mini": partial(TinyConv, (4, 6, 6, 8)),
    "scfs_mini": partial(TinyConv, (4, 6, 6, 8)),
    "dino_vit_mini": partial(ViT, 16, 3, 2, 8, image_size=32, drop_path=0.3),
}


def state_of(preset: str, *, compile: str = "off", dtype: str = "fp32", **method) -> State:
    cfg = PRESETS[preset]()
    small = {"out_dim": 24, "hidden": 16, "bottleneck": 8, **method}
    cfg = dataclasses.replace(
        cfg, method=dataclasses.replace(cfg.method, **small), efficiency=EfficiencyConfig(dtype=dtype, compile=compile)
    )
    torch.manual_seed(0)
    return prepare(METHODS[cfg.method.name](cfg.method, BACKBONES[preset], cfg.model.norm), cfg, ALONE, steps_per_epoch=2)


def crops(step: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(step)
    views = grouped([torch.randn(4, 3, s, s, generator=generator).numpy() for s in SIZES])
    for group in views.groups:
        group.pixels = group.pixels.to(dtype)
    return views


@pytest.mark.parametrize("preset", BACKBONES)
def test_a_step_reads_nothing_back(preset: str):
    state = state_of(preset)
    with NoHostReads():
        for step in range(3):
            train_step(state, [crops(step)])


@pytest.mark.slow
@pytest.mark.parametrize("preset", BACKBONES)
def test_one_graph_for_two_resolutions_and_all_epochs(preset: str):
    """Over epochs whose teacher temperature differs; the last layer is frozen in the first of them."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    warmup = {"warmup_teacher_temp_epochs": 3, "teacher_temp": 0.07}
    compiled, eager = (state_of(preset, compile=c, dtype="fp64", **warmup) for c in ("on", "off"))
    for step in range(6):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = train_step(compiled, [crops(step, torch.float64)]).loss
        if preset != "dino_vit_mini":  # drop path draws other numbers in a compiled graph
            torch.testing.assert_close(loss, train_step(eager, [crops(step, torch.float64)]).loss, rtol=1e-9, atol=0)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_teacher_temperature_and_frozen_layer_follow_the_epoch():
    state = state_of("dino_mini", warmup_teacher_temp=0.02, teacher_temp=0.06, warmup_teacher_temp_epochs=3, freeze_last_layer=2)
    last = state.method.student.head.last.v
    temperatures, moved = [], []
    for step in range(8):
        before = last.clone()
        train_step(state, [crops(step)])
        temperatures.append(round(state.method.teacher_temp.item(), 6))
        moved.append(not torch.equal(before, last))
    assert temperatures == [0.02, 0.02, 0.04, 0.04, 0.06, 0.06, 0.06, 0.06]
    assert moved == [False] * 4 + [True] * 4


def test_the_teacher_keeps_every_branch_and_starts_as_the_student():
    method = state_of("dino_vit_mini").method
    x = torch.randn(2, 3, 32, 32)
    assert method.teacher.training and method.teacher.backbone.blocks[2].training
    assert torch.equal(method.teacher([x]), method.teacher([x]))
    assert not torch.equal(method.student([x]), method.student([x]))
    method.student.eval()
    assert torch.equal(method.teacher([x]), method.student([x]))


def test_drop_path_follows_from_seed_step_and_rank():
    losses = [train_step(state_of("dino_vit_mini"), [crops(0)]).loss for _ in range(2)]
    other = prepare(state_of("dino_vit_mini").method, state_of("dino_vit_mini").cfg, dataclasses.replace(ALONE, rank=1), 2)
    assert losses[0] == losses[1] and train_step(other, [crops(0)]).loss != losses[0]


def test_entropy_says_whether_the_teacher_has_collapsed():
    state = state_of("dino_mini")
    out = train_step(state, [crops(0)])
    assert 0 < out.logs["teacher_entropy"].item() < math.log(24)


@pytest.mark.parametrize(
    ("name", "views"),
    [
        ("dino", dino(size=64, local_size=64, local_crops=2)),
        ("dino", byol_asymmetric(size=64)[:1]),
        ("dino", (*dino(size=64, local_size=32, local_crops=1), *byol_asymmetric(size=96))),
        ("scfs", dino(local_crops=0)),
    ],
)
def test_views_that_do_not_fit_are_refused(name: str, views):
    with pytest.raises(ConfigError, match="crop"):
        METHODS[name].check_views(views)
    METHODS["dino"].check_views(dino(local_crops=0))


def test_scfs_needs_stages():
    with pytest.raises(ConfigError, match="ResNet"):
        SCFS(PRESETS["scfs_mini"]().method, partial(build_backbone, "vit_tiny_patch16"), "local")
