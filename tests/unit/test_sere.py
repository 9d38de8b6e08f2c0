"""SERE: relation losses without their memory, geometry from files to relations, terms, published values, refused configurations."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastssl import cli
from fastssl.augment.augmenter import Augmenter
from fastssl.batch import Views, masked_patches
from fastssl.config import AdamW, ConfigError, EfficiencyConfig
from fastssl.distributed import Dist
from fastssl.engine import State, prepare, train_step
from fastssl.losses.relations import channel_loss, global_factors, local_factors, pixel_loss, relation_loss
from fastssl.methods.sere import SERE
from fastssl.models.vit import ViT
from fastssl.presets import PRESETS
from fastssl.recipes import ibot
from fastssl.views import Mask, Photometric
from loaders.build import build_loader
from tests.golden.dino_family import grouped
from tests.unit.test_engine import NoHostReads

ALONE = Dist(0, 1, 0, 1, torch.device("cpu"))
SIZES = (32, 32, 16, 16)
"""Of the crops, pixels: 4 x 4 and 2 x 2 tokens."""


def state_of(*, dtype: str = "fp32", **method) -> State:
    cfg = PRESETS["sere_mini"]()
    small = {"out_dim": 24, "hidden": 16, "bottleneck": 8, "overlap_size": (4, 4), "local_overlap_size": 3, **method}
    cfg = dataclasses.replace(cfg, method=dataclasses.replace(cfg.method, **small), efficiency=EfficiencyConfig(dtype=dtype, compile="off"))
    torch.manual_seed(0)
    return prepare(SERE(cfg.method, lambda: ViT(16, 2, 2, 8, image_size=32), cfg.model.norm), cfg, ALONE, steps_per_epoch=2)


def views_of(step: int, sizes: tuple[int, ...] = SIZES, images: int = 4, dtype: torch.dtype = torch.float32) -> Views:
    """Random crops somewhere in images of 64 pixels, and masks with a number of patches that changes from step to step."""
    rng = np.random.default_rng(step)
    views = grouped([rng.standard_normal((images, 3, s, s)) for s in sizes])
    for group in views.groups:
        group.pixels = group.pixels.to(dtype)
    boxes = np.concatenate((rng.integers(0, 24, (images, len(sizes), 2)), rng.integers(16, 40, (images, len(sizes), 2))), axis=-1)
    masks = rng.random((images, 2, sizes[0] // 8, sizes[0] // 8)) < (0.0, 0.2, 0.6)[step % 3]
    return dataclasses.replace(
        views,
        boxes=torch.from_numpy(boxes).float(),
        flips=torch.from_numpy(rng.random((images, len(sizes))) < 0.5),
        masks=torch.from_numpy(masks),
        masked=torch.from_numpy(masked_patches(masks)),
    )


# ------------------------------------------------------------------------------------------------ losses


@pytest.mark.parametrize("gram", [True, False])
@pytest.mark.parametrize("mass", [1, 2])
def test_a_relation_loss_is_the_cross_entropy_of_its_softmax(gram: bool, mass: int):
    torch.manual_seed(0)
    factors = [torch.randn(3, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in ((5,) if gram else (5, 6))]
    probs = mass * torch.softmax(torch.randn(3, 2, 5, 5 if gram else 6, dtype=torch.float64), -1)
    expected = -(probs * torch.log_softmax(factors[0] @ factors[-1].mT, -1)).sum(-1).mean()
    loss = relation_loss(factors, probs, mass)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(torch.autograd.grad(3 * loss, factors), torch.autograd.grad(3 * expected, factors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def random_features(images: int, local_crops: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """z, p of 6 x 6 tokens, p_local of 3 x 3."""
    torch.manual_seed(0)
    shapes = ((2 * images, 36, channels), (2 * images, 36, channels), (local_crops * images, 9, channels))
    z, p, p_local = (torch.rand(*shape) for shape in shapes)
    return z, p.requires_grad_(), p_local.requires_grad_()


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)], ids=["bf16", "fp16"])
def test_relation_losses_under_autocast(dtype: torch.dtype, most: float):
    """Operands of 16 bits, everything else of 32: the error is that of the operands, also where slopes / rows are below fp16's least."""
    z, p, p_local = random_features(2, 3, 64)
    views = views_of(0, (48, 48, 24, 24, 24), images=2)

    def both(z, p, p_local):
        channel = channel_loss(z, p, p_local, divisors=(6, 3), temperature=0.1)
        pixel = pixel_loss(z, p, p_local, views.boxes, views.flips, groups=2, sizes=(16, 16), local_size=6, temperature=0.5)
        return torch.stack((channel, pixel)), torch.autograd.grad(channel + pixel, (p, p_local))

    exact, exact_grads = both(*(x.double().detach().requires_grad_() for x in (z, p, p_local)))
    with torch.autocast("cpu", dtype=dtype):
        losses, grads = both(z, p, p_local)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), exact, rtol=most, atol=0)
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert float((grad - expected).norm() / expected.norm()) < 5 * most


