"""Command line, presets and the saved configuration."""

from __future__ import annotations

import dataclasses
import json
from typing import get_type_hints

import pytest

from fastssl import cli
from fastssl.config import AdamW, BarlowLars, ConfigError, DataConfig, EfficiencyConfig, Lars, Sgd, from_dict, to_dict
from fastssl.methods import METHODS
from fastssl.presets import DEFAULTS, PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_complete(name: str):
    cfg = PRESETS[name]()
    assert cfg.preset == name and PRESETS[name].__doc__
    assert name.startswith(cfg.method.name)
    assert from_dict(json.loads(json.dumps(to_dict(cfg))), cfg) == cfg
    assert (
        cli.check(cfg, world=max(1, cfg.train.global_batch_size // (cfg.train.published_rank_batch or cfg.train.global_batch_size))) == []
    )


def test_every_method_has_a_default_and_a_mini():
    for method in METHODS:
        assert PRESETS[DEFAULTS[method]]().method.name == method
        assert f"{method}_mini" in PRESETS


# methods/lewel.md section 10 and methods/byol.md section 8
PUBLISHED = {
    "lewel_b_eman_r50_100ep": (100, 1024, 3.6, 1e-6, 0.98, "eman"),
    "lewel_b_eman_r50_200ep": (200, 1024, 3.6, 1.5e-6, 0.98, "eman"),
    "lewel_b_sync_r50_400ep": (400, 4096, 7.2, 1e-6, 0.996, "sync"),
    "byol_eman_r50_200ep": (200, 512, 1.8, 1e-6, 0.98, "eman"),
    "byol_eman_r50_100ep": (100, 1024, 3.6, 1e-6, 0.98, "eman"),
    "byol_r50_100ep": (100, 4096, 7.2, 1e-6, 0.99, "sync"),
    "byol_r50_300ep": (300, 4096, 4.8, 1e-6, 0.99, "sync"),
    "byol_r50_1000ep": (1000, 4096, 3.2, 1.5e-6, 0.996, "sync"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str):
    cfg = PRESETS[name]()
    assert isinstance(cfg.optim, Lars)
    found = (
        *(cfg.train.epochs, cfg.train.global_batch_size, cfg.optim.base_lr, cfg.optim.weight_decay),
        *(cfg.train.ema_momentum, cfg.model.norm),
    )
    assert found == PUBLISHED[name]
    assert (cfg.optim.warmup_epochs, cfg.optim.sgd_momentum, cfg.optim.eta) == (10, 0.9, 0.001)
    assert (cfg.optim.schedule, cfg.optim.weight_decay_end, cfg.optim.clip_grad) == ("eman", None, 0.0)
    assert cfg.optim.peak_lr(2 * cfg.train.global_batch_size) == cfg.optim.base_lr
    assert (cfg.method.hidden, cfg.method.dim, cfg.method.projector_layers) == (4096, 256, 2)
    assert ("mlp.1" in cfg.optim.exclude) == (name == "lewel_b_eman_r50_200ep")
    if cfg.method.name == "lewel":
        assert (cfg.method.heads, cfg.method.scale, cfg.method.loss_weight) == (4, 1.0, 0.5)
    a, b = cfg.views
    assert (a.crop, a.crop.size, a.crop.scale, a.crop.ratio, a.crop.interpolation) == (b.crop, 224, (0.2, 1.0), (3 / 4, 4 / 3), "bilinear")
    for p in (a.photometric, b.photometric):
        assert (p.jitter, p.brightness, p.contrast, p.saturation, p.hue, p.grey, p.sigma) == (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, (0.1, 2.0))
    assert [(p.photometric.blur, p.photometric.solarize) for p in (a, b)] == [(1.0, 0.0), (0.1, 0.2)]


# methods/dino.md section 8, methods/scfs.md section 7: architecture, optimizer, epochs, batch, lr per 256, min lr, weight decay, its end,
# clip, outputs, rows of the last layer at length 1, BatchNorm in the head, teacher temperature, its warm-up, scales, local crops
DISTILLED = {
    "dino_vits16_100ep": ("vit", AdamW, 100, 512, 5e-4, 1e-6, 0.04, 0.4, 3.0, 65536, True, False, 0.04, 0, (0.4, 1), (0.05, 0.4), 8),
    "dino_vits16_300ep": ("vit", AdamW, 300, 1024, 5e-4, 1e-6, 0.04, 0.4, 3.0, 65536, False, False, 0.07, 30, (0.4, 1), (0.05, 0.4), 8),
    "dino_vits16_800ep": ("vit", AdamW, 800, 1024, 5e-4, 1e-5, 0.04, 0.4, 0.0, 65536, False, False, 0.07, 30, (0.25, 1), (0.05, 0.25), 10),
    "dino_r50_100ep": ("r50", Sgd, 100, 512, 0.03, 1e-6, 1e-4, None, 3.0, 65536, True, False, 0.04, 0, (0.14, 1), (0.05, 0.14), 8),
    "dino_r50_800ep_lars": (
        *("r50", BarlowLars, 800, 4080, 0.3, 0.0048, 1e-6, None, 0.0, 60000, True, True, 0.07, 50, (0.14, 1), (0.05, 0.14), 6),
    ),
    "dino_r50_200ep_bs256": ("r50", Sgd, 200, 256, 0.1, 0.0048, 1e-4, None, 3.0, 65536, True, False, 0.07, 50, (0.25, 1), (0.05, 0.25), 8),
    "scfs_r50_200ep": ("r50", Sgd, 200, 256, 0.1, 0.0048, 1e-4, None, 3.0, 65536, True, False, 0.07, 50, (0.25, 1), (0.05, 0.25), 8),
    "scfs_r50_800ep": ("r50", Sgd, 800, 1024, 0.1, 0.0048, 1e-4, None, 3.0, 65536, True, False, 0.07, 50, (0.25, 1), (0.05, 0.25), 8),
}


@pytest.mark.parametrize("name", DISTILLED)
def test_published_values_of_self_distillation(name: str):
    cfg = PRESETS[name]()
    m, o, t = cfg.method, cfg.optim, cfg.train
    vit = cfg.model.arch == "vit_small_patch16"
    assert vit or (cfg.model.arch, cfg.model.norm, cfg.model.drop_path) == ("resnet50", "sync", 0.0)
    local = cfg.views[2:]
    found = (
        *("vit" if vit else "r50", type(o), t.epochs, t.global_batch_size, o.base_lr, o.min_lr, o.weight_decay, o.weight_decay_end),
        *(o.clip_grad, m.out_dim, m.norm_last_layer, m.bn_in_head, m.teacher_temp, m.warmup_teacher_temp_epochs),
        *(cfg.views[0].crop.scale, local[0].crop.scale, len(local)),
    )
    assert found == DISTILLED[name]
    assert (o.base_batch_size, o.schedule, o.warmup_epochs, t.ema_momentum) == (256, "dino", 10, 0.996)
    assert cfg.model.drop_path == (0.1 if vit else 0.0) and cfg.model.image_size == 224
    assert (m.hidden, m.bottleneck, m.head_layers, m.student_temp) == (2048, 256, 3, 0.1)
    assert (m.warmup_teacher_temp, m.center_momentum, m.freeze_last_layer) == (0.04, 0.9, 1)
    if cfg.method.name == "scfs":
        assert (m.stage_bottleneck, m.stage_hidden, m.stage_dim) == (256, 2048, 256)
    blurs = [v.photometric.blur for v in cfg.views]
    assert blurs == [1.0, 0.1] + [0.5] * len(local) and [v.photometric.solarize for v in cfg.views[:3]] == [0.0, 0.2, 0.0]
    assert {(v.crop.size, v.crop.scale, v.crop.interpolation) for v in local} == {(96, local[0].crop.scale, "bicubic")}
    assert all(v.crop.size == 224 and v.crop.scale == cfg.views[0].crop.scale for v in cfg.views[:2])


def test_flags_change_leaves():
    cfg, dry = cli.parse_cli(
        ["--method", "lewel", "--dry-run", "--optim.base-lr", "0.3", "--views.1.crop.size", "96", "--log.pictures", "False"]
    )
    assert dry and cfg.optim.base_lr == 0.3 and cfg.views[1].crop.size == 96 and cfg.views[0].crop.size == 224 and not cfg.log.pictures


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--method", "lewl"], "Did you mean lewel"),
        (["--preset", "byol_emn_r50_200ep"], "Did you mean byol_eman_r50_200ep"),
        (["--method", "byol", "--preset", "lewel_mini"], "of the method lewel"),
        ([], "Name what to train"),
    ],
)
def test_wrong_names(argv: list[str], says: str):
    with pytest.raises(ConfigError, match=says):
        cli.parse_cli(argv)


def test_unknown_flag_suggests(capsys):
    with pytest.raises(SystemExit) as error:
        cli.parse_cli(["--method", "byol", "--optim.base-l", "1"])
    assert error.value.code == 2
    assert "--optim.base-lr" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "world", "says"),
    [
        (["--train.global-batch-size", "1000"], 3, "does not divide"),
        (["--train.accumulation-steps", "3"], 1, "does not divide"),
        (["--views.0.crop.size", "96"], 1, "two views of one size"),
        (["--optim.base-lr", "0"], 1, "base-lr"),
        (["--optim.base-batch-size", "0"], 1, "base-batch-size"),
        (["--optim.clip-grad", "-1"], 1, "clip-grad"),
        (["--optim.min-lr", "0.1"], 1, "schedule dino"),
        (["--train.epochs", "0"], 1, "--train.epochs"),
        (["--train.max-steps", "0"], 1, "--train.max-steps must be at least 1, got 0"),
        (["--train.max-bad-steps", "0"], 1, "--train.max-bad-steps"),
        (["--train.ema-momentum", "1.5"], 1, "--train.ema-momentum must be between 0 and 1"),
        (["--train.ema-momentum", "nan"], 1, "--train.ema-momentum"),
        (["--optim.weight-decay", "-1"], 1, "--optim.weight-decay must not be negative"),
        (["--optim.weight-decay-end", "-1"], 1, "--optim.weight-decay-end"),
        (["--log.keep-every", "-1"], 1, "--log.keep-every"),
        (["--efficiency.workers", "-1"], 1, "--efficiency.workers"),
        (["--eval.knn-k", "0"], 1, "--eval.knn-k"),
        (["--train.resume", "x", "--train.init-from", "x"], 1, "only one"),
        (["--train.global-batch-size", "8"], 8, "at least two images"),
    ],
)
def test_impossible_configurations(flags: list[str], world: int, says: str):
    cfg, _ = cli.parse_cli(["--method", "lewel", *flags])
    with pytest.raises(ConfigError, match=says):
        cli.check(cfg, world)


