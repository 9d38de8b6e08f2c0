"""Optimizers, parameter groups, clipping and schedules apart from the engine's loop."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from fastssl.config import AdamW, BarlowLars, Lars, OptimConfig, Sgd
from fastssl.optim.build import build_optimizer, build_schedules, set_scalars
from fastssl.optim.clip import clip_each_
from fastssl.optim.param_groups import split_by_shape
from fastssl.optim.schedules import Sched, warmup_cosine
from tests.unit.test_engine import OPTIMIZERS, config

SCHED = Sched(epoch=0, lr=0.1, weight_decay=0.05, ema_momentum=1.0)


def small_net() -> nn.Module:
    """No bias before BatchNorm: its gradient is rounding noise, and Adam makes whole steps of it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


def backward(net: nn.Module, seed: int, scaler: torch.amp.GradScaler | None = None) -> None:
    x = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    loss = net(x).square().mean()
    (loss if scaler is None else scaler.scale(loss)).backward()


# ------------------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_is_torchs_on_every_tensor(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 5), (3,), (2, 3, 3, 3), (4, 1), (1,))
    factors = (100.0, 1e-3, 1.0, 0.0, 3.0)
    params = [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in shapes]
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    grads = [torch.randn(s, dtype=dtype, generator=generator) * f for s, f in zip(shapes, factors, strict=True)]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    expected_norms = [torch.nn.utils.clip_grad_norm_([p], 2.0) for p in params]
    expected = [p.grad for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    norms = clip_each_([*params, nn.Parameter(torch.zeros(2))], 2.0)  # the last has no gradient
    torch.testing.assert_close(norms, torch.stack(expected_norms), rtol=0, atol=0)
    torch.testing.assert_close([p.grad for p in params], expected, rtol=0, atol=0)
    assert sum(not torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True)) >= 2


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_clipping_does_not_repair_a_bad_gradient(bad: float):
    p = nn.Parameter(torch.zeros(3))
    p.grad = torch.tensor([1.0, bad, 2.0])
    clip_each_([p], 1.0)
    assert not p.grad.isfinite().all()


@pytest.fixture
def interpreted():
    """Kernels run in Triton's interpreter, which conftest asks for where there is no GPU."""
    if torch.cuda.is_available():
        pytest.skip("with CUDA kernels are compiled: tests/gpu")
    pytest.importorskip("triton")


SHAPES = ((3,), (4, 4), (5, 7), (0,), (2, 3, 2, 2), (1, 1))
"""Of tensors smaller, as large and larger than the 16 elements of a program here, of another order in memory (the fifth), and of none."""


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    found = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    found[4] = found[4].to(memory_format=torch.channels_last)
    return found


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_multiplies_each_tensor_by_its_own_factor(dtype: torch.dtype):
    from fastssl.optim import scale_kernel

    given, factors = tensors(dtype), torch.tensor([2.0, math.nan, -0.3, 1.0, 0.0, 7.0], dtype=dtype)
    expected = [t * f for t, f in zip(given, factors, strict=True)]
    scale_kernel.launch(given, factors, block=16)
    torch.testing.assert_close(given, expected, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match="fp32"):
        scale_kernel.launch(given, factors.to(torch.float16))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_kernels_of_momentum_are_torchs_operations(decay: float, monkeypatch):
    from fastssl.optim import momentum, momentum_kernel

    monkeypatch.setattr(momentum_kernel, "PARTS", 2)
    torch.manual_seed(0)
    params, grads, buffers = tensors(), tensors(), tensors()
    expected = momentum.norms(params, grads, decay)
    torch.testing.assert_close(momentum_kernel.norms(params, grads, decay, block=16), expected)
    for scales in (torch.rand(len(params)), 0.7):
        for found_inf in (None, torch.zeros(()), torch.ones(())):
            theirs = [[t.clone() for t in group] for group in (params, grads, buffers)]
            ours = [[t.clone() for t in group] for group in (params, grads, buffers)]
            momentum.momentum_step_(*theirs, scales, decay, momentum=0.9, lr=0.2, found_inf=found_inf)
            momentum_kernel.step_(*ours, scales, decay, 0.9, 0.2, found_inf, block=16)
            torch.testing.assert_close(ours[0] + ours[2], theirs[0] + theirs[2])
            assert all(map(torch.equal, ours[0], params)) == (found_inf is not None and bool(found_inf))


