"""Swin transformers: timm's network, masks in the right places, and iBOT's steps on a small one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer

from convert.checkpoint import Args, export
from fastssl.batch import masked_patches
from fastssl.config import ConfigError, EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.ema import without_drop_path
from fastssl.engine import prepare, train_step
from fastssl.methods.ibot import IBOT
from fastssl.models.backbones import build_backbone
from fastssl.models.swin import Block, Swin, _shift_mask, shift_mask
from fastssl.models.weights import load_backbone
from fastssl.presets import PRESETS
from fastssl.views import Mask
from tests.golden.dino_family import grouped
from tests.unit.test_engine import NoHostReads

pytestmark = pytest.mark.slow

SMALL = dict(dim=12, depths=(2, 2, 2, 2), heads=(1, 2, 3, 4), window=4, image_size=64)


def small(**changes) -> Swin:
    torch.manual_seed(0)
    return randomised(Swin(**(SMALL | changes))).double()


def randomised(swin: Swin) -> Swin:
    with torch.no_grad():
        for p in swin.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return swin.eval()


def images(n: int, size: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------ the network


@torch.no_grad()
def test_is_timms_model():
    swin, x = small(), images(2, 64)
    reference = SwinTransformer(64, embed_dim=12, depths=(2, 2, 2, 2), num_heads=(1, 2, 3, 4), window_size=4, num_classes=0).double().eval()
    assert list(swin.state_dict()) == list(reference.state_dict())
    reference.load_state_dict(swin.state_dict(), strict=True)
    found = swin(x)
    torch.testing.assert_close(found.pooled, reference(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.tokens, reference.forward_features(x).flatten(1, 2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.tokens, swin.norm(found.unnormed))
    assert swin.embed_dim == 12 and swin.mask_stride == 32 and swin.num_features == 96


@torch.no_grad()
@pytest.mark.slow
def test_real_tiny_is_timms(tmp_path):
    """Through the export, whose config.json has to say which windows."""
    swin = randomised(build_backbone("swin_tiny_patch4_window14"))
    torch.save(swin.state_dict(), tmp_path / "swin.pt")
    export(Args(str(tmp_path / "swin.pt"), "huggingface", tmp_path / "model"))
    x = images(1, 224, torch.float32)
    torch.testing.assert_close(timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()(x), swin(x).pooled)


@pytest.mark.parametrize(("window", "image_size"), [(7, 64), (14, 224)])
def test_windows_are_read_from_the_shapes(tmp_path, window, image_size):
    arch, path = f"swin_tiny_patch4_window{window}", tmp_path / "swin.pt"
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in build_backbone(arch, image_size=image_size).state_dict().items()}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    backbone, about = load_backbone(str(path))
    assert (about["arch"], backbone.image_size) == (arch, image_size)
    index = backbone.layers[0].blocks[0].attn.relative_position_index  # no part of the file
    assert index.device.type == "cpu" and index.max() == (2 * window - 1) ** 2 - 1


@torch.no_grad()
def test_maps_that_windows_do_not_divide():
    """A shifted block on a 6 x 6 map: what the shift wraps around sees neither the other border nor the other way round."""
    torch.manual_seed(0)
    block = Block(8, 2, 4, shifted=True, drop_path=0.0).double().eval()
    x = torch.randn(1, 6, 6, 8, dtype=torch.float64)
    y = block(x)
    for row, column in ((0, 0), (5, 5)):
        changed = x.clone()
        changed[0, row, column, 0] += 1  # LayerNorm would take away the same of all channels
        moved = (block(changed) - y).abs().sum(-1)[0] > 1e-12
        # Rolled by 2 the rows fall into windows 2..5 and, alone with the padding, 0..1.
        near = torch.tensor([r < 2 for r in range(6)] if row == 0 else [r >= 2 for r in range(6)])
        assert torch.equal(moved, near[:, None] & near[None, :])
    assert block(x[:, :5, :3]).shape == (1, 5, 3, 8)


def test_shift_mask():
    mask = shift_mask(4, 8, 4, 2, torch.device("cpu"))
    first, last = mask.view(2, 4, 4, 4, 4)
    assert first[0, 0, 1, 3] == 0 and first[0, 0, 2, 0] == -100  # rows are one window, whose lower half was rolled in
    assert last[0, 0, 0, 1] == 0 and last[0, 0, 0, 2] == -100
    assert shift_mask(4, 8, 4, 2, torch.device("cpu")) is mask


@torch.no_grad()
def test_masks_hide_their_patches():
    swin, x = small(), images(2, 64)
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[1, 0, 1] = True
    hidden = x.clone()
    hidden[1, :, :32, 32:] = 7.0  # what the student cannot see
    embed = torch.full((1, 12), 0.3, dtype=x.dtype)
    torch.testing.assert_close(swin(hidden, mask, embed).tokens, swin(x, mask, embed).tokens, rtol=0, atol=0)
    seen = x.clone()
    seen[1, :, :32, 31] += 1.0
    assert not torch.equal(swin(seen, mask, embed).tokens[1], swin(x, mask, embed).tokens[1])
    torch.testing.assert_close(swin(x, mask, embed).tokens[0], swin(x).tokens[0])
    assert not torch.allclose(swin(x, mask, embed).tokens[1], swin(x).tokens[1])


@torch.no_grad()
def test_drop_path_belongs_to_students():
    swin = small(drop_path=0.5).train()
    x = images(4, 64)
    assert not torch.equal(swin(x).pooled, swin(x).pooled)
    still = without_drop_path(swin)
    torch.testing.assert_close(still(x).pooled, small()(x).pooled)


def test_sizes_that_cannot_be():
    for size in (16, 100):
        with pytest.raises(ConfigError, match=f"--model.image-size {size} must be a multiple of the 32"):
            small(image_size=size)
    with pytest.raises(ConfigError, match="--model.drop-path 1.0"):
        small(drop_path=1.0)


# ------------------------------------------------------------------------------------------------ iBOT


def state_of(dtype: str):
    cfg = PRESETS["ibot_swint14_300ep"]()
    method = replace(cfg.method, out_dim=24, hidden=16, bottleneck=8, pred_start_epoch=0)
    cfg = replace(cfg, method=method, efficiency=EfficiencyConfig(dtype=dtype, compile="off"))
    torch.manual_seed(0)
    # Freshly drawn, with all biases 0, it would be as the preset's first 50 epochs avoid.
    net = IBOT(cfg.method, lambda: randomised(Swin(**SMALL, drop_path=0.2)).train(), cfg.model.norm)
    return prepare(net, cfg, Dist(0, 1, 0, 1, torch.device("cpu")), steps_per_epoch=2)


def views_of(step: int):
    """Two global crops of 64 pixels, two local ones of 32, and masks of 2 x 2 elements."""
    rng = np.random.default_rng(step)
    views = grouped([rng.standard_normal((2, 3, size, size)) for size in (64, 64, 32, 32)])
    for group in views.groups:
        group.pixels = group.pixels.float()
    masks = rng.random((2, 2, 2, 2)) < 0.4
    return replace(views, masks=torch.from_numpy(masks), masked=torch.from_numpy(masked_patches(masks)))


def test_steps_in_bf16():
    state = state_of("bf16")
    before = {name: p.detach().clone() for name, p in state.method.named_parameters()}
    with NoHostReads():
        outs = [train_step(state, [views_of(step)]) for step in range(2)]
    assert all(out.logs["loss_patch"] > 0 and out.loss.isfinite() for out in outs)
    still = {name for name, p in state.method.named_parameters() if torch.equal(p, before[name])}
    assert still == {f"{net}.head.last.{part}" for net in ("student", "teacher") for part in "vg"}  # frozen in the first epoch


@torch.no_grad()
def test_compiles_as_a_whole():
    """With padding and without, masked or not; the masks of shifted windows are constants."""
    torch._dynamo.reset()
    swin, embed = small(depths=(1, 2), heads=(1, 2)), torch.full((1, 12), 0.3, dtype=torch.float64)
    compiled = torch.compile(swin, backend="eager", fullgraph=True, dynamic=False)
    for size, mask in ((64, torch.tensor([[[True, False], [False, False]]])), (96, None)):
        expected = swin(images(1, size), mask, embed)
        torch.testing.assert_close(compiled(images(1, size), mask, embed).tokens, expected.tokens)


@torch.no_grad()
def test_an_export_leaves_no_traces():
    swin, x = small(), images(1, 64)
    _shift_mask.cache_clear()
    graph = torch.export.export(torch.nn.Sequential(swin.patch_embed, swin.layers), (x,))
    torch.testing.assert_close(graph.module()(x).flatten(1, 2), swin(x).unnormed)


def test_the_published_masks_fit():
    cfg = PRESETS["ibot_swint14_300ep"]()
    IBOT.check(cfg)
    assert cfg.optim.peak_lr(cfg.train.global_batch_size) == pytest.approx(2.03e-3, rel=1e-3)
    views = (replace(cfg.views[0], mask=Mask()), *cfg.views[1:])
    with pytest.raises(ConfigError, match="--views.0.mask.patch-size 16 is not the 32 pixels of swin_tiny_patch4_window14"):
        IBOT.check(replace(cfg, views=views))
