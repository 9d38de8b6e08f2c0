"""The step: accumulation, skipped steps, EMA order, float types; on a method small enough to compute by hand."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastssl.config import ConfigError, EfficiencyConfig, Lars, ModelConfig, RunConfig, TrainConfig
from fastssl.distributed import Dist
from fastssl.ema import Ema, frozen_copy
from fastssl.engine import prepare, resolve_dtype, train_step
from fastssl.method import Method, StepOutput
from fastssl.methods.byol import BYOL
from fastssl.views import byol_asymmetric
from tests.golden.toy import two_views

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))


class Regression(Method):
    """A linear layer without BatchNorm: accumulation must not change its gradients."""

    backbone_prefix = "online."

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.online = nn.Linear(3 * 4 * 4, 2, dtype=torch.float64)
        self.target = frozen_copy(self.online)
        self.ema = (Ema(self.online, self.target),)

    def forward(self, views, sched):
        x, y = (v.flatten(1) for v in views.per_view())
        with torch.no_grad():
            wanted = self.target(y)
        return StepOutput((self.online(x) - wanted).square().mean(), {"mean": x.mean()})


def config(**train) -> RunConfig:
    return RunConfig(
        preset="test",
        method=BYOL.Config(),
        model=ModelConfig(),
        views=byol_asymmetric(),
        optim=Lars(base_lr=0.5, warmup_epochs=1, weight_decay=0.1),
        train=TrainConfig(**{"epochs": 4, "global_batch_size": 8, "ema_momentum": 0.9, **train}),
        efficiency=EfficiencyConfig(dtype="fp64", compile="off", channels_last=False),
    )


def batch(seed: int = 1):
    return torch.randn(2, 8, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()


@pytest.mark.parametrize("n", [2, 4])
def test_accumulation_is_one_large_batch(n: int):
    x, y = batch()
    whole, parts = prepare(Regression(), config(), ALONE, 2), prepare(Regression(), config(accumulation_steps=n), ALONE, 2)
    for _ in range(3):
        out = train_step(whole, [two_views(x, y)])
        share = 8 // n
        out_n = train_step(parts, [two_views(x[k * share : (k + 1) * share], y[k * share : (k + 1) * share]) for k in range(n)])
        torch.testing.assert_close(out_n.loss, out.loss)
        torch.testing.assert_close(out_n.logs["mean"], out.logs["mean"])
    torch.testing.assert_close(parts.method.state_dict(), whole.method.state_dict())


def test_a_bad_step_changes_no_weight_and_is_counted():
    state = prepare(Regression(), config(), ALONE, 2)
    x, y = batch()
    train_step(state, [two_views(x, y)])
    weights = {k: v.clone() for k, v in state.method.online.state_dict().items()}
    buffers = [state.optimizer.state[p]["momentum_buffer"].clone() for p in state.method.online.parameters()]
    x[0, 0, 0, 0] = float("nan")
    for expected_run in (1, 2):
        train_step(state, [two_views(x, y)])
        assert state.metrics._bad_run.item() == expected_run
    torch.testing.assert_close(state.method.online.state_dict(), weights, rtol=0, atol=0)
    after = [state.optimizer.state[p]["momentum_buffer"] for p in state.method.online.parameters()]
    torch.testing.assert_close(after, buffers, rtol=0, atol=0)
    train_step(state, [two_views(*batch())])
    assert state.metrics._bad_run.item() == 0 and state.metrics._skipped.item() == 2
    assert not torch.equal(state.method.online.weight, weights["weight"])


def test_the_target_follows_after_the_step():
    state = prepare(Regression(), config(), ALONE, 2)
    before = state.method.target.weight.clone()
    momentum = state.schedules.at(0).ema_momentum
    train_step(state, [two_views(*batch())])
    expected = momentum * before + (1 - momentum) * state.method.online.weight
    torch.testing.assert_close(state.method.target.weight, expected)
    assert momentum == pytest.approx(0.9) and all(not p.requires_grad for p in state.method.target.parameters())


def test_eman_target_stays_in_eval_mode():
    from tests.golden.toy import ToyBackbone

    method = BYOL(BYOL.Config(hidden=8, dim=4), lambda: ToyBackbone(2, 4), "eman")
    assert method.train().target.training is False and method.online.training
    assert BYOL(BYOL.Config(hidden=8, dim=4), lambda: ToyBackbone(2, 4), "local").train().target.training


def test_warmup_must_end_before_training():
    cfg = dataclasses.replace(config(), optim=Lars(base_lr=1.0, warmup_epochs=4))
    with pytest.raises(ConfigError, match="warmup-epochs"):
        prepare(Regression(), cfg, ALONE, 2)


def test_dtype_by_device():
    assert resolve_dtype("auto", torch.device("cpu")) is torch.bfloat16
    assert resolve_dtype("fp32", torch.device("cpu")) is torch.float32


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("channels_last", [True, False])
def test_efficiency_switches_keep_the_loss(dtype: str, channels_last: bool):
    """Losses of three steps stay within rounding of the float64 run."""
    from tests.golden.toy import ToyBackbone

    def losses(efficiency: EfficiencyConfig) -> torch.Tensor:
        torch.manual_seed(0)
        cfg = dataclasses.replace(config(), efficiency=efficiency)
        state = prepare(BYOL(BYOL.Config(hidden=32, dim=16), lambda: ToyBackbone(8, 16), "local"), cfg, ALONE, 2)
        images = torch.randn(2, 16, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        images = images.to(torch.float32) if state.dtype is not torch.float64 else images
        return torch.stack([train_step(state, [two_views(*images.numpy())]).loss.double() for _ in range(3)])

    exact = losses(EfficiencyConfig(dtype="fp64", compile="off", channels_last=False))
    tolerance = 0.03 if dtype == "bf16" else 1e-4
    torch.testing.assert_close(
        losses(EfficiencyConfig(dtype=dtype, compile="off", channels_last=channels_last)), exact, rtol=tolerance, atol=0
    )


def test_rates_leave_out_a_pause_and_the_steps_before_it(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fastssl.metrics.time.perf_counter", lambda: now[0])
    state = prepare(Regression(), config(), ALONE, 2)
    x, y = batch()
    for number in range(5):
        state.metrics.add(train_step(state, [two_views(x, y)]), images=8)
        now[0] += 2.0
        if number == 2:  # a checkpoint between two log lines
            now[0] += 100.0
            state.metrics.restart_clock()
    record = state.metrics.read(state, SimpleNamespace(wait_s=0.0))
    assert (record["perf/step_ms"], record["perf/img_per_s"]) == (2000.0, 4.0)
