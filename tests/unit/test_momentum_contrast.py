"""MoCo v2 and LEWEL_M on the engine: the loss without logits, queues, the key encoder's order, published values, one graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl import checkpoint, cli
from fastssl.config import ConfigError, EfficiencyConfig, Sgd
from fastssl.distributed import Dist
from fastssl.ema import average_buffers_, frozen_copy
from fastssl.engine import State, prepare, train_step
from fastssl.losses.info_nce import info_nce, top
from fastssl.methods import METHODS
from fastssl.models.features import Features
from fastssl.models.queue import Queue
from fastssl.presets import PRESETS
from fastssl.recipes import dino
from tests.golden.toy import ToyBackbone, two_views
from tests.unit.test_engine import NoHostReads

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
BATCH, STEPS_PER_EPOCH = 4, 3
SMALL = {
    "mocov2_mini": {"hidden": 12, "dim": 8, "queue_size": 12},
    "lewel_m_mini": {"hidden": 12, "dim": 8, "queue_size": 12, "aligned_queue_size": 16, "aligned_queue": "all"},
}


class Linear(nn.Module):
    """A backbone without BatchNorm: what a sample becomes does not depend on the others."""

    def __init__(self):
        super().__init__()
        self.conv, self.num_features = nn.Conv2d(3, 8, 4, 4), 8

    def forward(self, x):
        x = torch.tanh(self.conv(x))
        return Features(pooled=x.mean((2, 3)), map=x)


def state_of(
    preset: str,
    *,
    norm: str = "shuffle",
    compile: str = "off",
    dtype: str = "fp64",
    backbone: Callable[[], nn.Module] = lambda: ToyBackbone(4, 8),
    seed: int = 0,
    **train,
) -> State:
    cfg = PRESETS[preset]()
    cfg = dataclasses.replace(
        cfg,
        method=dataclasses.replace(cfg.method, **SMALL[preset]),
        model=dataclasses.replace(cfg.model, norm=norm),
        train=dataclasses.replace(cfg.train, global_batch_size=BATCH, **train),
        efficiency=EfficiencyConfig(dtype=dtype, compile=compile),
    )
    cli.check(cfg, world=1)
    torch.manual_seed(seed)
    return prepare(METHODS[cfg.method.name](cfg.method, backbone, norm), cfg, ALONE, STEPS_PER_EPOCH)


def views(step: int, rows: slice = slice(None), dtype: torch.dtype = torch.float64):
    x = torch.randn(2, BATCH, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(step))
    return two_views(*x[:, rows].numpy())


# ------------------------------------------------------------------------------------------------ the loss


def rows(r: int = 6, dim: int = 5, size: int = 11, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(3)
    q, k, queue = (F.normalize(torch.randn(n, dim, dtype=dtype, generator=generator), dim=1) for n in (r, r, size))
    return q, F.normalize(q + 2 * k, dim=1), queue


@pytest.mark.parametrize("temperature", [0.2, 0.005])
@pytest.mark.parametrize("block", [1, 20, 2**20])
def test_info_nce_is_the_cross_entropy_of_the_logits(block: int, temperature: float):
    q, k, queue = rows()
    q, raw = q.requires_grad_(), q.detach().clone().requires_grad_()
    loss, rank = info_nce(q, k, queue, temperature, block=block)
    logits = torch.cat(((raw * k).sum(1, keepdim=True), raw @ queue.T), 1) / temperature
    expected = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-14)
    (2 * loss).backward()
    (2 * expected).backward()
    torch.testing.assert_close(q.grad, raw.grad, rtol=1e-11, atol=1e-13)
    assert torch.equal(rank, (logits[:, 1:] > logits[:, :1]).sum(1)) and rank.max() > 0
    assert top(rank, 1) == (rank == 0).double().mean() and top(rank, len(queue) + 1) == 1


def test_info_nce_is_fp32_under_autocast():
    q, k, queue = rows(dtype=torch.float32)
    expected, _ = info_nce(q, k, queue, 0.07)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = info_nce(q.requires_grad_(), k, queue, 0.07)
    loss.backward()
    assert loss.dtype is torch.float32 and q.grad.dtype is torch.float32
    torch.testing.assert_close(loss, expected)


class LargestTensor(TorchDispatchMode):
    """The most elements that an operation's result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor) and t.untyped_storage().nbytes() and t._base is None:
                self.elements = max(self.elements, t.numel())
        return out


def test_the_logits_are_never_held():
    q, k, queue = rows(r=8, dim=4, size=1000, dtype=torch.float32)
    largest = LargestTensor()
    q.requires_grad_()
    with largest:
        info_nce(q, k, queue, 0.2, block=8 * 100)[0].backward()
    assert largest.elements <= 8 * 100


# ------------------------------------------------------------------------------------------------ queue and key encoder


def test_a_queue_forgets_the_oldest():
    queue = Queue(6, 2)
    assert torch.allclose(queue.rows.norm(dim=1), torch.ones(6))
    start = queue.rows.clone()
    for step in range(4):
        queue.enqueue(torch.full((2, 2), float(step)))
        if step == 1:
            assert queue.pointer == 4 and torch.equal(queue.rows[4:], start[4:])
    assert queue.pointer == 2 and queue.rows[:, 0].tolist() == [3, 3, 1, 1, 2, 2]


