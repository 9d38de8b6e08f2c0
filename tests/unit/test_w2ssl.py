"""W2SSL beyond the golden files: montages, exchange and positives on any number of ranks, loss, presets, checks, one compiled graph."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import cli
from fastssl.batch import Group, Views
from fastssl.config import BarlowLars, ConfigError, EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import prepare, train_step
from fastssl.losses.supervised_contrastive import supervised_contrastive
from fastssl.methods.w2ssl import W2SSL, other_rows
from fastssl.models.montage import Routes, decouple, drawn_rows, tile
from fastssl.presets import PRESETS
from fastssl.recipes import w2ssl, w2ssl_quad, w2ssl_windows
from fastssl.views import WindowCrop
from tests.golden.toy import ToyBackbone

CPU = torch.device("cpu")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------------ permutations, exchange, positives

SHARES = [(2, 8, 1), (2, 8, 2), (2, 16, 4), (4, 4, 1), (4, 6, 2), (4, 8, 8)]
"""Parts, images, ranks."""


@pytest.mark.parametrize("within", ["global", "rank"])
@pytest.mark.parametrize(("parts", "images", "world"), SHARES)
def test_every_patch_is_used_once(parts: int, images: int, world: int, within: str):
    rows = drawn_rows(parts, images, world, seed=1, step=2, within=within)
    assert rows.shape == (world, parts * images // world)
    assert sorted(rows.ravel()) == list(range(parts * images))
    assert not np.array_equal(rows, drawn_rows(parts, images, world, seed=1, step=3, within=within))
    assert not np.array_equal(rows, drawn_rows(parts, images, world, seed=2, step=2, within=within))
    home = rows % images // (images // world)
    if within == "rank":
        assert (home == np.arange(world)[:, None]).all()
    else:  # the same montages whatever the ranks
        alone = drawn_rows(parts, images, 1, seed=1, step=2, within=within).reshape(4, -1)
        np.testing.assert_array_equal(rows.reshape(world, 4, -1).swapaxes(0, 1).reshape(4, -1), alone)


@pytest.mark.parametrize("within", ["global", "rank"])
@pytest.mark.parametrize(("parts", "images", "world"), SHARES)
def test_patches_arrive_where_they_are_tiled(parts: int, images: int, world: int, within: str):
    """All ranks played in one process; a patch's pixels are its number."""
    rows = drawn_rows(parts, images, world, seed=5, step=0, within=within)
    routes = [Routes.of(rows, images, r, CPU) for r in range(world)]
    share = images // world
    own = [torch.tensor([[j * images + r * share + i for i in range(share)] for j in range(parts)]).flatten() for r in range(world)]
    assert all(r.stay == (within == "rank" or world == 1) for r in routes)
    leaving = [o[r.leave].split(r.sent) for o, r in zip(own, routes, strict=True)]
    for rank, route in enumerate(routes):
        assert [len(theirs[rank]) for theirs in leaving] == route.received
        arrived = own[rank] if route.stay else torch.cat([theirs[rank] for theirs in leaving])
        assert torch.equal(arrived[route.place], torch.from_numpy(rows[rank]))


@pytest.mark.parametrize(("parts", "images", "world"), SHARES)
def test_positives_are_the_other_rows_of_the_image(parts: int, images: int, world: int):
    rows = drawn_rows(parts, images, world, seed=0, step=0, within="global")
    image = np.concatenate([np.tile(r % images, 2) for r in rows])  # a rank's queries, then its keys
    for i, found in enumerate(other_rows(rows, images).reshape(len(image), -1)):
        assert sorted(found) == [j for j in np.flatnonzero(image == image[i]) if j != i]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_montages_are_tiled_as_published(memory_format):
    x, place = randn(12, 3, 5, 5, dtype=torch.bfloat16).contiguous(memory_format=memory_format), torch.randperm(12)
    montages = tile(Routes(place, place, [], [], True).exchange(x), place)
    expected = x[place].view(2, 2, 3, 3, 5, 5).permute(2, 3, 0, 4, 1, 5).reshape(3, 3, 10, 10)
    assert torch.equal(montages, expected)
    assert montages.is_contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------ decouple and loss


def test_the_middle_of_an_odd_map_is_shared():
    """methods/w2ssl.md section 6."""
    weights = torch.stack([decouple(e.view(1, 1, 7, 7)).flatten() for e in torch.eye(49, dtype=torch.float64)], 1)
    a = torch.tensor([[19, 18, 18, 9, 0, 0, 0], [0, 0, 0, 9, 18, 18, 19]], dtype=torch.float64) / 64
    torch.testing.assert_close(weights.view(2, 2, 7, 7), torch.einsum("ri,cj->rcij", a, a))