def test_only_features_are_kept_for_the_backward_pass():
    """A channel relation has 64 x 64 elements an image and an overlap's (16 x 16)^2 a group: more than the features."""
    z, p, p_local = random_features(2, 3, 64)
    views = views_of(0, (48, 48, 24, 24, 24), images=2)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        channel_loss(z, p, p_local, divisors=(6, 3), temperature=0.1)
        channel = max(kept)
        pixel_loss(z, p, p_local, views.boxes, views.flips, groups=2, sizes=(16, 16), local_size=6, temperature=0.5)
    assert 0 < channel <= p.numel() and max(kept) <= 2 * 256 * 2 * 64  # both views' features at 256 points


def test_crops_that_do_not_overlap_have_the_uniform_loss_and_no_gradient():
    z, p, _ = random_features(1, 1, 8)
    flips = torch.zeros(1, 2, dtype=torch.bool)
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 10.0, 10.0, 10.0]]])  # they touch
    loss = pixel_loss(z, p, None, boxes, flips, groups=2, sizes=(5, 3), local_size=2, temperature=0.5)
    (grad,) = torch.autograd.grad(loss, p)
    assert math.isclose(loss.item(), math.log(9), rel_tol=1e-6) and not grad.any()


# ------------------------------------------------------------------------------------------------ geometry


def coordinate_image(width: int, height: int) -> Image.Image:
    """Red is the column and green the row of every pixel."""
    y, x = np.mgrid[:height, :width].astype(np.uint8)
    return Image.fromarray(np.stack((x, y, np.zeros_like(x)), axis=-1))


