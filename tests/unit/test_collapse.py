"""Signs of a collapse: their values for embeddings that are spread, flat or constant; when the alarm sounds, and when it does not."""

from __future__ import annotations

import dataclasses
import logging
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastssl.collapse import SPREAD, effective_rank, embed_std, signs, target_entropy
from fastssl.config import EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import State, prepare, train_step
from fastssl.hooks import CollapseAlarm
from fastssl.methods import METHODS
from fastssl.presets import PRESETS
from tests.golden.dino_family import TinyConv, grouped

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


def embeddings(directions: int, rows: int = 400, dim: int = 32, noise: float = 0.0) -> torch.Tensor:
    """Rows that vary alike along so many orthogonal directions."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q[:directions]
    return torch.randn(rows, directions, generator=generator, dtype=torch.float64) @ basis + noise


@pytest.mark.parametrize(("directions", "dim"), [(1, 32), (2, 32), (8, 32), (32, 32), (8, 600)])
def test_effective_rank_counts_directions(directions: int, dim: int):
    z = embeddings(directions, dim=dim)
    assert float(effective_rank(z)) == pytest.approx(directions, rel=0.1)
    assert float(embed_std(z)) == pytest.approx(math.sqrt(dim) * float(torch.nn.functional.normalize(z).std(0).mean()))


def test_effective_rank_is_of_the_eigenvalues():
    x = torch.nn.functional.normalize(embeddings(5, rows=40) * torch.linspace(0.1, 2, 32, dtype=torch.float64))
    eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T))
    torch.testing.assert_close(effective_rank(x), eigenvalues.sum().square() / eigenvalues.square().sum())


def test_equal_embeddings_have_no_spread():
    z = torch.randn(1, 32).expand(64, 32)
    assert float(embed_std(z)) < 1e-5
    assert float(effective_rank(torch.zeros(64, 32))) == 0 and math.isfinite(float(effective_rank(z)))


def test_16_bits_and_autocast_are_widened():
    z = embeddings(8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert effective_rank(z).dtype == embed_std(z).dtype == torch.float32
        assert float(effective_rank(z)) == pytest.approx(float(effective_rank(z.double())), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"embed_std": 0.9, "effective_rank": 40.0}, []),
        ({"embed_std": 0.01, "effective_rank": 40.0}, ["embed_std 0.01 is below 0.05"]),
        ({"embed_std": 1.0, "effective_rank": 1.01}, ["one direction"]),
        ({"loss_loc": math.log(2), "loss": 0.0}, []),  # losses are not watched
    ],
)
def test_signs_of_embeddings(values: dict[str, float], says: list[str]):
    lines = signs(SPREAD, {f"train/{k}": v for k, v in values.items()})
    assert len(lines) == len(says) and all(part in line for part, line in zip(says, lines, strict=True))


@pytest.mark.parametrize(
    ("entropy", "says"), [(5.0, None), (6.92, None), (0.01, "same output. Raise --method.teacher-temp"), (math.log(1024), "are uniform")]
)
def test_signs_of_a_teacher(entropy: float, says: str | None):
    lines = signs((target_entropy("teacher_entropy", 1024),), {"train/teacher_entropy": entropy})
    assert len(lines) == (says is not None) and all(says in line for line in lines)


def toy(preset: str) -> State:
    cfg = PRESETS[preset]()
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, norm="local"),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off"),
        log=dataclasses.replace(cfg.log, every_steps=1),
    )
    torch.manual_seed(0)
    method = METHODS[cfg.method.name](cfg.method, lambda: TinyConv((4, 6, 6, 16)), "local")
    return prepare(method, cfg, ALONE, steps_per_epoch=2)


def run(state: State, steps: int, sizes: tuple[int, ...]) -> list[int]:
    """Steps at which the alarm could be heard -> those at which it sounded."""
    alarm, heard = CollapseAlarm(), []
    alarm.start(state)
    for _ in range(steps):
        views = grouped([torch.randn(16, 3, s, s, dtype=torch.float64).numpy() for s in sizes])
        state.metrics.add(train_step(state, [views]), 16)
        state.record = state.metrics.read(state, SimpleNamespace(wait_s=0.0))
        before = alarm.quiet_until
        alarm.after_step(state)
        if alarm.quiet_until != before:
            heard.append(state.step)
    return heard


def test_a_collapsed_run_is_heard_once_an_epoch(caplog):
    state = toy("byol_mini")  # one epoch of warm-up, of two steps
    with torch.no_grad():
        for net in (state.method.online, state.method.target):
            net.projector.mlp[-1].weight.zero_()
    with caplog.at_level(logging.WARNING, "fastssl"):
        assert run(state, 6, (16, 16)) == [2, 4, 6]
    first = caplog.messages[0]
    assert first.startswith("step 2: this run may have collapsed: train/embed_std") and "\n" not in first and "--optim.base-lr" in first


@pytest.mark.parametrize("preset", ["byol_mini", "mocov3_mini", "dino_mini"])
def test_a_sound_run_is_not_and_every_watched_value_is_logged(preset: str):
    state = toy(preset)
    assert run(state, 4, (16, 16, 8, 8, 8, 8) if preset == "dino_mini" else (16, 16)) == []
    assert {f"train/{w.metric}" for w in state.method.watches} <= set(state.record)


def test_the_teacher_of_a_uniform_head_is_heard():
    state = toy("dino_mini")
    with torch.no_grad():
        for net in (state.method.student, state.method.teacher):
            for m in net.backbone.modules():
                if isinstance(m, nn.BatchNorm2d):
                    m.weight.zero_(), m.bias.zero_()
    assert run(state, 3, (16, 16, 8, 8, 8, 8)) == [2]