@pytest.mark.parametrize("side", [2, 3, 4, 7])
def test_decoupling_is_a_resize_and_a_mean(side: int):
    x = randn(3, 5, side, side)
    resized = F.interpolate(x, size=(8, 8), mode="bilinear", align_corners=False)
    expected = F.adaptive_avg_pool2d(resized, 2).permute(2, 3, 0, 1).reshape(12, 5)
    torch.testing.assert_close(decouple(x), expected)
    assert (decouple(x.bfloat16()).double() - expected).abs().max() < 0.02


def dense_loss(f: Tensor, label: Tensor, temperature: float, base_temperature: float) -> Tensor:
    """The loss as the paper writes it, with masks."""
    s = f @ f.T / temperature
    others = ~torch.eye(len(f), dtype=torch.bool)
    log_p = s - s.masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
    same = (label[:, None] == label) & others
    return -(temperature / base_temperature) * (log_p * same).sum(1).div(same.sum(1)).mean()


def positives_of(label: Tensor) -> Tensor:
    same = (label[:, None] == label) & ~torch.eye(len(label), dtype=torch.bool)
    return same.nonzero()[:, 1].view(len(label), -1)


def test_loss_is_the_one_with_masks():
    label = torch.arange(6).repeat(4)
    f = F.normalize(randn(24, 8), dim=1).requires_grad_()
    for temperature, base in ((0.3, 0.07), (0.1, 0.1)):
        expected = dense_loss(f, label, temperature, base)
        found = supervised_contrastive(f, positives_of(label), temperature=temperature, base_temperature=base)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        gradients = [torch.autograd.grad(3 * loss, f)[0] for loss in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_loss_of_equal_rows_is_chance():
    f = F.normalize(torch.ones(32, 8), dim=1)
    found = supervised_contrastive(f, positives_of(torch.arange(8).repeat(4)), temperature=0.3, base_temperature=0.07)
    assert found.item() == pytest.approx(0.3 / 0.07 * math.log(31), rel=1e-5)


def test_autocast_leaves_the_loss_alone():
    f, positives = F.normalize(randn(32, 8, dtype=torch.float32), dim=1), positives_of(torch.arange(8).repeat(4))
    plain = supervised_contrastive(f, positives, temperature=0.3, base_temperature=0.07)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(supervised_contrastive(f, positives, temperature=0.3, base_temperature=0.07), plain)


# ------------------------------------------------------------------------------------------------ steps


def patches(images: int, parts: int = 2, size: int = 8, seed: int = 0, dtype: torch.dtype = torch.float64) -> Views:
    pixels = (randn(parts * images, 3, size, size, seed=2 * seed + v, dtype=dtype) for v in (0, 1))
    groups = tuple(Group(size, tuple(range(v * parts, (v + 1) * parts)), x) for v, x in enumerate(pixels))
    return Views(groups=groups, boxes=None, flips=None, source_hw=None, index=torch.arange(images))


def run(steps: int, *, first: int = 0, dtype: str = "fp64", compile: str | None = None, **method) -> list[dict[str, float]]:
    """The method's logs in steps of a toy; a run that begins later has trained no weights before."""
    cfg = PRESETS["w2ssl_mini"]()
    cfg = dataclasses.replace(
        cfg,
        method=dataclasses.replace(cfg.method, hidden=16, dim=8, **method),
        efficiency=EfficiencyConfig(dtype=dtype, compile="off"),
        train=dataclasses.replace(cfg.train, global_batch_size=8),
        optim=BarlowLars(base_lr=1.0, schedule="mocov3", warmup_epochs=0),
    )
    torch.manual_seed(0)
    net = W2SSL(cfg.method, lambda: ToyBackbone(4, 8), "sync")
    state = prepare(net, cfg, Dist(0, 1, 0, 1, CPU), steps_per_epoch=4)
    state.step = first
    if compile:
        net.compile(fullgraph=True, dynamic=False, backend=compile)
    out = []
    for s in range(first, first + steps):
        result = train_step(state, [patches(8, seed=s, dtype=torch.float64 if dtype == "fp64" else torch.float32)])
        out.append({k: v.item() for k, v in result.logs.items()} | {"loss": result.loss.item()})
    return out


def test_losses_are_reported_beside_chance():
    (logs,) = run(1, location_weight=0.5, contrast_weight=0.25)
    assert logs["loss"] == pytest.approx(0.5 * logs["loss_loc"] + 0.25 * logs["loss_crop"])
    assert logs["loss_loc_chance"] == pytest.approx(math.log(2))
    assert logs["loss_crop_nats"] == pytest.approx(logs["loss_crop"] / (2 * 0.3 / 0.07))
    assert logs["loss_crop_nats"] == pytest.approx(math.log(31), abs=1)


def test_the_permutation_follows_from_seed_and_step():
    """What a resumed run draws: in step 2 what an uninterrupted one does, another in step 3."""
    method = W2SSL(W2SSL.Config(hidden=4, dim=4), lambda: ToyBackbone(4, 8), "local")
    cfg = PRESETS["w2ssl_mini"]()
    drawn = []
    for seed in (0, 1):
        schedules = prepare(
            method, dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=seed)), Dist(0, 1, 0, 1, CPU), 4
        ).schedules
        drawn += [method.arrange(patches(8), schedules.at(t)).location for t in (2, 2, 3)]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[3], drawn[4])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[3])


