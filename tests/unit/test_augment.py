"""fastssl.augment against Pillow and torchvision on the same parameters, and the CPU kernels against the torch reference."""

import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter, ImageOps
from skimage import data as photographs
from torchvision.transforms import InterpolationMode

from fastssl.augment import Augmenter, augmenter, blur, colour, cpu
from fastssl.augment.draws import BRIGHTNESS, CONTRAST, HUE, ORDERS, SATURATION, ColourDraws, ColourParams
from fastssl.batch import ImageBatch
from fastssl.recipes import byol_asymmetric, center_crop
from fastssl.views import CenterCrop, Crop, Photometric, View

# Differences on the 0..255 scale, as (mean, largest) absolute; the measured values are in the comments.
# Pillow rounds after each of its two passes; we do not round at all. Bicubic overshoots are clipped in between, and since
# version 13 Pillow decides per size which pass comes first, so bicubic is compared on images that do not reach the clip
# (`faded`), and the clip itself where there is one pass only.
RESAMPLE = {"bilinear": (0.4, 1.01), "bicubic": (0.4, 1.2)}  # 0.36, 1.00 | 0.34, 1.08
ONE_PASS = (0.3, 0.51)  # 0.25, 0.50
# Pillow truncates after each blend: half a step of bias, one step at most, a rounded grey or mean on top.
BLEND = (0.7, 1.5)  # 0.55, 1.2
GREY = (0.3, 0.51)  # 0.25, 0.5
# Pillow keeps hue in 8 bits: a step is 6 / 255 of the chroma, and hue, its shift and the saturation are all truncated.
TURN_NATURAL = (1.2, 9.0)  # 1.0, 7.0
TURN_NOISE = (2.0, 18.0)  # 1.4, 14.4
# Pillow rounds after each of six passes.
BLUR = (1.4, 3.5)  # 1.24 (two-tone at sigma .1), 2.9
# The whole chain: truncations and hue steps add up to a bias of one channel. Of the worst crop, and over all crops.
CHAIN = (3.5, 13.0)  # 3.2, 11.3
CHAIN_MEAN = 1.6  # 1.4
# CPU kernels and torch reference differ by the order of float32 sums.
KERNEL = 2e-3  # 3e-4

RAW = Photometric(mean=(0, 0, 0), std=(1 / 255,) * 3)
"""Changes nothing: pixels come back on the 0..255 scale."""
RENDERERS = {"kernel": cpu.render, "torch": augmenter.render}


def crop_box(rng, h, w):
    """A whole-number box inside an h x w image."""
    bh, bw = int(rng.integers(1, h + 1)), int(rng.integers(1, w + 1))
    return int(rng.integers(0, h - bh + 1)), int(rng.integers(0, w - bw + 1)), bh, bw


@pytest.fixture(scope="module")
def pictures():
    """Photographs, noise, grey and two-tone images of odd sizes."""
    rng = np.random.default_rng(0)
    astronaut, coffee = photographs.astronaut(), photographs.coffee()
    sources = [(astronaut, 97, 131), (coffee, 120, 100), (astronaut, 64, 64), (coffee, 201, 77)]
    out = [np.ascontiguousarray(p[40 : 40 + h, 150 : 150 + w]) for p, h, w in sources]
    out.append(rng.integers(0, 256, (83, 59, 3), dtype=np.uint8))
    out.append((rng.random((50, 70, 1)) < 0.5).repeat(3, 2).astype(np.uint8) * 255)
    out.append(np.repeat(out[0][..., :1], 3, axis=2))
    return out


def faded(image):
    """Less contrast: no bicubic overshoot reaches 0 or 255."""
    return (128 + (image.astype(np.float32) - 128) * 0.6).astype(np.uint8)


def params(views, batch, **given) -> ColourParams:
    """Parameters that change nothing, but for those given."""

    def full(value):
        return torch.full((views, batch), value)

    neutral = dict(
        jitter=full(False),
        order=torch.tensor(ORDERS[0]).expand(views, batch, 4),
        brightness=full(1.0),
        contrast=full(1.0),
        saturation=full(1.0),
        hue=full(0.0),
        grey=full(False),
        sigma=full(0.0),
        solarize=full(False),
    )
    return ColourParams(**{**neutral, **given})


def plan_of(spec):
    """The single group of `spec`."""
    (plan,) = Augmenter(spec, device="cpu", dtype=torch.float32, seed=0).plans
    return plan