def test_momentum_of_another_layout_is_taken_over():
    """As from a checkpoint of a run without channels-last."""

    def run(layout: torch.memory_format, saved: dict | None = None) -> torch.optim.Optimizer:
        conv = nn.Conv2d(3, 4, 3)
        with torch.no_grad():
            conv.weight.copy_(torch.arange(108.0).view(4, 3, 3, 3))
        conv.to(memory_format=layout)
        optimizer = build_optimizer(conv, config(BarlowLars(base_lr=1.0)))
        if saved is not None:
            optimizer.load_state_dict(copy.deepcopy(saved))
        for p in conv.parameters():
            p.grad = torch.ones_like(p) * torch.arange(float(p.shape[0])).view(-1, *[1] * (p.dim() - 1))
        optimizer.step()
        return optimizer

    first = run(torch.contiguous_format).state_dict()
    again = [run(layout, first) for layout in (torch.contiguous_format, torch.channels_last)]
    buffers = [[o.state[p]["momentum_buffer"] for g in o.param_groups for p in g["params"]] for o in again]
    torch.testing.assert_close(*buffers)
    assert buffers[1][0].is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------ groups


class VitLike(nn.Module):
    def __init__(self):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 5, 4))
        self.proj, self.norm, self.qkv = nn.Conv2d(3, 4, 2), nn.LayerNorm(4), nn.Linear(4, 12)
        self.v, self.g = nn.Parameter(torch.zeros(6, 4)), nn.Parameter(torch.ones(6, 1))
        self.table = nn.Module()
        self.table.bias = nn.Parameter(torch.zeros(3, 4))  # two-dimensional, and a bias by its name
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def test_groups_by_shape():
    adapted, excluded = split_by_shape(VitLike().named_parameters())
    assert adapted["names"] == ["cls_token", "pos_embed", "v", "g", "proj.weight", "qkv.weight"] and not adapted["excluded"]
    assert excluded["names"] == ["proj.bias", "norm.weight", "norm.bias", "qkv.bias", "table.bias"] and excluded["excluded"]


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda o: type(o).__name__)
def test_only_one_group_decays(optim: OptimConfig):
    optimizer = build_optimizer(VitLike(), config(dataclasses.replace(optim, weight_decay=0.3)))
    set_scalars(optimizer, SCHED)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.1, 0.05), (0.1, 0.0)]


# ------------------------------------------------------------------------------------------------ steps


def test_sgd_and_adamw_are_torchs_unfused():
    for optim, plain in (
        (Sgd(base_lr=1.0), lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=0.9)),
        (AdamW(base_lr=1.0), lambda groups: torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.999), eps=1e-8)),
    ):
        ours, theirs = small_net(), small_net()
        pairs = ((ours, build_optimizer(ours, config(optim))), (theirs, plain(split_by_shape(theirs.named_parameters()))))
        for step in range(3):
            for net, optimizer in pairs:
                set_scalars(optimizer, SCHED)
                backward(net, step)
                optimizer.step()
                optimizer.zero_grad()
        torch.testing.assert_close(dict(ours.named_parameters()), dict(theirs.named_parameters()), rtol=1e-5, atol=1e-6)