def test_both_crops_are_sampled_at_the_same_points_of_the_image(tmp_path: Path):
    """methods/sere.md 13.5: from files through loader and augmentation to the features that relations are made of."""
    for i, size in enumerate(((256, 200), (150, 256), (256, 256), (90, 120))):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        coordinate_image(*size).save(tmp_path / "train" / "a" / f"{i}.png")
    crops = ibot(mask=Mask(patch_size=4), size=96, global_scale=(0.25, 1.0), local_crops=4, local_size=48, local_scale=(0.05, 0.4))
    plain = Photometric(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    spec = tuple(dataclasses.replace(view, photometric=plain) for view in crops)
    loader = build_loader(str(tmp_path), "train", spec, dist=ALONE, batch=4, backend="folder", workers=1)
    augment = Augmenter(spec, device="cpu", dtype=torch.float32, seed=0)
    batches = loader.from_step(0)
    compared = {"global": 0, "local": 0}
    for _ in range(4):
        views = augment(next(batches))
        # Tokens of 4 pixels: their mean coordinates, and a one that tells how much of a point's weight lies inside the crop.
        tokens = []
        for group in views.groups:
            pooled = torch.nn.functional.avg_pool2d(group.pixels * 255, 4)
            pooled[:, 2] = 1
            tokens.append(pooled.flatten(2).mT)
        boxes, flips = views.boxes.transpose(0, 1), views.flips.T
        (on_overlap,) = global_factors(tokens[0], boxes, flips, (7, 7), 1)
        pairs = {"global": (on_overlap[0], on_overlap[1]), "local": local_factors(*tokens, boxes, flips, 5, 1)}
        for kind, (a, b) in pairs.items():
            a, b = (x * 3**0.25 for x in (a, b))  # without the root of the relation's scale
            inside = (a[..., 2] > 0.999) & (b[..., 2] > 0.999)
            difference = (a - b).abs()[inside]
            # 8 bits, and the resampling's filter cut at the crop's border: up to a pixel of the image.
            assert difference.max() < 1.5, kind
            compared[kind] += int(inside.sum())
            # Without the flips, or with rows for columns, it would not be so.
            assert (a[..., :2].amax() - a[..., :2].amin()) > 50
    batches.close()
    assert compared["global"] > 200 and compared["local"] > 500


# ------------------------------------------------------------------------------------------------ steps


def test_a_step_reads_nothing_back_and_logs_every_term():
    state = state_of()
    with NoHostReads():
        outputs = [train_step(state, [views_of(step)]) for step in range(3)]
    logs = {k: v.item() for k, v in outputs[-1].logs.items()}
    assert set(logs) == {"loss_cls", "loss_patch", "loss_pixel", "loss_channel", "teacher_entropy", "patch_entropy"}
    total = 1.65 * (logs["loss_cls"] + logs["loss_patch"]) + 0.2 * logs["loss_pixel"] + 0.5 * logs["loss_channel"]
    assert math.isclose(outputs[-1].loss.item(), total, rel_tol=1e-6)


def test_every_parameter_of_the_student_learns_and_the_teacher_follows():
    state = state_of(freeze_last_layer=0)
    method = state.method
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    for step in range(3):  # the first learning rate is 0, and step 0 hides no patches
        train_step(state, [views_of(step)])
    unmoved = {name for name, p in method.named_parameters() if torch.equal(p, before[name])}
    # Keys' biases have no gradient and start from 0; nothing else may stay.
    assert unmoved <= {name for name in before if name.startswith("teacher.") and name.endswith("attn.qkv.bias")}, unmoved
    statistics = dict(method.named_buffers())
    assert statistics["teacher_relations.global.statistics.running_mean"].any()
    assert not statistics["teacher_relations.global.predictor_statistics.running_mean"].any()  # the teacher predicts nothing


def test_without_local_crops_there_are_no_heads_for_them():
    state = state_of(local_relations=False)
    assert math.isfinite(train_step(state, [views_of(0, SIZES[:2])]).loss.item())
    assert set(state.method.student_relations) == {"global"}


def test_bf16_is_close_to_fp32():
    losses = {}
    for dtype in ("fp32", "bf16"):
        out = train_step(state_of(dtype=dtype), [views_of(2)])
        losses[dtype] = torch.stack([out.loss, *(out.logs[f"loss_{term}"] for term in ("cls", "patch", "pixel", "channel"))])
        assert all(v.dtype == torch.float32 for v in (out.loss, *out.logs.values()))
    torch.testing.assert_close(losses["bf16"], losses["fp32"], rtol=0.05, atol=0)


@pytest.mark.slow
def test_one_graph_whatever_is_masked():
    """Forward and backward traced, without Inductor, which takes minutes; 256 and 512 listed patches."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, eager = state_of(dtype="fp64"), state_of(dtype="fp64")
    compiled.method.compile(backend="aot_eager", dynamic=False)
    listed = set()
    for step in range(4):
        views = views_of(step, images=16, dtype=torch.float64)
        listed.add(len(views.masked))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            loss = train_step(compiled, [views]).loss
        torch.testing.assert_close(loss, train_step(eager, [views]).loss, rtol=1e-9, atol=0)
    assert listed == {256, 512} and not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ------------------------------------------------------------------------------------------------ presets

# methods/sere.md section 8: architecture, lr per 256, min lr, warm-up of the teacher temperatures, rows of the last layer at length 1,
# epochs it is frozen, scales, local crops
PUBLISHED = {
    "sere_vits16_100ep": ("vit_small_patch16", 5e-4, 1e-6, 30, False, 1, (0.4, 1), (0.05, 0.4), 10),
    "sere_vitb16_100ep": ("vit_base_patch16", 7.5e-4, 2e-6, 50, True, 3, (0.32, 1), (0.05, 0.32), 10),
    "sere_vits16_100ep_2x224": ("vit_small_patch16", 5e-4, 1e-6, 30, False, 1, (0.14, 1), None, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str):
    cfg = PRESETS[name]()
    m, o, t, local = cfg.method, cfg.optim, cfg.train, cfg.views[2:]
    found = (
        *(cfg.model.arch, o.base_lr, o.min_lr, m.warmup_teacher_temp_epochs, m.norm_last_layer, m.freeze_last_layer),
        *(cfg.views[0].crop.scale, local[0].crop.scale if local else None, len(local)),
    )
    assert found == PUBLISHED[name]
    assert isinstance(o, AdamW) and (o.betas, o.eps, o.not_decayed) == ((0.9, 0.999), 1e-8, "norm_weights")
    assert (o.base_batch_size, o.schedule, o.warmup_epochs, o.weight_decay, o.weight_decay_end) == (256, "dino", 10, 0.04, 0.4)
    assert (t.epochs, t.global_batch_size, t.ema_momentum, o.clip_grad) == (100, 1024, 0.996, 0.3)
    assert (cfg.model.drop_path, cfg.model.norm, cfg.model.image_size) == (0.1, "sync", 224)
    assert (m.out_dim, m.shared_head, m.student_temp, m.center_momentum, m.patch_center_momentum) == (8192, True, 0.1, 0.9, 0.9)
    assert (m.warmup_teacher_temp, m.teacher_temp, m.warmup_teacher_patch_temp, m.teacher_patch_temp) == (0.04, 0.07, 0.04, 0.07)
    assert (m.alpha, m.beta, m.temperature_pixel, m.temperature_channel, m.overlap_size) == (0.2, 0.5, 0.5, 0.1, (13, 13))
    assert (m.local_overlap_size, m.relation_divisors, m.local_relations, m.pred_start_epoch) == (6, (14, 6), bool(local), 0)
    assert [v.mask for v in cfg.views] == [Mask(shape="block", pred_ratio=(0.0, 0.3), pred_ratio_var=(0.0, 0.2), patch_size=16)] * 2 + [
        None
    ] * len(local)
    assert {v.crop.size for v in cfg.views[:2]} == {224} and {v.crop.size for v in local} <= {96}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--method.local-relations", "False"], "local crops"),
        (["--method.overlap-size", "13", "1"], "at least 2"),
        (["--method.temperature-pixel", "0"], "positive"),
        (["--model.arch", "resnet50"], "take a ViT"),
    ],
)
def test_configurations_that_cannot_train_are_refused(flags: list[str], says: str):
    cfg, _ = cli.parse_cli(["--preset", "sere_vits16_100ep", *flags])
    with pytest.raises(ConfigError, match=says):
        cli.check(cfg, world=8)