def pil_resize(image, box, size, interpolation, flip=False):
    mode = InterpolationMode.BICUBIC if interpolation == "bicubic" else InterpolationMode.BILINEAR
    out = TF.resized_crop(Image.fromarray(image), *box, [size, size], mode)
    return TF.hflip(out) if flip else out


def hwc(x):
    return x.permute(1, 2, 0).numpy()


def assert_near(ours, theirs, tolerance, what=""):
    difference = np.abs(ours.astype(np.float64) - np.asarray(theirs, dtype=np.float64))
    mean, largest = tolerance
    assert difference.mean() <= mean and difference.max() <= largest, f"{what}: mean {difference.mean():.3f}, max {difference.max():.2f}"


# ------------------------------------------------------------------------------------------------ resampling


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", RENDERERS)
@pytest.mark.parametrize(("size", "pad"), [(33, 0), (64, 5), (7, 1)])
def test_resized_crop_is_pillows(pictures, name, interpolation, size, pad):
    rng = np.random.default_rng(size)
    pictures = [faded(p) for p in pictures] if interpolation == "bicubic" else pictures
    boxes = [[crop_box(rng, *im.shape[:2]) for _ in range(3)] for im in pictures]
    flips = rng.random((len(pictures), 3)) < 0.5
    batch = ImageBatch.of(pictures, boxes, flips, pad=pad)
    spec = (View(crop=Crop(size=size, interpolation=interpolation), photometric=RAW),) * 3
    out = RENDERERS[name](batch, plan_of(spec), params(3, len(pictures))).unflatten(0, (3, -1))
    for v in range(3):
        for i, im in enumerate(pictures):
            expected = pil_resize(im, boxes[i][v], size, interpolation, flips[i, v])
            assert_near(hwc(out[v, i]), expected, RESAMPLE[interpolation], f"image {i}, box {boxes[i][v]}")


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", RENDERERS)
def test_extreme_scales(name, interpolation):
    """20 times smaller, 20 times larger, single pixels and lines, boxes at every border."""
    rng = np.random.default_rng(3)
    im = faded(rng.integers(0, 256, (331, 320, 3)))
    tiny = rng.integers(0, 256, (1, 1, 3), dtype=np.uint8)
    boxes = [(0, 0, 331, 320), (11, 0, 320, 320), (330, 319, 1, 1), (0, 0, 1, 320), (5, 7, 331 - 5, 1), (0, 319, 2, 1), (40, 31, 16, 16)]
    images = [im] * len(boxes) + [tiny]
    boxes.append((0, 0, 1, 1))
    plan = plan_of((View(crop=Crop(size=16, interpolation=interpolation), photometric=RAW),))
    out = RENDERERS[name](ImageBatch.of(images, [[b] for b in boxes]), plan, params(1, len(boxes)))
    for i, (source, box) in enumerate(zip(images, boxes, strict=True)):
        assert_near(hwc(out[i]), pil_resize(source, box, 16, interpolation), RESAMPLE[interpolation], f"box {box}")
    assert torch.equal(out[7].round(), torch.from_numpy(tiny).float().view(3, 1, 1).expand(3, 16, 16))
    assert (hwc(out[6]).round() == im[40:56, 31:47]).all()  # same size: a copy
    large = plan_of((View(crop=Crop(size=320, interpolation=interpolation), photometric=RAW),))
    out = RENDERERS[name](ImageBatch.of([im], [[(100, 90, 16, 17)]]), large, params(1, 1))
    assert_near(hwc(out[0]), pil_resize(im, (100, 90, 16, 17), 320, interpolation), RESAMPLE[interpolation])


@pytest.mark.parametrize("name", RENDERERS)
def test_bicubic_overshoot_is_clipped(pictures, name):
    """One pass only (the other side keeps its length), full contrast."""
    images = [im for im in pictures for _ in range(2)]
    boxes = [[(3, 2, 30, 51)], [(4, 1, 41, 30)]] * len(pictures)
    plan = plan_of((View(crop=Crop(size=30, interpolation="bicubic"), photometric=RAW),))
    out = RENDERERS[name](ImageBatch.of(images, boxes), plan, params(1, len(images)))
    assert out.min() == 0 and abs(out.max() - 255) < 1e-3
    for i, im in enumerate(images):
        assert_near(hwc(out[i]), pil_resize(im, boxes[i][0], 30, "bicubic"), ONE_PASS, f"image {i}")


