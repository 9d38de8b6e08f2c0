"""The Triton kernels, interpreted on the CPU, against the torch reference: every recipe, every extreme, draws bit for bit.

tests/gpu/test_augment_gpu.py runs the compiled kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastssl.augment import augmenter
from fastssl.augment.augmenter import GroupPlan
from fastssl.augment.draws import ColourDraws
from fastssl.batch import ImageBatch
from fastssl.recipes import RECIPES
from fastssl.views import CenterCrop, Crop, Photometric, View, ViewSpec, groups
from tests.conftest import ROOT
from tests.images import WILD_COLOURS, batch_of, images, small

fused = pytest.importorskip("fastssl.augment.fused", reason="needs Triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA the kernels are compiled: tests/gpu")

# Grey levels.  A value that waits between two passes is rounded to 1/257; contrast and brightness then enlarge that.
RECIPE = 0.02  # 0.011 (swav)
WILD = 0.03
# Half a step of the type; a whole one of bfloat16, to which the interpreter (not a GPU) casts by cutting off.
CAST = {torch.bfloat16: 2**-7, torch.float16: 2**-11, torch.float32: 0.0}
CPU = torch.device("cpu")


def difference(batch: ImageBatch, spec: ViewSpec, seed: int = 2) -> float:
    """Largest difference of any view in grey levels, but for values that rounding puts on the other side of solarise's threshold."""
    draws, worst = ColourDraws(spec, device=CPU, seed=seed), 0.0
    drawn = draws(batch.epoch, batch.index)
    for views in groups(spec):
        plan, params = GroupPlan.of(spec, views, CPU), drawn.of(views)
        expected = augmenter.render(batch, plan, params)
        found = fused.render(batch, plan, params, dtype=torch.float32, channels_last=True)
        assert found.is_contiguous(memory_format=torch.channels_last)
        off = ((found - expected) * plan.std.repeat_interleave(len(batch), 0)[:, :, None, None] * 255).abs()
        crosses = params.solarize.flatten()[:, None, None, None] & (off < 1.0 + WILD) & (off > WILD)
        assert crosses.float().mean() < 1e-3
        worst = max(worst, off[~crosses].max().item())
    return worst


DIFFERENT = {RECIPES[name](): name for name in reversed(RECIPES)}


@pytest.mark.parametrize("name", ["byol", "dino", "obow", "w2ssl_quad", "eval_bicubic"])
def test_recipes_in_small(name: str):
    spec = small(RECIPES[name]())
    assert difference(batch_of(spec, images(2, seed=len(name))), spec) <= RECIPE


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT.values())
def test_every_recipe_at_its_size(name: str):
    spec = RECIPES[name]()
    assert difference(batch_of(spec, images(1, seed=len(name), low=300, high=500)), spec) <= RECIPE


@pytest.mark.slow
def test_a_batch_of_dino_with_eight_local_crops():
    spec = RECIPES["dino"]()
    assert len(spec) == 10
    assert difference(batch_of(spec, images(4, low=250, high=500)), spec) <= RECIPE


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_wild_parameters(interpolation: str):
    """Strong jitter, wide blurs, two interpolations and both kinds of crop in one group, an odd size of several tiles."""
    spec = (
        View(crop=Crop(size=37, interpolation=interpolation), photometric=WILD_COLOURS),
        View(crop=Crop(size=37, scale=(0.01, 0.1)), photometric=WILD_COLOURS),
        View(crop=CenterCrop(size=37, resize=50, flip=0.5, interpolation=interpolation), photometric=WILD_COLOURS),
    )
    assert difference(batch_of(spec, images(2)), spec) <= WILD


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_extreme_scales(interpolation: str):
    """20 times smaller, 20 times larger, single pixels and lines, boxes at every border."""
    rng = np.random.default_rng(3)
    large, tiny = (rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((331, 320, 3), (1, 1, 3)))
    boxes = [(0, 0, 331, 320), (11, 0, 320, 320), (330, 319, 1, 1), (0, 0, 1, 320), (5, 7, 326, 1), (0, 319, 2, 1), (40, 31, 16, 16)]
    sources = [large] * len(boxes) + [tiny]
    boxes.append((0, 0, 1, 1))
    flips = [[i % 2 == 0] for i in range(len(boxes))]
    spec = (View(crop=Crop(size=16, interpolation=interpolation)),)
    assert difference(ImageBatch.of(sources, [[b] for b in boxes], flips), spec) <= RECIPE
    spec = (View(crop=Crop(size=100, interpolation=interpolation)),)
    assert difference(ImageBatch.of([large], [[(100, 90, 5, 6)]], [[True]]), spec) <= RECIPE


@pytest.mark.parametrize("sigma", [0.1, 1.0, 2.0, 3.3, 9.0])
def test_blurs_at_the_border(sigma: float):
    """Images smaller than the blur reaches, of one pixel, and of two tiles."""
    for size in (1, 5, 35):
        spec = (View(crop=Crop(size=size), photometric=Photometric(blur=1.0, sigma=(sigma, sigma))),)
        assert difference(batch_of(spec, images(1)), spec) <= RECIPE


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", CAST)
def test_types_and_layouts(dtype: torch.dtype, channels_last: bool):
    spec = small(RECIPES["byol"]())
    batch, plan = batch_of(spec, images(2)), GroupPlan.of(spec, (0, 1), CPU)
    params = ColourDraws(spec, device=CPU, seed=2)(1, batch.index)
    exact = fused.render(batch, plan, params, dtype=torch.float64, channels_last=True)
    found = fused.render(batch, plan, params, dtype=dtype, channels_last=channels_last)
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert ((found.double() - exact).abs() <= exact.abs() * CAST[dtype] + 1e-6).all()


def test_every_pixel_is_written(monkeypatch):
    """The same result whatever was in the memory it is put into and passes through."""
    spec = small(RECIPES["dino"]())[:2]
    batch, plan = batch_of(spec, images(2)), GroupPlan.of(spec, (0, 1), CPU)
    params = ColourDraws(spec, device=CPU, seed=2)(1, batch.index)
    expected = fused.render(batch, plan, params, dtype=torch.float32, channels_last=True)
    plain = torch.empty
    for poison in (7, 200):
        monkeypatch.setattr(torch, "empty", lambda *a, _p=poison, **k: plain(*a, **k).fill_(_p))
        assert torch.equal(fused.render(batch, plan, params, dtype=torch.float32, channels_last=True), expected)


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 5])
def test_draws_are_those_of_the_reference(seed: int):
    """Bit for bit, for every epoch, more samples than one program takes, ids up to 2^32."""
    spec = (*RECIPES["dino"](), View(photometric=WILD_COLOURS))
    draws = ColourDraws(spec, device=CPU, seed=seed)
    index = torch.cat((torch.arange(200), torch.tensor([2**31 + 3, 2**32 - 1])))
    for epoch in (0, 1, 16):
        for ours, reference in zip(fused.FusedDraws(draws)(epoch, index).tensors(), draws(epoch, index).tensors(), strict=True):
            assert ours.dtype == reference.dtype and torch.equal(ours, reference)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [70, 80, 90, 100])
def test_kernels_compile(capability: int):
    """For a GPU that need not be there, down to machine code: what the interpreter takes is not always what the compiler takes."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels", str(capability)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("compiled") == 10