def test_weights_to_start_from_go_with_resuming_automatically():
    """The Slurm scripts always pass --train.resume auto."""
    cfg, _ = cli.parse_cli(["--method", "lewel", "--train.resume", "auto", "--train.init-from", "x"])
    assert cli.check(cfg, world=8) == []


def test_choices_are_those_of_the_loaders():
    """fastssl imports nothing of loaders, so their names are written twice."""
    from eval.knn import Args
    from loaders.open import Backend
    from loaders.order import LastBatch, Sampling

    data, efficiency = get_type_hints(DataConfig), get_type_hints(EfficiencyConfig)
    assert (data["order"], data["last_batch"], efficiency["loader"]) == (Sampling, LastBatch, Backend)
    assert get_type_hints(Args)["loader"] == Backend


def test_data_flags():
    flags = ("--data.order", "balanced", "--data.last-batch", "keep", "--data.subset", "first:260")
    cfg, _ = cli.parse_cli(["--method", "byol", *flags])
    assert (cfg.data.order, cfg.data.last_batch, cfg.data.subset) == ("balanced", "keep", "first:260")
    assert from_dict(json.loads(json.dumps(to_dict(cfg))), PRESETS[cfg.preset]()) == cfg


def test_a_last_batch_of_one_image_is_refused():
    cli.check_last_batch(2)
    with pytest.raises(ConfigError, match="--data.last-batch drop"):
        cli.check_last_batch(1)


