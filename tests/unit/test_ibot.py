"""iBOT on the engine: masked patches only, one graph whatever their number, start of masking, published values, refused configurations."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from fastssl import batch, cli
from fastssl.batch import Views, masked_patches
from fastssl.config import AdamW, ConfigError, EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import State, prepare, train_step
from fastssl.losses.distillation import patch_weights
from fastssl.methods.ibot import IBOT
from fastssl.models.backbones import build_backbone
from fastssl.models.vit import ViT
from fastssl.models.weights import load_backbone
from fastssl.presets import PRESETS
from fastssl.recipes import dino, ibot
from fastssl.views import Mask
from tests.golden.dino_family import grouped
from tests.unit.test_engine import NoHostReads

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
SIZES = (32, 32, 16, 16)
"""Of the crops, pixels: 4 x 4 and 2 x 2 patches."""
SMALL = {"out_dim": 24, "hidden": 16, "bottleneck": 8}
SHARES = (0.3, 0.9, 0.0, 0.6, 0.1)
"""Of masked patches, by step."""


def state_of(*, compile: str = "off", dtype: str = "fp32", drop_path: float = 0.0, **method) -> State:
    cfg = PRESETS["ibot_mini"]()
    efficiency = EfficiencyConfig(dtype=dtype, compile=compile)
    cfg = dataclasses.replace(cfg, method=dataclasses.replace(cfg.method, **SMALL, **method), efficiency=efficiency)
    torch.manual_seed(0)
    backbone = partial(ViT, 16, 3, 2, 8, image_size=32, drop_path=drop_path)
    return prepare(IBOT(cfg.method, backbone, cfg.model.norm), cfg, ALONE, steps_per_epoch=2)


def views_of(step: int, *, sizes: tuple[int, ...] = SIZES, dtype: torch.dtype = torch.float32) -> Views:
    rng = np.random.default_rng(step)
    views = grouped([rng.standard_normal((4, 3, s, s)) for s in sizes])
    for group in views.groups:
        group.pixels = group.pixels.to(dtype)
    masks = rng.random((4, 2, 4, 4)) < SHARES[step % len(SHARES)]
    return dataclasses.replace(views, masks=torch.from_numpy(masks), masked=torch.from_numpy(masked_patches(masks)))


@pytest.mark.parametrize("shared", [True, False])
def test_a_step_reads_nothing_back(shared: bool):
    state = state_of(drop_path=0.3, shared_head=shared, patch_out_dim=20)
    with NoHostReads():
        for step in range(3):
            train_step(state, [views_of(step)])


@pytest.mark.slow
def test_one_graph_for_any_number_of_masked_patches(monkeypatch):
    """Over epochs whose temperatures differ, from no masked patch to nearly all."""
    monkeypatch.setattr(batch, "MASKED_CHUNK", 8)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    values = {"warmup_teacher_temp_epochs": 3, "teacher_temp": 0.07, "pred_start_epoch": 1}
    compiled, eager = (state_of(compile=c, dtype="fp64", **values) for c in ("on", "off"))
    listed = set()
    for step in range(10):
        views = [views_of(step % 5, dtype=torch.float64) for _ in range(2)]
        listed.add(len(views[0].masked))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = train_step(compiled, [views[0]]).loss
        torch.testing.assert_close(loss, train_step(eager, [views[1]]).loss, rtol=1e-9, atol=0)
    assert len(listed) == len(SHARES)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_all_terms_are_logged_and_no_local_crops_are_fine():
    for sizes in (SIZES, SIZES[:2]):
        out = train_step(state_of(), [views_of(0, sizes=sizes)])
        assert set(out.logs) == {"loss_cls", "loss_patch", "teacher_entropy", "patch_entropy"}
        torch.testing.assert_close(out.loss, out.logs["loss_cls"] + out.logs["loss_patch"])
        for name in ("teacher_entropy", "patch_entropy"):
            assert 0 < out.logs[name].item() < math.log(24)


def test_bfloat16_steps_stay_near_full_precision():
    losses = {}
    for dtype in ("bf16", "fp32"):
        state = state_of(dtype=dtype)
        outs = [train_step(state, [views_of(step)]) for step in range(3)]
        losses[dtype] = torch.stack([torch.stack((out.loss, *out.logs.values())) for out in outs])
        assert all(value.dtype == torch.float32 for out in outs for value in (out.loss, *out.logs.values()))
        assert state.method.centers["patch"].dtype == torch.float32
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.1, atol=0.02)


def test_patches_are_hidden_from_the_start_epoch_on():
    values = {"pred_start_epoch": 2, "warmup_teacher_temp_epochs": 3, "freeze_last_layer": 0}
    state = state_of(**values, warmup_teacher_patch_temp=0.02, teacher_patch_temp=0.06, teacher_temp=0.07)
    temperatures, losses, moved = [], [], []
    for step in range(12):
        before = state.method.masked_embed.detach().clone()
        losses.append(train_step(state, [views_of(3)]).logs["loss_patch"].item())
        temperatures.append(round(state.method.teacher_patch_temp.item(), 6))
        moved.append(not torch.equal(before, state.method.masked_embed))
        assert torch.equal(before, torch.zeros(1, 16)) or step > 4
    assert temperatures == [0.02] * 6 + [0.04] * 2 + [0.06] * 4
    assert losses[:4] == [0.0] * 4 and min(losses[4:]) > 0
    assert moved == [False] * 4 + [True] * 8


def test_both_last_layers_are_frozen():
    state = state_of(shared_head=False, patch_out_dim=20, freeze_last_layer=1)
    head = state.method.student.head
    before = [p.clone() for layer in (head.last, head.patch_last) for p in layer.parameters()]
    for step in range(3):
        train_step(state, [views_of(step)])
        same = [torch.equal(a, b) for a, b in zip(before, (*head.last.parameters(), *head.patch_last.parameters()), strict=True)]
        assert same == [step < 2] * 4


def test_weights_of_masked_patches():
    masks = torch.tensor([[True, False, True], [False, False, False], [True, True, True], [False, True, False]])
    rows = torch.from_numpy(np.append(np.flatnonzero(masks.numpy()), [-1, -1]))
    expected = [1 / 8, 1 / 8, 1 / 12, 1 / 12, 1 / 12, 1 / 4, 0, 0]
    torch.testing.assert_close(patch_weights(masks, rows), torch.tensor(expected, dtype=torch.float64))
    assert (patch_weights(torch.zeros_like(masks), rows) == 0).all()


def test_backbones_are_timms_and_the_masked_embedding_is_the_students():
    cfg = PRESETS["ibot_mini"]()
    method = IBOT(cfg.method, partial(ViT, 192, 1, 3, 16), "local")
    with torch.device("meta"):
        names = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1).state_dict().keys()
    for net in (method.student, method.teacher):
        assert net.backbone.state_dict().keys() == names
    assert method.masked_embed.requires_grad and [n for n in method.state_dict() if "masked_embed" in n] == ["masked_embed"]


def test_layer_scale_is_timms():
    torch.manual_seed(0)
    vit = ViT(24, 2, 3, 8, image_size=32, layer_scale=0.1).double()
    reference = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=0, init_values=0.1
    ).double()
    assert (vit.blocks[1].ls2.gamma == torch.tensor(0.1)).all()
    torch.nn.init.normal_(vit.blocks[1].ls2.gamma)
    reference.load_state_dict(vit.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(vit(x).pooled, reference(x), rtol=1e-9, atol=1e-9)


def test_weights_with_layer_scale_are_found_again(tmp_path):
    vit = build_backbone("vit_tiny_patch16", layer_scale=0.3)
    save_file(vit.state_dict(), tmp_path / "backbone.safetensors")
    found, about = load_backbone(str(tmp_path / "backbone.safetensors"))
    assert about["arch"] == "vit_tiny_patch16" and torch.equal(found.blocks[0].ls1.gamma, vit.blocks[0].ls1.gamma)
    with pytest.raises(ConfigError, match="layer-scale 0.3 is for ViTs"):
        build_backbone("resnet18", layer_scale=0.3)


# ------------------------------------------------------------------------------------------------ presets


# methods/ibot.md section 9: architecture, epochs, lr per 256, min lr, global and local scale, warm-up of temperatures, rows of the
# last layer at length 1, frozen epochs, clip, spread of the masks' shares
PUBLISHED = {
    "ibot_vits16_800ep": ("vit_small_patch16", 800, 5e-4, 1e-6, (0.25, 1), (0.05, 0.25), 30, False, 1, 3.0, (0.0, 0.2)),
    "ibot_vits16_100ep": ("vit_small_patch16", 100, 5e-4, 1e-6, (0.25, 1), (0.05, 0.25), 30, False, 1, 3.0, (0.0, 0.0)),
    "ibot_vitb16_400ep": ("vit_base_patch16", 400, 7.5e-4, 2e-6, (0.32, 1), (0.05, 0.32), 50, True, 3, 0.3, (0.0, 0.2)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str):
    cfg = PRESETS[name]()
    m, o, t = cfg.method, cfg.optim, cfg.train
    global_crops, local_crops = cfg.views[:2], cfg.views[2:]
    found = (
        *(cfg.model.arch, t.epochs, o.base_lr, o.min_lr, global_crops[0].crop.scale, local_crops[0].crop.scale),
        *(m.warmup_teacher_temp_epochs, m.norm_last_layer, m.freeze_last_layer, o.clip_grad, global_crops[0].mask.pred_ratio_var),
    )
    assert found == PUBLISHED[name]
    assert isinstance(o, AdamW) and (o.betas, o.eps, o.not_decayed) == ((0.9, 0.999), 1e-8, "vectors")
    assert (o.base_batch_size, o.schedule, o.warmup_epochs, o.weight_decay, o.weight_decay_end) == (256, "dino", 10, 0.04, 0.4)
    assert (t.global_batch_size, t.ema_momentum, t.ema_schedule) == (1024, 0.996, "cosine")
    assert (cfg.model.image_size, cfg.model.drop_path) == (224, 0.1)
    assert (m.out_dim, m.shared_head, m.hidden, m.bottleneck, m.head_layers, m.bn_in_head) == (8192, True, 2048, 256, 3, False)
    assert (m.student_temp, m.warmup_teacher_temp, m.teacher_temp) == (0.1, 0.04, 0.07)
    assert (m.warmup_teacher_patch_temp, m.teacher_patch_temp, m.pred_start_epoch) == (0.04, 0.07, 0)
    assert (m.center_momentum, m.patch_center_momentum, m.cls_weight, m.patch_weight) == (0.9, 0.9, 1, 1)
    assert len(local_crops) == 10 and {v.crop.size for v in local_crops} == {96} and {v.mask for v in local_crops} == {None}
    for view in global_crops:
        assert view.crop.size == 224 and view.crop.scale == global_crops[0].crop.scale
        assert dataclasses.replace(view.mask, pred_ratio_var=(0.0, 0.2)) == Mask(shape="block", pred_ratio=(0.0, 0.3), patch_size=16)
    assert {v.crop.interpolation for v in cfg.views} == {"bicubic"}


def test_flags_of_masks_are_printed_and_read(capsys):
    cfg, _ = cli.parse_cli(["--method", "ibot", "--views.0.mask.shape", "rand", "--views.0.mask.pred-ratio-var", "0", "0.1"])
    assert cfg.views[0].mask == Mask(shape="rand", pred_ratio_var=(0.0, 0.1)) and cfg.views[1].mask == Mask()
    text = cli.describe(cfg, 16)
    assert "--views.0.mask.shape rand" in text and "--views.1.mask.pred-ratio 0.0 0.3" in text and "views.2.mask" not in text
    assert "mask" not in cli.describe(PRESETS["dino_vits16_100ep"](), 8)
    with pytest.raises(SystemExit):
        cli.parse_cli(["--method", "ibot", "--views.0.mask.pred-ratio", "0.4"])
    assert "pred_ratio_var" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model.arch", "vit_small_patch8"], "--views.0.mask.patch-size 8 --views.1.mask.patch-size 8"),
        (["--views.1.mask.patch-size", "32"], "--views.1.mask.patch-size 32 is not the 16 pixels"),
        (["--model.arch", "resnet50", "--model.drop-path", "0"], "take a ViT"),
        (["--views.0.crop.size", "96"], "crop.size"),
        (["--method.bn-in-head", "True"], "--method.bn-in-head False"),
        (["--method.teacher-patch-temp", "0"], "--method.teacher-patch-temp 0.0 must be positive"),
        (["--model.norm", "eman"], "Take one of local, sync"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(flags: list[str], says: str):
    cfg, _ = cli.parse_cli(["--method", "ibot", *flags])
    with pytest.raises(ConfigError, match=says):
        cli.check(cfg, 16)


@pytest.mark.parametrize("views", [dino(), (*ibot(local_crops=0)[:1], *dino(local_crops=0)[1:]), ibot(local_size=224)])
def test_views_that_do_not_fit_are_refused(views):
    with pytest.raises(ConfigError, match="crops"):
        IBOT.check_views(views)
    IBOT.check_views(ibot())
    IBOT.check_views(ibot(local_crops=0))


def test_networks_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="take a ViT"):
        IBOT(IBOT.Config(**SMALL), partial(build_backbone, "resnet18"), "local")