def test_barlow_lars_by_hand():
    """w = (3, 4) with decay 2 and g = (-6, -3): d = (0, 5), and with trust coefficient 0.5 the buffer takes (0, 2.5).  Then g = -2 w:
    d = 0, and the buffer shrinks to 0.9 of itself.  The bias is plain momentum SGD."""
    net = nn.Linear(2, 1).double()
    optimizer = build_optimizer(net, config(BarlowLars(base_lr=1.0, eta=0.5)))
    set_scalars(optimizer, dataclasses.replace(SCHED, lr=0.5, weight_decay=2.0))

    def step(weight_grad: list[float], bias_grad: float) -> list[float]:
        net.weight.grad = torch.tensor([weight_grad], dtype=torch.float64)
        net.bias.grad = torch.tensor([bias_grad], dtype=torch.float64)
        optimizer.step()
        return [*net.weight[0].tolist(), net.bias.item()]

    with torch.no_grad():
        net.weight.copy_(torch.tensor([[3.0, 4.0]]))
        net.bias.zero_()
    assert step([-6.0, -3.0], 1.0) == pytest.approx([3.0, 4 - 0.5 * 2.5, -0.5 * 1])
    assert step([-6.0, -2 * 2.75], 0.0) == pytest.approx([3.0, 2.75 - 0.5 * 0.9 * 2.5, -0.5 - 0.5 * 0.9])


@pytest.mark.parametrize("optim", OPTIMIZERS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_skipped_step_leaves_no_trace(optim: OptimConfig, bad_step: int):
    """Gradients of a step overflow under an fp16 GradScaler: weights and optimizer state go on as if it had not been.  At step 0
    torch's own fused SGD would keep uninitialised momentum."""

    def run(steps: list[int]) -> tuple[dict, list]:
        net = small_net()
        optimizer = build_optimizer(net, config(optim))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in steps:
            set_scalars(optimizer, SCHED)
            backward(net, abs(step), scaler)
            if step < 0:
                net[3].weight.grad[0, 0] = math.inf
            scaler.unscale_(optimizer)
            clip_each_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update(2.0**10)
            optimizer.zero_grad()
        states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in net.parameters()]
        return dict(net.named_parameters()), states

    good = [1, 2, 3]
    torch.testing.assert_close(run([*good[:bad_step], -4, *good[bad_step:]]), run(good), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ schedules


def test_dino_schedules():
    """Warm-up of 2 epochs of 5 steps: the peak is reached at step 9 and again at 10; min_lr and the final decay are never reached."""
    optim = AdamW(
        base_lr=0.0005, base_batch_size=256, min_lr=1e-6, weight_decay=0.04, weight_decay_end=0.4, schedule="dino", warmup_epochs=2
    )
    schedules = build_schedules(config(optim, epochs=6, global_batch_size=512), 5)
    scheds = [schedules.at(t) for t in range(30)]
    assert [s.epoch for s in scheds[::5]] == [0, 1, 2, 3, 4, 5] and scheds[9].epoch == 1
    lr = [s.lr for s in scheds]
    assert lr[0] == 0 and lr[9] == lr[10] == 0.001 and lr[1] == pytest.approx(0.001 / 9)
    assert lr[20] == pytest.approx((0.001 + 1e-6) / 2) and 1e-6 < lr[-1] < 1.1e-5
    decay = [s.weight_decay for s in scheds]
    assert decay[0] == pytest.approx(0.04) and decay[15] == pytest.approx(0.22) and 0.398 < decay[-1] < 0.4


def test_constant_weight_decay():
    schedules = build_schedules(config(Sgd(base_lr=1.0, weight_decay=1e-4, schedule="dino", warmup_epochs=0)), 7)
    assert {schedules.at(t).weight_decay for t in range(28)} == {1e-4}


def test_a_warmup_of_one_step_starts_at_zero():
    assert [warmup_cosine(t, base=2.0, final=0.0, total_steps=3, warmup_steps=1) for t in range(3)] == [0.0, 2.0, 1.0]


@pytest.mark.parametrize("optim", [Lars(base_lr=3.6), Sgd(base_lr=3.6)])
def test_a_learning_rate_as_given_does_not_scale(optim: OptimConfig):
    assert optim.peak_lr(64) == optim.peak_lr(4096) == 3.6
    assert dataclasses.replace(optim, base_lr=0.03, base_batch_size=256).peak_lr(512) == 0.06
