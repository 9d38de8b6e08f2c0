"""SFRIK, SimCLR, AUH and VICReg: what a BatchNorm batch is, what they refuse, one graph, 16 bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fastssl import cli
from fastssl.config import BarlowLars, ConfigError, EfficiencyConfig, RunConfig, TrainConfig
from fastssl.distributed import Dist
from fastssl.engine import State, prepare, train_step
from fastssl.methods import METHODS
from fastssl.models.heads import ExpanderMLP
from fastssl.optim.build import build_schedules
from fastssl.presets import PRESETS
from fastssl.recipes import obow, swav
from fastssl.views import Crop, View
from tests.golden.dino_family import TinyConv, grouped

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
FAMILY = ("sfrik_mini", "simclr_mini", "auh_mini", "vicreg_mini")
TWO, MULTI_CROP = (16, 16), (16, 16, 8, 8, 8)


def state_of(preset: str, *, dtype: str = "fp64", compile: str = "off", batch: int = 6, **changed) -> State:
    cfg = PRESETS[preset]()
    cfg = dataclasses.replace(
        cfg,
        method=dataclasses.replace(cfg.method, mlp="24-20", **changed),
        train=TrainConfig(epochs=4, global_batch_size=batch),
        efficiency=EfficiencyConfig(dtype=dtype, compile=compile),
    )
    torch.manual_seed(0)
    return prepare(METHODS[cfg.method.name](cfg.method, lambda: TinyConv((6, 8, 8, 16)), cfg.model.norm), cfg, ALONE, steps_per_epoch=3)


def images(sizes: tuple[int, ...], batch: int = 6, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(1)
    views = grouped([torch.randn(batch, 3, s, s, generator=generator, dtype=torch.float64).numpy() for s in sizes])
    for group in views.groups:
        group.pixels = group.pixels.to(dtype)
    return views


@pytest.mark.parametrize(("sizes", "passes"), [(TWO, 2), (MULTI_CROP, 2), ((16, 8, 8), 2), ((16, 8, 4), 3)])
def test_two_views_are_two_batches_and_multi_crops_one_a_group(sizes: tuple[int, ...], passes: int):
    state = state_of("sfrik_mini")
    z = state.method.project(images(sizes))
    assert [tuple(x.shape) for x in z] == [(6, 20)] * len(sizes)
    assert {int(v) for k, v in state.method.state_dict().items() if k.endswith("num_batches_tracked")} == {passes}


def test_reg_small_spreads_the_small_views():
    views = images(MULTI_CROP)
    logs = {}
    for reg_small in (True, False):
        method = state_of("sfrik_mini", reg_small=reg_small).method
        logs[reg_small] = method(views, None).logs
    torch.testing.assert_close(logs[True]["align"], logs[False]["align"], rtol=0, atol=0)
    assert logs[True]["mmd"] != logs[False]["mmd"]


def test_a_smaller_last_batch_keeps_vicregs_divisor():
    """Covariance / (configured batch - 1), variance / (rows - 1) (methods/vicreg.md, quirk)."""
    method, views = state_of("vicreg_mini", batch=64).method, images(TWO)
    x, y = method.project(views)
    logs = method(views, None).logs
    cov = std = 0.0
    for z in (x, y):
        centred = z - z.mean(0)
        c = centred.T @ centred / 63
        cov = cov + (c.square().sum() - c.diagonal().square().sum()) / 20
        std = std + torch.relu(1 - torch.sqrt(z.var(0) + 1e-4)).mean() / 2
    torch.testing.assert_close((logs["cov"], logs["std"]), (cov.detach(), std.detach()))


@pytest.mark.parametrize("preset", FAMILY)
def test_16_bits(preset: str):
    """Projections leave the network in bf16; losses and gradients are fp32 and finite, near those of fp64."""
    exact, rounded = state_of(preset), state_of(preset, dtype="bf16")
    for _ in range(3):
        a, b = train_step(exact, [images(TWO)]), train_step(rounded, [images(TWO, dtype=torch.bfloat16)])
        assert b.loss.dtype is torch.float32
        torch.testing.assert_close(b.loss.double(), a.loss, rtol=0.1, atol=0)
    assert all(torch.isfinite(p).all() for p in rounded.method.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "changed", "sizes"),
    [*((preset, {}, TWO) for preset in FAMILY), ("sfrik_mini", {"general_indices": (0,)}, MULTI_CROP)],
)
def test_compiled_is_eager(preset: str, changed: dict, sizes: tuple[int, ...]):
    """One graph without breaks for the full batch, one for a kept last batch; both compiled in the first epoch and not again."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, eager = state_of(preset, compile="on", **changed), state_of(preset, **changed)
    graphs = []
    for _ in range(2):
        for size in (6, 6, 4):
            views = images(sizes, size)
            torch.testing.assert_close(train_step(compiled, [views]).loss, train_step(eager, [views]).loss, rtol=1e-9, atol=0)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [2, 2] and not torch._dynamo.utils.counters["graph_break"]


