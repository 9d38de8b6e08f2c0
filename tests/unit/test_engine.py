"""The step: accumulation, skipped steps, frozen layers, EMA order, float types; on methods small enough to compute by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl import checkpoint
from fastssl.config import AdamW, BarlowLars, EfficiencyConfig, Lars, ModelConfig, OptimConfig, RunConfig, Sgd, TrainConfig
from fastssl.distributed import Dist
from fastssl.ema import Ema, frozen_copy
from fastssl.engine import prepare, resolve_dtype, train_step
from fastssl.method import Method, StepOutput
from fastssl.methods.byol import BYOL
from fastssl.recipes import byol_asymmetric
from tests.golden.toy import two_views
from tests.ranks import run_ranks

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
LARS = Lars(base_lr=0.5, warmup_epochs=1, weight_decay=0.1)
OPTIMIZERS = (
    LARS,
    BarlowLars(base_lr=0.5, warmup_epochs=1, weight_decay=0.1, clip_grad=0.3, schedule="dino"),
    Sgd(base_lr=0.1, warmup_epochs=1, weight_decay=0.1, clip_grad=0.3, schedule="dino"),
    AdamW(base_lr=0.01, warmup_epochs=1, weight_decay=0.1, weight_decay_end=0.2, clip_grad=0.3, schedule="dino"),
)


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


class FrozenLast(Regression):
    """A last layer without updates in epoch 0, and a scalar of the epoch in a buffer, as in DINO."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(2, 3, dtype=torch.float64)
        self.register_buffer("temperature", torch.zeros((), dtype=torch.float64), persistent=False)

    def before_step(self, sched):
        self.temperature.fill_(1 + sched.epoch)

    def dropped_gradients(self, sched):
        return self.last.parameters() if sched.epoch < 1 else ()

    def forward(self, views, sched):
        x, y = (v.flatten(1) for v in views.per_view())
        with torch.no_grad():
            wanted = self.target(y).sum(1, keepdim=True)
        loss = (self.last(self.online(x)) - wanted).square().mean() / self.temperature
        return StepOutput(loss, {"temperature": self.temperature.clone()})


