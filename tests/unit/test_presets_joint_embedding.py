"""The published values of SFRIK, SimCLR, AUH and VICReg (methods/sfrik.md sections 7, 8, 10; simclr.md, auh.md, vicreg.md)."""

from __future__ import annotations

import pytest

from fastssl import cli
from fastssl.config import BarlowLars
from fastssl.presets import DEFAULTS, PRESETS
from fastssl.views import IMAGENET_MEAN, STL10_MEAN, CenterCrop, PatchCrop

R50, R18 = ("resnet50", "8192-8192-32768"), ("resnet18", "8192-8192-8192")
# architecture and projector; epochs, batch, learning rate per 256, its peak; ranks; subset; the method's own values
PUBLISHED = {
    "sfrik_r50_200ep": (R50, (200, 2048, 0.4, 3.2), 8, "", {"sim_coeff": 40000.0, "reg_small": True}),
    "sfrik_r18_100ep_in20": (R18, (100, 2048, 1.2, 9.6), 4, "first:260", {"sim_coeff": 4000.0, "reg_small": True}),
    "sfrik_r18_100ep_stl10": (R18, (100, 2048, 1.2, 9.6), 1, "", {"sim_coeff": 4000.0, "reg_small": True}),
    "sfrik_r18_100ep_in20_obow": (
        *(R18, (100, 2048, 1.2, 9.6), 4, "first:260"),
        {"sim_coeff": 4000.0, "reg_small": True, "general_indices": (0,)},
    ),
    "sfrik_r18_100ep_in20_swav": (
        *(R18, (100, 2048, 1.2, 9.6), 4, "first:260"),
        {"sim_coeff": 4000.0, "reg_small": False, "general_indices": (0, 1)},
    ),
    "simclr_r18_100ep_in20": (R18, (100, 2048, 0.8, 6.4), 4, "first:260", {"temperature": 0.15}),
    "auh_r18_100ep_in20": (R18, (100, 2048, 1.0, 8.0), 4, "first:260", {"sim_coeff": 3000.0, "unif_coeff": 1.0, "scale": 2.5}),
    "vicreg_r18_100ep_in20": (R18, (100, 2048, 0.7, 5.6), 4, "first:260", {"sim_coeff": 10.0, "std_coeff": 10.0, "cov_coeff": 1.0}),
    "vicreg_r50_1000ep": (
        *(("resnet50", R18[1]), (1000, 2048, 0.2, 1.6), 32, ""),
        {"sim_coeff": 25.0, "std_coeff": 25.0, "cov_coeff": 1.0},
    ),
    "vicreg_r50_100ep": (("resnet50", R18[1]), (100, 512, 0.3, 0.6), 8, "", {"sim_coeff": 25.0, "std_coeff": 25.0, "cov_coeff": 1.0}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str):
    net, (epochs, batch, lr, peak), ranks, subset, values = PUBLISHED[name]
    cfg = PRESETS[name]()
    assert cli.check(cfg, world=ranks) == []
    assert (cfg.model.arch, cfg.method.mlp) == net
    assert (cfg.model.norm, cfg.model.zero_init_residual) == ("sync", True)
    o, t = cfg.optim, cfg.train
    assert isinstance(o, BarlowLars)
    assert (t.epochs, t.global_batch_size, o.base_lr, o.base_batch_size) == (epochs, batch, lr, 256)
    assert o.peak_lr(batch) == pytest.approx(peak) and o.final_lr(batch) == pytest.approx(0.001 * peak)
    assert (o.sgd_momentum, o.eta, o.weight_decay, o.weight_decay_end, o.clip_grad) == (0.9, 0.001, 1e-6, None, 0.0)
    assert (o.schedule, o.warmup_epochs, t.accumulation_steps) == ("vicreg", 10, 1)
    assert (cfg.data.subset, cfg.data.last_batch) == (subset, "keep")
    assert {k: getattr(cfg.method, k) for k in values} == values
    if cfg.method.name == "sfrik":
        assert (cfg.method.mmd_coeff, cfg.method.weights) == (1.0, (1.0, 40.0, 40.0))
    text = cli.describe(cfg, ranks)
    assert f"--method.mlp {net[1]}" in text and f"{batch // ranks}  ({ranks} ranks" in text
    assert f"peak learning rate                {peak:g}  ({lr:g} x global batch {batch} / 256; reached after 10 epochs)" in text


TWO_VIEWS = [n for n in PUBLISHED if not n.endswith(("obow", "swav", "stl10"))]


@pytest.mark.parametrize("name", TWO_VIEWS)
def test_vicregs_augmentation(name: str):
    a, b = PRESETS[name]().views
    assert (a.crop, a.crop.size, a.crop.scale, a.crop.ratio, a.crop.interpolation) == (b.crop, 224, (0.08, 1.0), (3 / 4, 4 / 3), "bicubic")
    for p in (a.photometric, b.photometric):
        assert (p.jitter, p.brightness, p.contrast, p.saturation, p.hue, p.grey, p.sigma) == (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, (0.1, 2.0))
    assert [(p.photometric.blur, p.photometric.solarize) for p in (a, b)] == [(1.0, 0.0), (0.1, 0.2)]


def test_multi_crops():
    original, *crops, patches = PRESETS["sfrik_r18_100ep_in20_obow"]().views
    assert isinstance(original.crop, CenterCrop) and (original.crop.size, original.crop.resize, original.photometric.jitter) == (
        224,
        256,
        0,
    )
    assert [(v.crop.size, v.crop.scale, v.photometric.hue, v.photometric.blur) for v in crops] == [(160, (0.08, 0.6), 0.4, 0.5)] * 2
    assert isinstance(patches.crop, PatchCrop)
    assert (patches.crop.size, patches.crop.scale, patches.crop.patch_size, patches.crop.patches) == (256, (0.6, 1.0), 96, 5)
    assert (patches.crop.patch_jitter, patches.photometric.blur, patches.photometric.mean) == (24, 0.0, IMAGENET_MEAN)
    views = PRESETS["sfrik_r18_100ep_in20_swav"]().views
    assert [(v.crop.size, v.crop.scale) for v in views] == [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6
    p = views[0].photometric
    assert (p.jitter, p.brightness, p.contrast, p.saturation, p.hue, p.grey, p.blur) == (0.8, 0.8, 0.8, 0.8, 0.2, 0.2, 0.5)


def test_stl10():
    cfg = PRESETS["sfrik_r18_100ep_stl10"]()
    assert cfg.data.path.endswith("unlabeled.beton")
    a, b = cfg.views
    assert a == b and (a.crop.size, a.crop.scale, a.crop.interpolation) == (64, (0.08, 1.0), "bicubic")
    p = a.photometric
    assert (p.jitter, p.brightness, p.contrast, p.saturation, p.hue, p.grey, p.blur, p.solarize) == (1.0, 0.4, 0.4, 0.4, 0.4, 0.2, 0, 0)
    assert p.mean == STL10_MEAN


def test_defaults():
    found = [DEFAULTS[m] for m in ("sfrik", "simclr", "auh", "vicreg")]
    assert found == ["sfrik_r50_200ep", "simclr_r18_100ep_in20", "auh_r18_100ep_in20", "vicreg_r18_100ep_in20"]