def test_another_rank_batch_is_warned_about():
    assert cli.check(PRESETS["lewel_b_eman_r50_200ep"](), world=4) == ["BatchNorm sees 256 images per rank; the published run had 128."]
    cfg, _ = cli.parse_cli(["--preset", "lewel_b_eman_r50_200ep", "--train.global-batch-size", "64"])
    assert cli.check(cfg, world=1) == ["BatchNorm sees 64 images per rank; the published run had 128."]


@pytest.mark.parametrize(("preset", "warned"), [("byol_r50_100ep", True), ("dino_r50_100ep", True), ("dino_vits16_100ep", False)])
def test_accumulation_under_sync_is_warned_about(preset: str, warned: bool):
    """A ViT has no BatchNorm."""
    cfg, _ = cli.parse_cli(["--preset", preset, "--train.accumulation-steps", "4", "--model.norm", "sync"])
    images = cfg.train.global_batch_size // 4
    found = cli.check(cfg, world=2)
    assert [f"BatchNorm sees {images} images" in line for line in found] == [True] * warned


def test_description_names_every_flag():
    text = cli.describe(PRESETS["lewel_b_eman_r50_200ep"](), world=8)
    for expected in ("--optim.base-lr 3.6", "--train.global-batch-size 1024", "--optim.weight-decay 1.5e-06", "128  (8 ranks"):
        assert expected in text


