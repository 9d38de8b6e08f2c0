"""MoCo v3: published values, its vision transformer, steps in 16 bits and compiled, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from fastssl import cli
from fastssl.config import AdamW, BarlowLars, ConfigError, EfficiencyConfig, ModelConfig
from fastssl.distributed import Dist
from fastssl.engine import State, prepare, train_step
from fastssl.losses.contrastive import in_batch_contrast
from fastssl.methods.mocov3 import MoCoV3
from fastssl.models.backbones import MOCOV3_VITS, build_backbone
from fastssl.models.vit_mocov3 import MoCoV3ViT
from fastssl.optim.build import build_optimizer
from fastssl.precision import unit_rows
from fastssl.presets import DEFAULTS, PRESETS
from tests.golden.toy import ToyBackbone, two_views
from tests.unit.test_engine import NoHostReads

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "mocov3_mini": lambda: ToyBackbone(4, 8),
    "mocov3_vit_mini": lambda: MoCoV3ViT(16, 2, 4, 8, image_size=16),
}

# ------------------------------------------------------------------------------------------------ published values

# methods/mocov3.md section 7: architecture, optimizer, epochs, batch, lr per 256, peak, weight decay, warm-up, target momentum, T, crop
PUBLISHED = {
    "mocov3_r50_100ep": ("resnet50", BarlowLars, 100, 4096, 0.6, 9.6, 1e-6, 10, 0.99, 1.0, 0.2),
    "mocov3_r50_300ep": ("resnet50", BarlowLars, 300, 4096, 0.3, 4.8, 1e-6, 10, 0.99, 1.0, 0.2),
    "mocov3_r50_1000ep": ("resnet50", BarlowLars, 1000, 4096, 0.3, 4.8, 1.5e-6, 10, 0.996, 1.0, 0.2),
    "mocov3_vits16_300ep": ("vit_small_patch16_mocov3", AdamW, 300, 4096, 1.5e-4, 2.4e-3, 0.1, 40, 0.99, 0.2, 0.08),
    "mocov3_vits16_300ep_bs1024": ("vit_small_patch16_mocov3", AdamW, 300, 1024, 1.5e-4, 6e-4, 0.1, 40, 0.99, 0.2, 0.08),
    "mocov3_vitb16_300ep": ("vit_base_patch16_mocov3", AdamW, 300, 4096, 1.5e-4, 2.4e-3, 0.1, 40, 0.99, 0.2, 0.08),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str):
    cfg = PRESETS[name]()
    m, o, t, vit = cfg.method, cfg.optim, cfg.train, cfg.model.arch != "resnet50"
    arch, optimizer, epochs, batch, lr, peak, weight_decay, warmup, momentum, temperature, crop = PUBLISHED[name]
    assert (cfg.model.arch, type(o), t.epochs, t.global_batch_size) == (arch, optimizer, epochs, batch)
    assert (o.base_lr, o.base_batch_size, o.weight_decay, o.warmup_epochs, o.schedule) == (lr, 256, weight_decay, warmup, "mocov3")
    assert o.peak_lr(batch) == pytest.approx(peak) and f"peak learning rate                {peak:g} " in cli.describe(cfg, world=1)
    assert (t.ema_momentum, t.ema_schedule, cfg.model.norm, cfg.model.zero_init_residual) == (momentum, "cosine", "sync", not vit)
    assert (m.hidden, m.dim, m.temperature, m.projector_layers) == (4096, 256, temperature, 3 if vit else 2)
    assert m.predictor_bn == m.freeze_patch_projection == vit
    if vit:
        assert (o.betas, o.eps, o.not_decayed) == ((0.9, 0.999), 1e-8, "none")
    else:
        assert (o.sgd_momentum, o.eta) == (0.9, 0.001)
    assert [(v.crop.size, v.crop.scale, v.crop.interpolation) for v in cfg.views] == [(224, (crop, 1.0), "bilinear")] * 2
    for p in (v.photometric for v in cfg.views):
        assert (p.jitter, p.brightness, p.contrast, p.saturation, p.hue, p.grey, p.sigma) == (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, (0.1, 2.0))
    assert [(v.photometric.blur, v.photometric.solarize) for v in cfg.views] == [(1.0, 0.0), (0.1, 0.2)]


def test_the_default():
    assert DEFAULTS["mocov3"] == "mocov3_r50_300ep"


def test_heads_have_the_published_layers():
    for name, layers in (("mocov3_r50_300ep", (2, False)), ("mocov3_vits16_300ep", (3, True))):
        cfg = PRESETS[name]()
        with torch.device("meta"):
            method = MoCoV3(cfg.method, lambda arch=cfg.model.arch: build_backbone(arch), "sync")
        for head, linears, last_bn in ((method.online.projector, layers[0], True), (method.predictor, 2, layers[1])):
            norms = [m for m in head if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            assert sum(isinstance(m, nn.Linear) for m in head) == linears and all(m.bias is None for m in head if isinstance(m, nn.Linear))
            assert [m.affine for m in norms] == [True] * (linears - 1) + [False] * last_bn
            assert {m.num_features for m in norms[: linears - 1]} == {4096} and head[-1 - last_bn].out_features == 256


# ------------------------------------------------------------------------------------------------ loss


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_the_loss_of_embeddings_that_tell_nothing(temperature: float):
    rows = unit_rows(torch.ones(12, 8))
    assert float(in_batch_contrast(rows, rows, rows, temperature)) == pytest.approx(2 * temperature * math.log(12))


def test_the_loss_is_a_cross_entropy_over_all_keys():
    q, keys = (unit_rows(torch.randn(n, 8, dtype=torch.float64)) for n in (4, 12))
    expected = 2 * 0.3 * nn.functional.cross_entropy(q @ keys.T / 0.3, torch.arange(4) + 4)
    torch.testing.assert_close(in_batch_contrast(q, keys[4:8], keys, 0.3), expected)


def test_the_loss_is_computed_in_32_bits_under_autocast():
    q, k = (unit_rows(torch.randn(16, 8)) for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = in_batch_contrast(q, k, k, 0.2)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, in_batch_contrast(q, k, k, 0.2))


# ------------------------------------------------------------------------------------------------ steps


def state_of(preset: str, *, dtype: str = "fp32", compile: str = "off") -> State:
    cfg = dataclasses.replace(PRESETS[preset](), efficiency=EfficiencyConfig(dtype=dtype, compile=compile))
    torch.manual_seed(0)
    return prepare(MoCoV3(cfg.method, BACKBONES[preset], cfg.model.norm), cfg, ALONE, steps_per_epoch=2)


def batch(step: int, dtype: type = np.float32):
    return two_views(*torch.randn(2, 6, 3, 16, 16, generator=torch.Generator().manual_seed(step)).numpy().astype(dtype))


@pytest.mark.parametrize("preset", BACKBONES)
def test_a_step_reads_nothing_back(preset: str):
    state = state_of(preset)
    with NoHostReads():
        for step in range(2):
            train_step(state, [batch(step)])


@pytest.mark.parametrize("preset", BACKBONES)
def test_steps_in_16_bits(preset: str):
    state = state_of(preset, dtype="bf16")
    before = {n: p.detach().clone() for n, p in state.method.online.named_parameters()}
    for step in range(3):
        out = train_step(state, [batch(step)])
        assert out.loss.dtype == torch.float32 and math.isfinite(float(out.loss))
    moved = {n for n, p in state.method.online.named_parameters() if not torch.equal(p, before[n])}
    assert set(before) - moved == {n for n, p in state.method.online.named_parameters() if not p.requires_grad}


@pytest.mark.slow
@pytest.mark.parametrize("preset", BACKBONES)
def test_compiled_is_eager_in_one_graph(preset: str):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    losses = {}
    for compile in ("on", "off"):
        state = state_of(preset, dtype="fp64", compile=compile)
        losses[compile] = torch.stack([train_step(state, [batch(step, np.float64)]).loss for step in range(4)])
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(losses["on"], losses["off"], rtol=1e-9, atol=0)


def test_the_target_moves_before_the_forward_pass():
    state = state_of("mocov3_mini", dtype="fp64")
    train_step(state, [batch(0, np.float64)])
    online, target = ({n: p.clone() for n, p in net.named_parameters()} for net in (state.method.online, state.method.target))
    momentum = state.schedules.at(1).ema_momentum
    train_step(state, [batch(1, np.float64)])
    for name, p in state.method.target.named_parameters():
        torch.testing.assert_close(p, momentum * target[name] + (1 - momentum) * online[name])


# ------------------------------------------------------------------------------------------------ vision transformer


def test_both_views_at_once_are_the_views_by_themselves():
    cfg = PRESETS["mocov3_vit_mini"]().method
    method, views = MoCoV3(cfg, BACKBONES["mocov3_vit_mini"], "local").double(), batch(0, np.float64)
    assert not method.online.separately
    together = method.online(views)
    method.online.separately = True
    torch.testing.assert_close(together, method.online(views))
    assert MoCoV3(cfg, lambda: MoCoV3ViT(16, 1, 4, 16, conv_stem=True, image_size=16), "local").online.separately


def test_the_frozen_patch_projection_stays_and_everything_else_decays():
    state = state_of("mocov3_vit_mini")
    fixed = {n: p.clone() for n, p in state.method.online.backbone.named_parameters() if not p.requires_grad}
    assert set(fixed) == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    for step in range(2):
        train_step(state, [batch(step)])
    for net in (state.method.online, state.method.target):
        weights = dict(net.backbone.named_parameters())
        assert all(torch.equal(weights[n], p) for n, p in fixed.items())
    (group,) = build_optimizer(state.method, state.cfg).param_groups
    assert group["weight_decay"] == 0.1 and len(group["params"]) == sum(p.requires_grad for p in state.method.parameters())


def test_a_convolutional_stem_is_not_frozen():
    vit = MoCoV3ViT(16, 1, 4, 16, conv_stem=True, image_size=32)
    vit.freeze_patch_projection()
    assert {n for n, p in vit.named_parameters() if not p.requires_grad} == {"pos_embed"}
    assert vit(torch.randn(2, 3, 32, 32)).tokens.shape == (2, 4, 16)


@pytest.mark.parametrize(("arch", "heads", "blocks"), [(a, 12, s[1]) for a, s in MOCOV3_VITS.items()])
def test_twelve_heads(arch: str, heads: int, blocks: int):
    with torch.device("meta"):
        vit = build_backbone(arch)
    assert {b.attn.num_heads for b in vit.blocks} == {heads} and len(vit.blocks) == blocks


def test_timm_loads_its_names():
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        vit, reference = build_backbone("vit_small_patch16_mocov3"), VisionTransformer(embed_dim=384, num_heads=12, num_classes=0)
    assert {n: t.shape for n, t in vit.state_dict().items()} == {n: t.shape for n, t in reference.state_dict().items()}


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--views.0.crop.size", "96"], "two views of one size"),
        (["--train.accumulation-steps", "2"], "Use more ranks"),
        (["--model.norm", "eman"], "local, sync"),
        (["--method.temperature", "0"], "--method.temperature 0.0 must be positive"),
    ],
)
def test_impossible_configurations(flags: list[str], says: str):
    cfg, _ = cli.parse_cli(["--preset", "mocov3_mini", *flags])
    with pytest.raises(ConfigError, match=says):
        cli.check(cfg, world=1)


def test_impossible_networks():
    with pytest.raises(ConfigError, match="_mocov3"):
        MoCoV3(MoCoV3.Config(freeze_patch_projection=True), BACKBONES["mocov3_mini"], "local")
    with pytest.raises(ConfigError, match="width that 4 divides"):
        MoCoV3ViT(18, 1, 2, 8)
    with pytest.raises(ConfigError, match="patches of 16"):
        MoCoV3ViT(16, 1, 2, 8, conv_stem=True)
    with pytest.raises(ConfigError, match="zero-init-residual"):
        build_backbone("vit_tiny_patch8_mocov3", zero_init_residual=True)


def test_residual_branches_that_start_from_zero():
    assert ModelConfig().zero_init_residual is False
    for zero in (False, True):
        last = [
            block.bn2.weight
            for layer in ("layer1", "layer4")
            for block in build_backbone("resnet18", zero_init_residual=zero).get_submodule(layer)
        ]
        assert all(bool((w == (0 if zero else 1)).all()) for w in last)