def config(optim: OptimConfig = LARS, **train) -> RunConfig:
    return RunConfig(
        preset="test",
        method=BYOL.Config(),
        model=ModelConfig(),
        views=byol_asymmetric(),
        optim=optim,
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


@pytest.mark.parametrize(("dtype", "scale"), [("bf16", 1.0), ("fp32", 1.0), ("fp64", 1.0), ("fp16", 2.0**13)])
def test_skipped_steps_lower_the_scale_of_fp16_only(dtype: str, scale: float):
    cfg = dataclasses.replace(config(), efficiency=EfficiencyConfig(dtype=dtype, compile="off"))
    state = prepare(Regression(), cfg, ALONE, 2)
    x, y = batch()
    x[0, 0, 0, 0] = float("nan")
    for _ in range(3):
        train_step(state, [two_views(x, y)])
    assert state.metrics._skipped.item() == 3 and state.scaler.get_scale() == scale


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_a_frozen_layer_starts_in_its_epoch(optim: OptimConfig):
    """Two steps an epoch: the last layer keeps its weights in epoch 0 and moves from then on, as if its first step came there; the layer
    before it moves all the time."""
    state = prepare(FrozenLast(), config(dataclasses.replace(optim, warmup_epochs=0)), ALONE, 2)
    last, online, temperatures = [], [], []
    for seed in range(4):
        last.append(state.method.last.weight.clone())
        online.append(state.method.online.weight.clone())
        temperatures.append(train_step(state, [two_views(*batch(seed))]).logs["temperature"].item())
    assert temperatures == [1, 1, 2, 2]
    assert torch.equal(last[0], last[2]) and not torch.equal(last[2], last[3]) and not torch.equal(online[0], online[1])
    assert state.metrics._skipped.item() == 0
    if isinstance(optim, AdamW):
        counters = [state.optimizer.state[p]["step"].item() for p in (state.method.online.weight, state.method.last.weight)]
        assert counters == [4, 2]


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_resuming_with_a_frozen_layer_changes_nothing(optim: OptimConfig, at: int, tmp_path: Path):
    """Checkpoints from before and after the last layer's first update."""

    def steps(state, until: int) -> None:
        while state.step < until:
            train_step(state, [two_views(*batch(state.step))])

    whole, parts = (prepare(FrozenLast(), config(optim), ALONE, 2) for _ in range(2))
    steps(whole, 6)
    steps(parts, at)
    resumed = prepare(FrozenLast(), config(optim), ALONE, 2)
    checkpoint.restore(resumed, checkpoint.save(parts, tmp_path))
    steps(resumed, 6)
    torch.testing.assert_close(resumed.method.state_dict(), whole.method.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"], rtol=0, atol=0)


def train_frozen(rank: int, world: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights after five steps with every optimizer, without and with accumulation."""
    out = {}
    for optim in OPTIMIZERS:
        for n in (1, 2):
            state = prepare(
                FrozenLast(), config(optim, accumulation_steps=n), Dist(rank, world, rank, world, torch.device("cpu")), steps_per_epoch=2
            )
            for seed in range(5):
                x, y = batch(seed)
                share = len(x) // (world * n)
                starts = [(rank * n + k) * share for k in range(n)]
                train_step(state, [two_views(x[a : a + share], y[a : a + share]) for a in starts])
            out[f"{type(optim).__name__} {n}"] = state.method.state_dict()
    return out


@pytest.mark.slow
def test_two_ranks_with_a_frozen_layer_are_one():
    """DDP's bucket views and static graph (which accumulation switches off) go on where a gradient was dropped."""
    one = train_frozen(0, 1)
    for rank in run_ranks(2, train_frozen):
        torch.testing.assert_close(rank, one, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["fp16", "fp64"])
def test_every_gradient_is_clipped_by_itself(dtype: str):
    """Weight and bias both move by lr x the largest norm, whatever the scale of fp16's loss."""
    optim = Sgd(base_lr=0.1, warmup_epochs=0, clip_grad=1e-3, schedule="dino")
    cfg = dataclasses.replace(config(optim), efficiency=EfficiencyConfig(dtype=dtype, compile="off"))
    state = prepare(Regression(), cfg, ALONE, 2)
    state.method.target.weight.data.neg_()  # the networks differ from the first step on
    before = [p.clone() for p in state.method.online.parameters()]
    train_step(state, [two_views(*batch())])
    moved = [(p - b).norm().item() for p, b in zip(state.method.online.parameters(), before, strict=True)]
    assert moved == pytest.approx([1e-4, 1e-4], rel=0.01)


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor's value is asked for by Python."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value went to the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_a_step_reads_nothing_back(optim: OptimConfig, dtype: str):
    cfg = dataclasses.replace(config(optim), efficiency=EfficiencyConfig(dtype=dtype, compile="off"))
    state = prepare(FrozenLast(), cfg, ALONE, 2)
    with NoHostReads():
        for seed in range(3):
            train_step(state, [two_views(*batch(seed))])
        with pytest.raises(AssertionError, match="went to the host"):
            state.metrics._skipped.item()


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


def test_dtype_by_device():
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert resolve_dtype("auto", torch.device("cpu")) is (torch.bfloat16 if native else torch.float32)
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


def test_a_skipped_step_is_left_out_of_the_means_of_its_window():
    state = prepare(Regression(), config(), ALONE, 2)
    losses = []
    for number in range(3):
        x, y = batch(number)
        if number == 1:
            x[0, 0, 0, 0] = float("nan")
        with NoHostReads():
            out = train_step(state, [two_views(x, y)])
            state.metrics.add(out, images=8)
        losses.append(out.loss.item())
    record = state.metrics.read(state, SimpleNamespace(wait_s=0.0))
    assert record["train/loss"] == pytest.approx((losses[0] + losses[2]) / 2) and math.isfinite(record["train/mean"])
    assert (record["train/skipped_steps"], record["train/bad_run"]) == (1, 0)
    state.metrics.add(StepOutput(torch.tensor(math.inf), {"mean": torch.tensor(2.0)}), images=8)
    record = state.metrics.read(state, SimpleNamespace(wait_s=0.0))
    assert math.isnan(record["train/loss"]) and record["train/mean"] == 2


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