def test_description_derives_the_learning_rate():
    cfg = PRESETS["byol_mini"]()
    assert "peak learning rate                1  (as given; reached after 1 epochs)" in cli.describe(cfg, world=1)
    optim = AdamW(base_lr=0.0005, base_batch_size=256, min_lr=1e-6, schedule="dino", warmup_epochs=3)
    cfg = dataclasses.replace(cfg, optim=optim, train=dataclasses.replace(cfg.train, global_batch_size=512))
    text = cli.describe(cfg, world=8)
    assert "peak learning rate                0.001  (0.0005 x global batch 512 / 256; reached after 3 epochs)" in text
    assert "final learning rate               1e-06  (whatever the batch; a cosine ends there after 8 epochs)" in text


def test_a_learning_rate_that_rises_is_warned_about():
    """SCFS's min_lr on a few images per step."""
    cfg = PRESETS["byol_mini"]()
    for batch, warned in ((8, True), (64, False)):
        optim = Sgd(base_lr=0.1, base_batch_size=256, min_lr=0.0048, schedule="dino", warmup_epochs=1)
        changed = dataclasses.replace(cfg, optim=optim, train=dataclasses.replace(cfg.train, global_batch_size=batch))
        assert any("rises" in w for w in cli.check(changed, world=1)) == warned


@pytest.mark.parametrize("optim", [AdamW(base_lr=0.1, betas=(0.8, 0.99)), Sgd(base_lr=0.1), BarlowLars(base_lr=0.1, weight_decay_end=0.4)])
def test_every_optimizer_is_saved(optim):
    cfg = dataclasses.replace(PRESETS["byol_mini"](), optim=optim)
    assert from_dict(json.loads(json.dumps(to_dict(cfg))), cfg) == cfg


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--preset", "simclr_mini", "--method.temperature", "0"], "--method.temperature 0.0 must be positive"),
        (["--preset", "auh_mini", "--method.scale", "-1"], "--method.scale -1.0 must be positive"),
        (["--preset", "lewel_m_mini", "--model.arch", "vit_tiny_patch8"], "take a ResNet"),
        (["--preset", "lewel_mini", "--model.arch", "vit_tiny_patch8"], "take a ResNet"),
        (["--preset", "sfrik_mini", "--model.norm", "eman"], "Take one of local, sync"),
        (["--preset", "dino_mini", "--model.norm", "eman"], "Take one of local, sync"),
        (["--preset", "byol_mini", "--train.accumulation-steps", "0"], "must be at least 1"),
        (["--preset", "sfrik_r18_100ep_in20", "--train.epochs", "10"], "--optim.warmup-epochs 10 must be"),
    ],
)
def test_what_could_only_fail_later_is_refused_first(flags: list[str], says: str):
    cfg, _ = cli.parse_cli(flags)
    with pytest.raises(ConfigError, match=says):
        cli.check(cfg, 1)
