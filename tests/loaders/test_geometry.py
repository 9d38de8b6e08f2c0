"""Boxes and flips: torchvision's rules on the same draws, and torchvision's distributions."""

import math

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as F

from fastssl.recipes import W2SSL_HALVES, W2SSL_QUADRANTS, byol_asymmetric, center_crop
from fastssl.rng import CROP
from fastssl.views import CenterCrop, Crop, PatchCrop, View
from loaders.errors import DataError
from loaders.geometry import Geometry
from tests.draws import uniform_numpy

SIZES = [(375, 500), (500, 333), (1, 1), (2, 3), (8, 2000), (2000, 8), (64, 64), (33, 500)]
CROPS = [
    Crop(),
    Crop(scale=(0.2, 1.0)),
    Crop(scale=(0.05, 0.14), size=96, flip=0.3),
    Crop(scale=(0.9, 1.0), ratio=(1.2, 2.0)),
    Crop(region=(0.0, 0.2, 1.0, 1.0), scale=(0.2, 1.0)),
    Crop(region=(0.5, 0.0, 1.0, 0.5)),
]


def reference(crop, height, width, u):
    """RandomResizedCrop.get_params in plain Python, its draws replaced by `u`: flip, top, left, then (area, ratio) of each try."""
    top0, left0, bottom, right = (round(f * n) for f, n in zip(crop.region, (height, width, height, width), strict=True))
    top0, left0 = min(top0, height - 1), min(left0, width - 1)
    height, width = max(1, bottom - top0), max(1, right - left0)
    flip, tries = u[0] < crop.flip, iter(u[3:])
    low, high = (math.log(r) for r in crop.ratio)
    for _ in range(10):
        area = height * width * (crop.scale[0] + (crop.scale[1] - crop.scale[0]) * next(tries))
        ratio = math.exp(low + (high - low) * next(tries))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (top0 + math.floor(u[1] * (height - h + 1)), left0 + math.floor(u[2] * (width - w + 1)), h, w), flip
    if width / height < min(crop.ratio):
        h, w = round(width / min(crop.ratio)), width
    elif width / height > max(crop.ratio):
        h, w = height, round(height * max(crop.ratio))
    else:
        h, w = height, width
    return (top0 + (height - h) // 2, left0 + (width - w) // 2, h, w), flip


def draw(spec, sizes, seed=0, epoch=0, first=0):
    heights, widths = np.array(sizes, np.int32).T.copy()
    return Geometry(spec, seed).draw(np.arange(first, first + len(sizes)), epoch, heights, widths)


def test_boxes_follow_torchvisions_rule_on_the_same_draws():
    spec, sizes, seed, epoch = tuple(View(crop=c) for c in CROPS), SIZES * 40, 11, 3
    boxes, flips = draw(spec, sizes, seed, epoch)
    assert boxes.dtype == np.float32 and boxes.shape == (len(sizes), len(spec), 4)
    fallbacks = 0
    for v, crop in enumerate(CROPS):
        u = uniform_numpy(seed, CROP, epoch, np.arange(len(sizes)), v, 23)
        for b, (height, width) in enumerate(sizes):
            box, flip = reference(crop, height, width, u[b])
            assert (tuple(boxes[b, v]), flips[b, v]) == (box, flip), (crop, height, width)
            fallbacks += (height, width) in ((8, 2000), (2000, 8))
    assert fallbacks


def test_boxes_stay_in_their_region():
    spec = tuple(View(crop=c) for c in CROPS)
    sizes = SIZES * 50
    boxes, _ = draw(spec, sizes)
    for v, crop in enumerate(CROPS):
        for (height, width), (top, left, h, w) in zip(sizes, boxes[:, v], strict=True):
            assert h >= 1 and w >= 1
            assert top >= min(round(crop.region[0] * height), height - 1) and left >= min(round(crop.region[1] * width), width - 1)
            assert top + h <= max(round(crop.region[2] * height), 1) and left + w <= max(round(crop.region[3] * width), 1)


@pytest.mark.parametrize("region", [*W2SSL_HALVES, *W2SSL_QUADRANTS])
def test_regions_may_count_from_the_middle(region):
    """The same draws as in an image that is the strip alone, moved to where the strip lies."""
    for height, width in ((333, 501), (375, 500), (17, 23), (64, 31)):
        edges = [min(max(round(n // 2 + f * n), 0), n) for f, n in zip(region, (height, width, height, width), strict=True)]
        top, left, bottom, right = edges
        boxes, flips = draw((View(crop=Crop(region=region, region_from="middle")),), [(height, width)] * 200)
        alone, alone_flips = draw((View(crop=Crop()),), [(bottom - top, right - left)] * 200)
        np.testing.assert_array_equal(boxes, alone + np.array([top, left, 0, 0], np.float32))
        np.testing.assert_array_equal(flips, alone_flips)


@pytest.mark.parametrize("crop", CROPS[:4])
@pytest.mark.parametrize("size", [(375, 500), (100, 500)])
def test_boxes_are_distributed_as_torchvisions(crop, size):
    n = 3000
    boxes, flips = draw((View(crop=crop),), [size] * n)
    torch.manual_seed(0)
    image = torch.empty(3, *size)
    theirs = np.array([RandomResizedCrop.get_params(image, list(crop.scale), list(crop.ratio)) for _ in range(n)])
    features = {
        "area": lambda t, le, h, w: h * w,
        "ratio": lambda t, le, h, w: w / h,
        "top": lambda t, le, h, w: t,
        "left": lambda t, le, h, w: le,
    }
    for name, feature in features.items():
        ours, expected = np.sort(feature(*boxes[:, 0].T.astype(np.float64))), np.sort(feature(*theirs.T))
        grid = np.union1d(ours, expected)
        distance = np.abs(np.searchsorted(ours, grid, "right") - np.searchsorted(expected, grid, "right")).max() / n
        assert distance < 1.95 * math.sqrt(2 / n), name  # Kolmogorov-Smirnov, p = 0.001
    assert abs(flips.mean() - crop.flip) < 4 * math.sqrt(0.25 / n)


def test_a_box_depends_on_seed_epoch_sample_and_view_only():
    spec = byol_asymmetric()
    boxes, flips = draw(spec, [(375, 500)] * 8)
    alone, alone_flips = draw(spec, [(375, 500)], first=5)
    np.testing.assert_array_equal(alone[0], boxes[5])
    np.testing.assert_array_equal(alone_flips[0], flips[5])
    assert (boxes[:, 0] != boxes[:, 1]).any(axis=1).all()
    for other in (
        draw(spec, [(375, 500)] * 8, seed=1)[0],
        draw(spec, [(375, 500)] * 8, epoch=1)[0],
        draw(spec, [(375, 500)] * 8, first=8)[0],
    ):
        assert (other != boxes).any(axis=2).all()


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (224, 224), (64, 72), (96, 97)])
@pytest.mark.parametrize("shape", [(375, 500), (500, 375), (333, 500), (256, 256), (31, 47), (500, 61), (224, 1000)])
def test_centre_crops_are_what_torchvision_shows(size, resize, shape):
    boxes, flips = draw(center_crop(size=size, resize=resize), [shape])
    # An image whose pixels say where they are, through torchvision's two transforms.
    where = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float64) + 0.5 for n in shape), indexing="ij"))
    shown = F.center_crop(F.resize(where, [resize], antialias=False), [size, size])
    top, left, height, width = boxes[0, 0].astype(np.float64)
    assert not flips.any()
    inner = slice(size // 4, -size // 4)  # at the borders the interpolation repeats pixels
    pixel = (np.arange(size) + 0.5)[inner]
    np.testing.assert_allclose(shown[0, inner, size // 2].numpy(), top + pixel * height / size, atol=1e-3)
    np.testing.assert_allclose(shown[1, size // 2, inner].numpy(), left + pixel * width / size, atol=1e-3)


def test_a_centre_crop_larger_than_the_resized_image_is_refused():
    with pytest.raises(DataError, match="at least 224"):
        Geometry((View(), View(crop=CenterCrop(size=224, resize=200))))


@pytest.mark.parametrize("flip", [0.5, 0.2, 1.0])
def test_a_centre_crop_is_flipped_as_a_crop_is(flip):
    sizes = [(375, 500)] * 500
    (boxes, flips), (_, of_crops) = (draw((View(), View(crop=kind(flip=flip))), sizes) for kind in (CenterCrop, Crop))
    np.testing.assert_array_equal(flips, of_crops)
    assert abs(flips[:, 1].mean() - flip) <= 4 * math.sqrt(flip * (1 - flip) / len(sizes))
    np.testing.assert_array_equal(boxes[:, 1], draw((View(), View(crop=CenterCrop())), sizes)[0][:, 1])


def test_patches_are_cut_from_an_ordinary_crop():
    for ours, expected in zip(*(draw((View(crop=c),), SIZES) for c in (PatchCrop(size=256), Crop(size=256))), strict=True):
        np.testing.assert_array_equal(ours, expected)