@pytest.mark.parametrize("preset", SMALL)
def test_keys_are_made_before_the_query_moves(preset: str):
    """The first step's key encoder is the query encoder's copy; from then on it follows one step behind."""
    state = state_of(preset, ema_momentum=0.9)
    method = state.method
    query = [p.clone() for p in method.query.parameters()]
    train_step(state, [views(0)])
    key = [p.clone() for p in method.key.parameters()]
    torch.testing.assert_close(key, query)
    query = [p.clone() for p in method.query.parameters()]
    train_step(state, [views(1)])
    torch.testing.assert_close(list(method.key.parameters()), [0.9 * k + 0.1 * q for k, q in zip(key, query, strict=True)])


def test_eman_averages_statistics_that_the_query_has_just_moved():
    state = state_of("mocov2_mini", norm="eman", ema_momentum=0.9)
    query, key = state.method.query.backbone.bn1, state.method.key.backbone.bn1
    assert not key.training and query.training
    for step in range(2):
        before = key.running_mean.clone()
        train_step(state, [views(step)])
        torch.testing.assert_close(key.running_mean, 0.9 * before + 0.1 * query.running_mean, rtol=1e-6, atol=1e-9)
        assert key.num_batches_tracked == query.num_batches_tracked == step + 1


def test_networks_without_buffers_can_be_averaged():
    online = nn.Linear(2, 2)
    average_buffers_(online, frozen_copy(online), 0.1)