def test_the_projector_of_a_string():
    shapes = [tuple(p.shape) for p in ExpanderMLP(5, "7-6-9").parameters()]
    assert shapes == [(7, 5), (7,), (7,), (7,), (6, 7), (6,), (6,), (6,), (9, 6)]
    assert [tuple(p.shape) for p in ExpanderMLP(5, "9").parameters()] == [(9, 5)]


@pytest.mark.parametrize("widths", ["", "8-", "8-0-4", "8,8", "8 - 8", "-8", "eight"])
def test_strings_that_are_no_projector(widths: str):
    with pytest.raises(ConfigError, match="8192-8192-32768"):
        ExpanderMLP(5, widths)


def with_method(preset: str, views: tuple[View, ...] | None = None, **changed) -> RunConfig:
    cfg = PRESETS[preset]()
    return dataclasses.replace(cfg, method=dataclasses.replace(cfg.method, **changed), views=views or cfg.views)


@pytest.mark.parametrize(
    ("cfg", "says"),
    [
        (with_method("sfrik_mini", general_indices=(0, 2)), "some of the 2 views 0 .. 1"),
        (with_method("sfrik_mini", general_indices=()), "general-indices"),
        (with_method("sfrik_mini", general_indices=(1, 1)), "once each"),
        (with_method("sfrik_mini", swav(), general_indices=(0, 8)), "some of the 8 views"),
        (with_method("sfrik_mini", obow(), general_indices=(0, 8)), "some of the 8 views"),
        (with_method("sfrik_mini", (View(),), general_indices=(0,)), "at least two"),
        (with_method("simclr_mini", swav()), "SimCLR trains on two views"),
        (with_method("auh_mini", (View(), View(crop=Crop(size=96)))), "AUH trains on two views"),
        (with_method("vicreg_mini", obow()), "VICReg trains on two views"),
    ],
)
def test_impossible_views(cfg: RunConfig, says: str):
    with pytest.raises(ConfigError, match=says):
        cli.check(cfg, world=1)


@pytest.mark.parametrize("weights", [(), (1.0, -1.0), (0.0, 0.0)])
def test_impossible_kernels(weights: tuple[float, ...]):
    with pytest.raises(ConfigError, match=r"--method\.weights"):
        state_of("sfrik_mini", weights=weights)


@pytest.mark.parametrize("preset", FAMILY)
def test_accumulation_is_refused(preset: str):
    cfg = PRESETS[preset]()
    with pytest.raises(ConfigError, match="across the global batch: accumulation would change its loss. Use more ranks"):
        cli.check(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, accumulation_steps=2)), world=1)


def test_the_learning_rate_ends_at_a_thousandth():
    optim = BarlowLars(base_lr=1.2, base_batch_size=256, schedule="vicreg", warmup_epochs=1)
    cfg = dataclasses.replace(PRESETS["sfrik_mini"](), optim=optim, train=TrainConfig(epochs=3, global_batch_size=2048))
    lr = [build_schedules(cfg, 4).at(t).lr for t in range(12)]
    assert lr[:5] == pytest.approx([0, 2.4, 4.8, 7.2, 9.6])
    assert lr[8] == pytest.approx((9.6 + 0.0096) / 2) and 0.0096 < lr[11] < 0.5
    assert "0.0096  (0.001 of the peak; a cosine ends there after 3 epochs)" in cli.describe(cfg, world=1)