def center_box(h, w, resize, size):
    """torchvision's Resize(resize) then CenterCrop(size), as a box of the source."""
    h2, w2 = (resize, int(resize * w / h)) if h <= w else (int(resize * h / w), resize)
    top, left = int(round((h2 - size) / 2)), int(round((w2 - size) / 2))
    return top * h / h2, left * w / w2, size * h / h2, size * w / w2


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", RENDERERS)
@pytest.mark.parametrize(("size", "resize"), [(56, 64), (33, 40), (112, 128)])
def test_center_crop_is_torchvisions(pictures, name, interpolation, size, resize):
    pictures = [faded(p) for p in pictures] if interpolation == "bicubic" else pictures
    boxes = [[center_box(*im.shape[:2], resize, size)] for im in pictures]
    plan = plan_of((View(crop=CenterCrop(size=size, resize=resize, interpolation=interpolation), photometric=RAW),))
    out = RENDERERS[name](ImageBatch.of(pictures, boxes), plan, params(1, len(pictures)))
    mode = InterpolationMode.BICUBIC if interpolation == "bicubic" else InterpolationMode.BILINEAR
    for i, im in enumerate(pictures):
        expected = TF.center_crop(TF.resize(Image.fromarray(im), resize, mode), [size, size])
        assert_near(hwc(out[i]), expected, RESAMPLE[interpolation], f"image {i}")


def test_memory_bound_does_not_change_the_result(pictures, monkeypatch):
    batch = ImageBatch.of(pictures, [[crop_box(np.random.default_rng(i), *im.shape[:2])] for i, im in enumerate(pictures)])
    plan = plan_of((View(crop=Crop(size=24), photometric=RAW),))
    neutral = params(1, len(pictures))
    whole = augmenter.render(batch, plan, neutral)
    monkeypatch.setattr("fastssl.augment.resample.CHUNK_BYTES", 1)
    assert torch.allclose(augmenter.render(batch, plan, neutral), whole, atol=1e-3)
    batch.max_hw = (300, 400)  # a bound from the loader
    assert torch.allclose(augmenter.render(batch, plan, neutral), whole, atol=1e-3)


# ------------------------------------------------------------------------------------------------ colour


def planes(image):
    return torch.from_numpy(image).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.37, 1.8])
@pytest.mark.parametrize("op", ["brightness", "contrast", "saturation"])
def test_blends_are_torchvisions(pictures, op, factor):
    for image in pictures:
        one, order = torch.ones(1), torch.arange(4)[None]
        factors = {"brightness": one, "contrast": one, "saturation": one} | {op: torch.tensor([factor])}
        ours = colour.jitter(planes(image), order, **factors, hue=0 * one)
        theirs = getattr(TF, f"adjust_{op}")(Image.fromarray(image), factor)
        assert_near(hwc(ours[0]), theirs, BLEND)


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.03, 0.0, 0.02, 0.1, 0.3])
def test_hue_is_torchvisions(pictures, shift):
    for i, image in enumerate(pictures):
        ours = colour.adjust_hue(planes(image), torch.tensor([shift]))
        theirs = TF.adjust_hue(Image.fromarray(image), shift)
        assert_near(hwc(ours[0]), theirs, TURN_NOISE if i == 4 else TURN_NATURAL, f"image {i}")
    primaries = np.eye(3, dtype=np.uint8)[None] * 255
    turned = colour.adjust_hue(planes(primaries), torch.tensor([1 / 3]))
    assert np.allclose(hwc(turned[0]), primaries[:, [1, 2, 0]], atol=1e-3)


def test_grey_and_solarize_are_pillows(pictures):
    on = torch.tensor([True])
    for image in pictures:
        pil = Image.fromarray(image)
        assert_near(hwc(colour.to_grey(planes(image), on)[0]), TF.to_grayscale(pil, 3), GREY)
        assert (hwc(colour.solarize(planes(image), on)[0]) == np.asarray(ImageOps.solarize(pil))).all()


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.5, 2.0, 3.3, 9.0])
def test_blur_is_pillows(pictures, sigma):
    for i, image in enumerate(pictures):
        square = np.ascontiguousarray(image[:49, :49])
        ours = blur.gaussian_blur(planes(square), torch.tensor([sigma]))
        assert_near(hwc(ours[0]), Image.fromarray(square).filter(ImageFilter.GaussianBlur(sigma)), BLUR, f"image {i}")