def test_bf16_is_near_fp32():
    for narrow, wide in zip(run(3, dtype="bf16"), run(3, dtype="fp32"), strict=True):
        for name in wide:
            assert narrow[name] == pytest.approx(wide[name], rel=0.05, abs=0.05)


@pytest.mark.slow
def test_one_graph_serves_all_permutations():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run(3, compile="eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    for found, expected in zip(compiled, run(3), strict=True):
        assert found == pytest.approx(expected, rel=1e-9)


# ------------------------------------------------------------------------------------------------ presets and checks

# methods/w2ssl.md section 11: images, peak learning rate, warm-up, parts, views
PUBLISHED = {
    "w2ssl_r50_200ep_bs256": (512, 1.2, 10, 2, w2ssl()),
    "w2ssl_r50_200ep_bs1024": (2048, 4.8, 10, 2, w2ssl()),
    "w2ssl_windows_r50_200ep_bs256": (512, 1.2, 10, 2, w2ssl_windows()),
    "w2ssl_quad_r50_200ep": (256, 0.6, 0, 4, w2ssl_quad()),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str):
    cfg = PRESETS[name]()
    images, peak, warmup, parts, views = PUBLISHED[name]
    m, o, t = cfg.method, cfg.optim, cfg.train
    assert (t.global_batch_size, o.peak_lr(images), o.warmup_epochs, m.parts, cfg.views) == (
        images,
        pytest.approx(peak),
        warmup,
        parts,
        views,
    )
    assert (type(o), o.base_lr, o.base_batch_size, o.weight_decay, o.weight_decay_end) == (BarlowLars, 0.6, 256, 1e-6, None)
    assert (o.sgd_momentum, o.eta, o.schedule, o.min_lr, o.clip_grad) == (0.9, 0.001, "mocov3", 0.0, 0.0)
    assert (t.epochs, t.ema_momentum, t.ema_schedule) == (200, 0.99, "cosine")
    assert (m.hidden, m.dim, m.temperature, m.base_temperature, m.location_weight, m.contrast_weight) == (4096, 256, 0.3, 0.07, 1.0, 1.0)
    assert (m.permutation, cfg.model.arch, cfg.model.norm, cfg.model.zero_init_residual) == ("global", "resnet50", "sync", False)


def test_heads_have_the_published_size():
    with torch.device("meta"):
        net = W2SSL(W2SSL.Config(), lambda: ToyBackbone(1, 2048), "local")
    counts = [sum(p.numel() for p in m.parameters()) for m in (net.online.projector, net.predictor, net.online.locator)]
    assert counts == [9_445_376, 2_105_344, 4_098]


def test_dry_run_names_images_and_montages():
    text = cli.describe(PRESETS["w2ssl_r50_200ep_bs256"](), world=4)
    for line in (
        "images per step                   512",
        "montages per step and view        256  (512 x 2 patches / 4; 64 per rank)",
        "0.6931",
        "7.6241 nats",
    ):
        assert line in text
    assert "montages per step and view        256  (256 x 4 patches / 4; 128 per rank)" in cli.describe(
        PRESETS["w2ssl_quad_r50_200ep"](), 2
    )


def test_windows_survive_the_command_line():
    cfg, _ = cli.parse_cli(["--preset", "w2ssl_windows_r50_200ep_bs256", "--views.2.crop.patch-jitter", "30"])
    assert cfg.views[2].crop == WindowCrop(size=224, scale=(0.2, 1.0), patch_size=112, patch_jitter=30)
    assert cli.check(cfg, world=4) == []


@pytest.mark.parametrize(
    ("flags", "world", "says"),
    [
        (["--train.global-batch-size", "511"], 1, "equally on 1 ranks. Set --train.global-batch-size to 510 or 512"),
        (
            ["--train.global-batch-size", "520"],
            8,
            "do not fill montages of 4 equally on 8 ranks. Set --train.global-batch-size to 512 or 528",
        ),
        (["--train.accumulation-steps", "2"], 1, "across the global batch"),
        (["--method.parts", "4"], 1, "--method.parts 2"),
        (["--views.0.crop.size", "96"], 1, "view 1 of all parts before view 2"),
        (["--views.0.crop.size", "96", "--views.1.crop.size", "96"], 1, "same --views.N.crop.size"),
        (["--model.arch", "vit_small_patch16"], 1, "take a ResNet"),
        (["--model.norm", "eman"], 1, "no --model.norm eman"),
        (["--data.last-batch", "keep"], 1, "last-batch drop"),
        (["--method.temperature", "0"], 1, "must be positive"),
    ],
)
def test_impossible_configurations(flags: list[str], world: int, says: str):
    cfg, _ = cli.parse_cli(["--method", "w2ssl", *flags])
    with pytest.raises(ConfigError, match=says):
        cli.check(cfg, world)