@pytest.mark.parametrize("preset", SMALL)
def test_accumulation_is_one_large_batch(preset: str):
    """Without BatchNorm: all micro-batches see the queue as it was, and leave their keys in the order of the images."""
    whole, parts = (state_of(preset, backbone=Linear, accumulation_steps=n) for n in (1, 2))
    for step in range(4):
        train_step(whole, [views(step)])
        train_step(parts, [views(step, slice(0, 2)), views(step, slice(2, 4))])
    torch.testing.assert_close(parts.method.state_dict(), whole.method.state_dict(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [1, 2])
def test_eman_moves_the_statistics_once_a_step(n: int):
    state = state_of("mocov2_mini", norm="eman", ema_momentum=0.9, accumulation_steps=n)
    query, key = state.method.query.backbone.bn1, state.method.key.backbone.bn1
    query.momentum = 0.0
    query.running_mean.fill_(1.0)
    train_step(state, [views(0, slice(k * BATCH // n, (k + 1) * BATCH // n)) for k in range(n)])
    torch.testing.assert_close(key.running_mean, torch.full_like(key.running_mean, 0.1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", ["shuffle", "sync", "eman"])
@pytest.mark.parametrize("preset", SMALL)
def test_a_step_reads_nothing_back(preset: str, norm: str):
    state = state_of(preset, norm=norm, dtype="fp32")
    with NoHostReads():
        for step in range(4):
            out = train_step(state, [views(step, dtype=torch.float32)])
    assert torch.isfinite(out.loss) and 0 <= out.logs["top1"] <= out.logs["top5"] <= 1


@pytest.mark.parametrize("norm", ["shuffle", "eman"])
@pytest.mark.parametrize("preset", SMALL)
def test_a_resumed_run_has_its_queues(preset: str, norm: str, tmp_path):
    whole = state_of(preset, norm=norm)
    for step in range(2):
        train_step(whole, [views(step)])
    path = checkpoint.save(whole, tmp_path)
    resumed = state_of(preset, norm=norm, seed=1)
    checkpoint.restore(resumed, path)
    for step in range(2, 6):
        losses = [train_step(state, [views(step)]).loss for state in (whole, resumed)]
        assert torch.equal(*losses)
    torch.testing.assert_close(resumed.method.state_dict(), whole.method.state_dict(), rtol=0, atol=0)
    saved = torch.load(path, weights_only=True)["model"]
    assert {"queues.global.rows", "queues.global.pointer"} <= set(saved) and saved["queues.global.pointer"] == 8
    assert ("queues.aligned.rows" in saved) == (preset == "lewel_m_mini")


@pytest.mark.parametrize("preset", SMALL)
def test_bf16(preset: str):
    state = state_of(preset, dtype="bf16")
    for step in range(2):
        out = train_step(state, [views(step, dtype=torch.float32)])
    assert out.loss.dtype is torch.float32 and torch.isfinite(out.loss)
    assert state.method.queues["global"].rows.dtype is torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "norm"), [("mocov2_mini", "shuffle"), ("lewel_m_mini", "eman")])
def test_one_graph_however_far_the_queue_is(preset: str, norm: str):
    """Over steps whose pointer and key momentum differ."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, eager = (state_of(preset, norm=norm, compile=c, ema_schedule="cosine") for c in ("on", "off"))
    for step in range(5):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = train_step(compiled, [views(step)]).loss
        torch.testing.assert_close(loss, train_step(eager, [views(step)]).loss, rtol=1e-9, atol=0)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------------------ configuration

# methods/mocov2.md section 6, methods/lewel_m.md section 5: epochs, BatchNorm, epochs of warm-up
PUBLISHED = {
    "mocov2_r50_100ep": (100, "shuffle", 0),
    "mocov2_r50_200ep": (200, "shuffle", 0),
    "mocov2_r50_800ep": (800, "shuffle", 0),
    "mocov2_eman_r50_200ep": (200, "eman", 10),
    "mocov2_eman_r50_800ep": (800, "eman", 10),
    "lewel_m_r50_100ep": (100, "shuffle", 0),
    "lewel_m_r50_200ep": (200, "shuffle", 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str):
    cfg = PRESETS[name]()
    m, o, t = cfg.method, cfg.optim, cfg.train
    assert (t.epochs, cfg.model.norm, o.warmup_epochs) == PUBLISHED[name]
    assert (cfg.model.arch, t.global_batch_size, t.published_rank_batch) == ("resnet50", 256, 32)
    assert (t.ema_momentum, t.ema_schedule) == (0.999, "constant")
    assert isinstance(o, Sgd) and (o.base_lr, o.peak_lr(256), o.peak_lr(128)) == (0.03, 0.03, 0.015)
    assert (o.weight_decay, o.weight_decay_end, o.not_decayed, o.sgd_momentum, o.clip_grad) == (1e-4, None, "none", 0.9, 0)
    assert (o.schedule, o.min_lr) == ("eman", 0)
    assert (m.hidden, m.dim, m.queue_size, m.temperature) == (2048, 128, 65536, 0.2)
    if m.name == "lewel_m":
        assert (m.heads, m.scale, m.loss_weight, m.head_norm) == (4, 1.0, 0.5, "none")
        assert (m.aligned_queue, m.aligned_queue_size, m.aligned_temperature) == ("mean", 65536, 0.2)
    a, b = cfg.views
    assert a == b
    assert (a.crop.size, a.crop.scale, a.crop.ratio, a.crop.interpolation, a.crop.flip) == (224, (0.2, 1), (3 / 4, 4 / 3), "bilinear", 0.5)
    p = a.photometric
    assert (p.jitter, p.brightness, p.contrast, p.saturation, p.hue, p.grey) == (0.8, 0.4, 0.4, 0.4, 0.1, 0.2)
    assert (p.blur, p.sigma, p.solarize) == (0.5, (0.1, 2.0), 0.0)


def test_everything_decays():
    """BatchNorm and biases too (methods/mocov2.md section 5)."""
    state = state_of("mocov2_mini")
    (group,) = state.optimizer.param_groups
    assert not group["excluded"] and len(group["params"]) == len([p for p in state.method.parameters() if p.requires_grad])


def test_heads_of_the_published_size():
    """methods/mocov2.md section 3: 2048 -> 2048 -> 128 with biases; g and p of LEWEL_M the same."""
    sizes = {}
    for name in ("mocov2_r50_200ep", "lewel_m_r50_200ep"):
        cfg = PRESETS[name]()
        method = METHODS[cfg.method.name](cfg.method, partial(ToyBackbone, 1, 2048), "local")
        sizes[name] = [tuple(p.shape) for n, p in method.query.named_parameters() if "projector" in n]
        assert method.queues["global"].rows.shape == (65536, 128)
    head = [(2048, 2048), (2048,), (128, 2048), (128,)]
    assert sizes == {"mocov2_r50_200ep": head, "lewel_m_r50_200ep": head * 2}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--method", "mocov2", "--train.global-batch-size", "192"], "--method.queue-size 65536 .* 65472 or 65664"),
        (["--method", "mocov2", "--method.queue-size", "128"], "Take 256 or 512"),
        (["--method", "mocov2", "--data.last-batch", "keep"], "--data.last-batch drop"),
        (["--method", "mocov2", "--views.0.crop.size", "96"], "two views of one size"),
        (["--method", "lewel_m", "--method.aligned-queue-size", "4096", "--method.aligned-queue", "all"], "8192 keys .* 32 keys each"),
        (["--method", "lewel_m", "--method.aligned-queue-size", "100"], "--method.aligned-queue-size 100"),
        (["--method", "byol", "--model.norm", "shuffle"], "byol has no --model.norm shuffle"),
    ],
)
def test_what_cannot_run(flags: list[str], says: str):
    cfg, _ = cli.parse_cli(flags)
    with pytest.raises(ConfigError, match=says):
        cli.check(cfg, world=1)


def test_other_views_are_refused():
    for name in ("mocov2", "lewel_m"):
        with pytest.raises(ConfigError, match="two views"):
            METHODS[name].check_views(dino())


def test_a_skipped_step_leaves_the_oldest_keys():
    queue = Queue(4, 2)
    before = queue.rows.clone()
    queue.enqueue(torch.tensor([[1.0, 0.0], [float("nan"), 0.0]]))
    assert torch.equal(queue.rows, torch.stack((torch.tensor([1.0, 0.0]), *before[1:])))
    assert queue.pointer == 2