def test_box_radius_gives_the_variance():
    sigma = torch.linspace(0.1, 6, 60, dtype=torch.float64)
    m = blur.blur_matrix(sigma, 101)
    distance = torch.arange(101, dtype=torch.float64) - 50
    assert torch.allclose(m.sum(-1), torch.ones(60, 101), atol=1e-5)
    assert torch.allclose((m[:, 50].double() * distance.square()).sum(-1), sigma.square(), rtol=1e-4)
    assert torch.equal(blur.blur_matrix(torch.zeros(1), 9)[0], torch.eye(9))


def pil_chain(image, p: ColourParams, v: int, i: int):
    """torchvision's transforms on Pillow images with the parameters of view v of image i."""
    out = image
    if p.jitter[v, i]:
        steps = {
            BRIGHTNESS: lambda x: TF.adjust_brightness(x, float(p.brightness[v, i])),
            CONTRAST: lambda x: TF.adjust_contrast(x, float(p.contrast[v, i])),
            SATURATION: lambda x: TF.adjust_saturation(x, float(p.saturation[v, i])),
            HUE: lambda x: TF.adjust_hue(x, float(p.hue[v, i])),
        }
        for op in p.order[v, i].tolist():
            out = steps[op](out)
    if p.grey[v, i]:
        out = TF.to_grayscale(out, 3)
    if p.sigma[v, i] > 0:
        out = out.filter(ImageFilter.GaussianBlur(float(p.sigma[v, i])))
    return ImageOps.solarize(out) if p.solarize[v, i] else out


EVERYTHING = replace(RAW, jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grey=0.2, blur=0.5, solarize=0.2)


@pytest.mark.parametrize("name", RENDERERS)
def test_whole_chain_is_torchvisions(pictures, name):
    """Every order of the jitter, with grey, blur and solarise mixed in."""
    rng = np.random.default_rng(5)
    images = [pictures[i % 4] for i in range(48)]
    boxes = [[crop_box(rng, *im.shape[:2]) for _ in range(2)] for im in images]
    batch = ImageBatch.of(images, boxes, rng.random((48, 2)) < 0.5, pad=3)
    aug = Augmenter((View(crop=Crop(size=40), photometric=EVERYTHING),) * 2, device="cpu", dtype=torch.float32, seed=11)
    p = aug.draws(0, batch.index)
    every = torch.tensor(ORDERS).repeat(2, 1)
    p = replace(p, order=torch.stack((every, every.flip(0))))
    out = RENDERERS[name](batch, aug.plans[0], p).unflatten(0, (2, -1))
    total = 0.0
    for v in range(2):
        for i, im in enumerate(images):
            expected = np.asarray(pil_chain(pil_resize(im, boxes[i][v], 40, "bilinear", batch.flips[i, v]), p, v, i))
            assert_near(hwc(out[v, i]), expected, CHAIN, f"view {v}, image {i}")
            total += np.abs(hwc(out[v, i]) - expected).mean()
    assert total / (2 * len(images)) <= CHAIN_MEAN


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_kernels_equal_the_reference(pictures, interpolation):
    rng = np.random.default_rng(6)
    images = pictures * 6
    boxes = [[crop_box(rng, *im.shape[:2]) for _ in range(3)] for im in images]
    for i, im in enumerate(images):
        boxes[i][2] = center_box(*im.shape[:2], 50, 37)
    batch = ImageBatch.of(images, boxes, rng.random((len(images), 3)) < 0.5, pad=7)
    wild = Photometric(
        jitter=0.9, brightness=1.2, contrast=1.0, saturation=1.0, hue=0.5, grey=0.2, blur=0.7, sigma=(0.1, 9.0), solarize=0.3
    )
    spec = (
        View(crop=Crop(size=37, interpolation=interpolation), photometric=wild),
        View(crop=Crop(size=37), photometric=EVERYTHING),
        View(crop=CenterCrop(size=37, resize=50, interpolation=interpolation), photometric=wild),
    )
    aug = Augmenter(spec, device="cpu", dtype=torch.float32, seed=2)
    p = aug.draws(1, batch.index)
    kernel, reference = (r(batch, aug.plans[0], p) for r in RENDERERS.values())
    std = aug.plans[0].std.repeat_interleave(len(images), 0)[:, :, None, None]
    difference = ((kernel - reference) * std * 255).abs()
    # solarise is discontinuous by one step where a value is within rounding of its threshold
    edge = p.solarize.flatten()[:, None, None, None] & (difference < 1.0 + KERNEL)
    assert (difference[~edge.expand_as(difference)] <= KERNEL).all(), difference.max()
    assert (difference > KERNEL).float().mean() < 1e-4


# ------------------------------------------------------------------------------------------------ draws


def test_draws_follow_the_spec():
    n = 20_000
    spec = byol_asymmetric(size=32)
    p = ColourDraws(spec, device=torch.device("cpu"), seed=3)(4, torch.arange(n) + 17)

    def share(flags, expected):
        assert abs(flags.float().mean().item() - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / n)

    for v, (blurred, solarized) in enumerate([(1.0, 0.0), (0.1, 0.2)]):
        share(p.jitter[v], 0.8)
        share(p.grey[v], 0.2)
        share(p.sigma[v] > 0, blurred)
        share(p.solarize[v], solarized)
        for values, low, high in [
            (p.brightness[v], 0.6, 1.4),
            (p.contrast[v], 0.6, 1.4),
            (p.saturation[v], 0.8, 1.2),
            (p.hue[v], -0.1, 0.1),
            (p.sigma[v][p.sigma[v] > 0], 0.1, 2.0),
        ]:
            assert low <= values.min() and values.max() <= high
            counts = torch.histc(values, 10, low, high)
            assert ((counts - len(values) / 10).abs() <= 4.5 * math.sqrt(len(values) * 0.09)).all()
        codes = (p.order[v] * torch.tensor([64, 16, 4, 1])).sum(-1)
        kinds, counts = codes.unique(return_counts=True)
        assert len(kinds) == 24 and (p.order[v].sort(-1).values == torch.arange(4)).all()
        assert ((counts - n / 24).abs() <= 4.5 * math.sqrt(n / 24)).all()
    # views and parameters are independent of each other
    columns = [p.brightness, p.contrast, p.saturation, p.hue, p.jitter.float(), p.grey.float(), p.order[..., 0].float()]
    correlation = torch.corrcoef(torch.cat(columns)) - torch.eye(2 * len(columns))
    assert correlation.abs().max() < 4.5 / math.sqrt(n)


def test_strong_jitter_never_draws_a_negative_factor():
    spec = (View(photometric=Photometric(jitter=1.0, brightness=1.6, contrast=2.0)),)
    p = ColourDraws(spec, device=torch.device("cpu"), seed=0)(0, torch.arange(4000))
    assert 0 <= p.brightness.min() < 0.01 and 2.59 < p.brightness.max() <= 2.6
    assert 0 <= p.contrast.min() < 0.01 and p.jitter.all()


# ------------------------------------------------------------------------------------------------ Augmenter


@pytest.fixture(scope="module")
def batch_of(pictures):
    """batch_of(ids, epoch): the same image, boxes and flips for an id in every batch."""

    def build(ids, epoch=0, views=2):
        images = [pictures[i % 4] for i in ids]
        draws = [np.random.default_rng(i) for i in ids]
        boxes = [[crop_box(rng, *im.shape[:2]) for _ in range(views)] for rng, im in zip(draws, images, strict=True)]
        return ImageBatch.of(images, boxes, np.array([rng.random(views) < 0.5 for rng in draws]), pad=len(ids) % 5, index=ids, epoch=epoch)

    return build


@pytest.mark.parametrize("renderer", RENDERERS)
def test_result_depends_on_seed_epoch_and_sample_only(batch_of, renderer):
    def views_of(batch, seed=0):
        aug = Augmenter(byol_asymmetric(size=32), device="cpu", dtype=torch.float32, seed=seed)
        aug.render = RENDERERS[renderer]
        return torch.stack(aug(batch).per_view(), 1)

    ids = [5, 9, 2, 40, 11, 3]
    whole = views_of(batch_of(ids))
    for subset in ([2], [40, 5], ids[::-1]):
        again = views_of(batch_of(subset))
        expected = whole[[ids.index(i) for i in subset]]
        if renderer == "kernel":
            assert torch.equal(again, expected)
        else:
            assert torch.allclose(again, expected, atol=1e-4)
    assert not torch.allclose(views_of(batch_of(ids, epoch=1)), whole, atol=0.1)
    assert not torch.allclose(views_of(batch_of(ids), seed=1), whole, atol=0.1)


def test_number_of_threads_does_not_change_the_result(batch_of):
    aug = Augmenter(byol_asymmetric(size=32), device="cpu", dtype=torch.float32, seed=0)
    batch, before = batch_of(range(8)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = aug(batch).groups[0].pixels
        torch.set_num_threads(2)
        assert torch.equal(aug(batch).groups[0].pixels, one)
    finally:
        torch.set_num_threads(before)


def test_no_second_compilation(pictures):
    """A batch's slices, strides and neutral parameters must not be a new type for numba: that costs seconds in mid-run."""
    aug = Augmenter(byol_asymmetric(size=16), device="cpu", dtype=torch.float32, seed=0)
    images = pictures * 2
    boxes = [[crop_box(np.random.default_rng(i), *im.shape[:2]) for _ in range(2)] for i, im in enumerate(images)]
    batch = ImageBatch.of(images, boxes)
    aug(batch)
    before = len(cpu._render.signatures)
    every_other = replace(
        batch,
        **{f: getattr(batch, f)[::2] for f in ("offset", "height", "width", "pitch", "index", "boxes", "flips")},
    )
    aug(every_other)
    Augmenter(center_crop(size=16, resize=20), device="cpu", dtype=torch.float32, seed=0)(every_other)
    assert before == len(cpu._render.signatures)


def test_groups_order_layout_and_normalisation(batch_of):
    """Groups in the declared order, view-major pixels, what the batch knows handed on."""
    red = Photometric(mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 0.1))
    spec = (
        View(crop=Crop(size=16)),
        View(crop=Crop(size=16), photometric=red),
        View(crop=Crop(size=16), separate=True),
        View(crop=Crop(size=8), photometric=red),
    )
    batch = batch_of([4, 8, 1], views=4)
    batch.label = torch.tensor([1, 0, 2])
    views = Augmenter(spec, device="cpu", dtype=torch.bfloat16, seed=0)(batch)
    assert [(g.size, g.views, tuple(g.pixels.shape)) for g in views.groups] == [
        (16, (0, 1), (6, 3, 16, 16)),
        (16, (2,), (3, 3, 16, 16)),
        (8, (3,), (3, 3, 8, 8)),
    ]
    assert all(g.pixels.dtype == torch.bfloat16 and g.pixels.is_contiguous(memory_format=torch.channels_last) for g in views.groups)
    assert views.boxes is batch.boxes and views.flips is batch.flips and views.label is batch.label and views.index is batch.index
    assert views.source_hw.tolist() == [[im.shape[0], im.shape[1]] for im in (batch.image(i) for i in range(3))]
    plain = Augmenter(spec, device="cpu", dtype=torch.float64, seed=0, channels_last=False)(batch)
    assert all(g.pixels.dtype == torch.float64 and g.pixels.is_contiguous() for g in plain.groups)
    for v, x in enumerate(plain.per_view()):
        photo = spec[v].photometric
        for i in range(3):
            box = [int(t) for t in batch.boxes[i, v]]
            crop = pil_resize(batch.image(i).numpy(), box, spec[v].crop.size, "bilinear", batch.flips[i, v])
            expected = TF.normalize(TF.to_tensor(crop), photo.mean, photo.std)
            assert (x[i] - expected).abs().max() <= 1.01 / (255 * min(photo.std))


def test_evaluation_view_is_only_resized_and_normalised(pictures):
    boxes = [[center_box(*im.shape[:2], 64, 56)] for im in pictures]
    spec = center_crop(size=56, resize=64)
    out = Augmenter(spec, device="cpu", dtype=torch.float32, seed=0)(ImageBatch.of(pictures, boxes)).groups[0].pixels
    for i, im in enumerate(pictures):
        pil = TF.center_crop(TF.resize(Image.fromarray(im), 64, InterpolationMode.BILINEAR), [56, 56])
        expected = TF.normalize(TF.to_tensor(pil), spec[0].photometric.mean, spec[0].photometric.std)
        assert (out[i] - expected).abs().max() <= 1.01 / (255 * 0.224)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.skipif(torch.__version__.startswith("2.7."), reason="what torch 2.7 compiles of it for a CPU crashes; only GPUs compile it")
def test_colour_chain_compiles_whole(batch_of):
    """One graph without a break, the same numbers, no second compilation for another batch of that shape."""
    spec = (View(crop=Crop(size=12), photometric=EVERYTHING),) * 2
    aug = Augmenter(spec, device="cpu", dtype=torch.float32, seed=0)
    compiled = torch.compile(augmenter.photometric, fullgraph=True, dynamic=False)
    for step, ids in enumerate([(0, 1, 2, 3), (10, 11, 12, 13)]):
        batch = batch_of(ids)
        p = aug.draws(0, batch.index)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert torch.allclose(augmenter.render(batch, aug.plans[0], p, compiled), cpu.render(batch, aug.plans[0], p), atol=1e-2)
