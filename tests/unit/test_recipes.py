"""The recipes against the papers' tables, and what is drawn for them: distributions and independence over views, epochs and ranks."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import kstwobign, norm

from fastssl.augment.draws import ColourDraws
from fastssl.recipes import RECIPES, dino, obow, swav
from fastssl.views import CenterCrop, Crop, PatchCrop, View, groups
from loaders.geometry import Geometry
from loaders.order import Order

GOLDEN = Path(os.environ.get("FASTSSL_GOLDEN") or Path(__file__).parents[1] / "golden" / "data") / "dino_aug_ops_1.npz"

# Colours: probability of the jitter, its brightness, contrast, saturation, hue; probabilities of grey, blur, solarise.
A = (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 1.0, 0.0)
B = (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0.1, 0.2)
LOCAL = (0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0.5, 0.0)
MOCO = (0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.5, 0.0)
SIMCLR = (0.8, 0.8, 0.8, 0.8, 0.2, 0.2, 0.5, 0.0)
OBOW = (0.8, 0.4, 0.4, 0.4, 0.4, 0.2, 0.5, 0.0)
OBOW_PATCHES = (0.8, 0.4, 0.4, 0.4, 0.4, 0.2, 0.0, 0.0)
STL10 = (1.0, 0.4, 0.4, 0.4, 0.4, 0.2, 0.0, 0.0)
STL10_BLUR = (1.0, 0.4, 0.4, 0.4, 0.4, 0.2, 0.5, 0.0)
QUAD_1 = (0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.5, 0.5)
QUAD_2 = (0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.1, 0.2)
NONE = (0.0,) * 8

ASYMMETRIC = [(1, 224, 0.2, 1, "bilinear", 0.5, A), (1, 224, 0.2, 1, "bilinear", 0.5, B)]
WIDE = [(1, 224, 0.08, 1, "bilinear", 0.5, A), (1, 224, 0.08, 1, "bilinear", 0.5, B)]
VICREG = [(1, 224, 0.08, 1, "bicubic", 0.5, A), (1, 224, 0.08, 1, "bicubic", 0.5, B)]


def multicrop(split_low, split_high, local_crops):
    """The DINO family's table; SERE's and iBOT's alike."""
    wide, narrow = (224, split_high, 1, "bicubic", 0.5), (96, 0.05, split_low, "bicubic", 0.5)
    return [(1, *wide, A), (1, *wide, B), (local_crops, *narrow, LOCAL)]


# name -> rows: views, size, smallest and largest area ("resize", shorter side for a centre crop), filter, flip, colours.
TABLE = {
    "byol": ASYMMETRIC,
    "lewel": ASYMMETRIC,
    "mocov3": ASYMMETRIC,
    "mocov3_vit": WIDE,
    "mocov2": [(2, 224, 0.2, 1, "bilinear", 0.5, MOCO)],
    "lewel_m": [(2, 224, 0.2, 1, "bilinear", 0.5, MOCO)],
    "sfrik": VICREG,
    "vicreg": VICREG,
    "simclr": [(2, 224, 0.08, 1, "bicubic", 0.5, SIMCLR)],
    "auh": [(2, 64, 0.08, 1, "bicubic", 0.5, STL10)],
    "obow": [
        (1, 224, "resize", 256, "bilinear", 0.5, NONE),
        (2, 160, 0.08, 0.6, "bilinear", 0.5, OBOW),
        (1, 256, 0.6, 1, "bilinear", 0.5, OBOW_PATCHES),
    ],
    "obow_stl10": [
        (1, 96, "resize", 96, "bilinear", 0.5, NONE),
        (2, 64, 0.08, 0.6, "bilinear", 0.5, STL10_BLUR),
        (1, 96, 0.6, 1, "bilinear", 0.5, STL10),
    ],
    "swav": [(2, 224, 0.14, 1, "bilinear", 0.5, SIMCLR), (6, 96, 0.05, 0.14, "bilinear", 0.5, SIMCLR)],
    "swav_stl10": [(2, 64, 0.14, 1, "bilinear", 0.5, STL10_BLUR), (6, 32, 0.05, 0.14, "bilinear", 0.5, STL10_BLUR)],
    "dino": multicrop(0.4, 0.4, 8),
    "dino_r50": multicrop(0.14, 0.14, 8),
    "ibot": multicrop(0.25, 0.25, 10),
    "ibot_vitb": multicrop(0.32, 0.32, 10),
    "sere": multicrop(0.4, 0.4, 10),
    "sere_vitb": multicrop(0.32, 0.32, 10),
    "scfs": multicrop(0.25, 0.25, 8),
    "w2ssl": [(2, 112, 0.2, 1, "bilinear", 0.5, A), (2, 112, 0.2, 1, "bilinear", 0.5, B)],
    "w2ssl_windows": [(2, 112, 0.2, 1, "bilinear", 0.5, A), (1, 224, 0.2, 1, "bilinear", 0.5, B)],
    "w2ssl_quad": [(4, 112, 0.2, 1, "bilinear", 0.5, QUAD_1), (4, 112, 0.2, 1, "bilinear", 0.5, QUAD_2)],
    "eval": [(1, 224, "resize", 256, "bilinear", 0.0, NONE)],
    "eval_bicubic": [(1, 224, "resize", 256, "bicubic", 0.0, NONE)],
    "eval_stl10": [(1, 96, "resize", 96, "bilinear", 0.0, NONE)],
    "linear_train": [(1, 224, 0.08, 1, "bilinear", 0.5, NONE)],
    "finetune": [(1, 224, 0.08, 1, "bicubic", 0.5, NONE)],
}
ON_STL10 = ("auh", "obow_stl10", "swav_stl10", "eval_stl10")
GROUPS = {"obow": (1, 2, 1), "obow_stl10": (1, 2, 1), "w2ssl": (2, 2), "w2ssl_quad": (4, 4)}
"""Views of each group where the sizes do not say it."""


def row(view: View) -> tuple:
    """A view in the table's terms, without the number of views."""
    crop, p = view.crop, view.photometric
    area = ("resize", crop.resize) if isinstance(crop, CenterCrop) else crop.scale
    colours = (p.jitter, p.brightness, p.contrast, p.saturation, p.hue, p.grey, p.blur, p.solarize)
    return (crop.size, *area, crop.interpolation, crop.flip, colours)


def expected_rows(name: str) -> list[tuple]:
    return [tuple(rest) for views, *rest in TABLE[name] for _ in range(views)]


def test_every_recipe_has_its_table():
    assert list(RECIPES) == list(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_recipes_are_the_published_ones(name):
    spec = RECIPES[name]()
    assert [row(view) for view in spec] == expected_rows(name)
    stl10 = ((0.441, 0.428, 0.387), (0.268, 0.261, 0.269))
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for view in spec:
        assert (view.photometric.mean, view.photometric.std) == (stl10 if name in ON_STL10 else imagenet)
        if view.photometric.blur:
            assert view.photometric.sigma == (0.1, 2.0)
        if isinstance(view.crop, Crop):
            assert view.crop.ratio == (3 / 4, 4 / 3)
    counts = GROUPS.get(name) or tuple(views for views, size in merged(name))
    assert [len(g) for g in groups(spec)] == list(counts)
    assert [v for g in groups(spec) for v in g] == list(range(len(spec)))


def merged(name: str) -> list[list[int]]:
    """[views, size] of rows, those of equal size that follow each other as one."""
    out = []
    for views, size, *_ in TABLE[name]:
        if out and out[-1][1] == size:
            out[-1][0] += views
        else:
            out.append([views, size])
    return out


def test_parts_of_w2ssl():
    """[t1(L), t1(R), t2(L), t2(R)]; quadrants by column, then by row: c = 0.3 of a side from the middle, so 80 % of it in all."""
    low, high = (-1.0, 0.3), (-0.3, 1.0)

    def sides(name):
        crops = [view.crop for view in RECIPES[name]()]
        assert {c.region_from for c in crops} == {"middle"}
        return [((c.region[0], c.region[2]), (c.region[1], c.region[3])) for c in crops]

    assert sides("w2ssl") == [((-1.0, 1.0), low), ((-1.0, 1.0), high)] * 2
    assert sides("w2ssl_quad") == [(low, low), (high, low), (low, high), (high, high)] * 2


def test_patches_of_obow():
    crop, small = (RECIPES[name]()[-1].crop for name in ("obow", "obow_stl10"))
    assert isinstance(crop, PatchCrop) and isinstance(small, PatchCrop)
    assert (crop.patch_size, crop.patches, crop.patch_jitter) == (96, 5, 24)
    assert (small.patches, small.patch_jitter) == (5, 24)
    assert not any(isinstance(view.crop, PatchCrop) for view in obow(patches=0)) and len(obow(patches=0)) == 3


def test_groups_of_patches_and_equal_sizes():
    patched = View(crop=PatchCrop(size=160))
    crop = View(crop=Crop(size=160))
    assert groups((crop, crop, patched, patched, crop)) == ((0, 1), (2,), (3,), (4,))
    # the original is a group of its own even when the crops have its size
    assert groups(obow(crop_size=224)) == ((0,), (1, 2), (3,))
    assert groups(swav(counts=(2, 2, 1), sizes=(64, 48, 48), scales=((0.2, 1.0),) * 3)) == ((0, 1), (2, 3, 4))
    assert groups(dino(local_crops=0)) == ((0, 1),)


# ------------------------------------------------------------------------------------------------ distributions

SIGMAS = 4.5
"""Standard deviations by which a share may be off: once in 150,000 shares by chance, and the seeds are fixed."""


def assert_share(happened, probability, what):
    """Mean of 0/1 values against a probability."""
    share = float(np.mean(happened))
    assert abs(share - probability) <= SIGMAS * math.sqrt(probability * (1 - probability) / len(happened)), (what, share, probability)


def assert_uniform(values, low, high, what):
    """Kolmogorov-Smirnov against U(low, high), p = 1e-5."""
    x = (np.sort(values) - low) / (high - low)
    steps = np.arange(len(x) + 1) / len(x)
    distance = max(np.abs(x - steps[1:]).max(), np.abs(x - steps[:-1]).max())
    assert distance * math.sqrt(len(x)) < kstwobign.isf(1e-5), (what, distance)


PARAMETERS = ("jitter", "brightness", "contrast", "saturation", "hue", "grey", "sigma", "solarize")
"""Fields of ColourParams with one number per crop."""


@pytest.fixture(scope="module")
def ranks():
    """Sample ids of a whole epoch's batch on each of two ranks: [2, N]."""
    order = Order(2 * 4096, 2 * 4096, seed=7)
    return np.stack([order.ids(0, rank, 2) for rank in range(2)])


@pytest.mark.parametrize("name", TABLE)
def test_draws_have_the_published_distributions(name, ranks):
    """Every view of the recipe, over two epochs and two ranks together and each rank and epoch alone for the probabilities."""
    spec = RECIPES[name]()
    colours, geometry = ColourDraws(spec, device=torch.device("cpu"), seed=7), Geometry(spec, seed=7)
    sides = np.full((2, ranks.shape[1]), ((375,), (500,)), np.int32)
    drawn, flips = [], []
    for epoch in range(2):
        for ids in ranks:
            drawn.append(colours(epoch, torch.from_numpy(ids)))
            flips.append(geometry.draw(ids, epoch, *sides)[1])
    for v, (*_, flip, (jitter, brightness, contrast, saturation, hue, grey, blur, solarize)) in enumerate(expected_rows(name)):
        of_view = [{f: getattr(p, f)[v].numpy() for f in PARAMETERS} | {"flip": f[:, v]} for p, f in zip(drawn, flips, strict=True)]
        together = {f: np.concatenate([part[f] for part in of_view]) for f in of_view[0]}
        probabilities = {"jitter": jitter, "grey": grey, "blur": blur, "solarize": solarize, "flip": flip}
        for part in [*of_view, together]:
            part["blur"] = part["sigma"] > 0
            for what, probability in probabilities.items():
                assert_share(part[what], probability, (v, what))
        for what, strength in {"brightness": brightness, "contrast": contrast, "saturation": saturation}.items():
            if strength:
                assert_uniform(together[what], 1 - strength, 1 + strength, (v, what))
        if hue:
            assert_uniform(together["hue"], -hue, hue, (v, "hue"))
        if blur:
            assert_uniform(together["sigma"][together["blur"]], 0.1, 2.0, (v, "sigma"))


# ------------------------------------------------------------------------------------------------ independence

# What the draws of one view have in common: sides and place of its box, the places of its jitter operations.
FAMILY = {"area": "box", "ratio": "box", "top": "box", "left": "box", "first": "order", "last": "order"}


def draw_columns(spec, ids, epoch, seed=7) -> dict[tuple, np.ndarray]:
    """(view, name) -> what was drawn for each sample [N]; what a view never varies is left out."""
    p = ColourDraws(spec, device=torch.device("cpu"), seed=seed)(epoch, torch.from_numpy(ids))
    boxes, flips = Geometry(spec, seed).draw(ids, epoch, *np.full((2, len(ids)), ((375,), (500,)), np.int32))
    out = {}
    for v in range(len(spec)):
        top, left, h, w = boxes[:, v].T.astype(np.float64)
        out |= {(v, f): getattr(p, f)[v].double().numpy() for f in PARAMETERS}
        out |= {(v, "first"): p.order[v, :, 0].numpy(), (v, "last"): p.order[v, :, 3].numpy(), (v, "flip"): flips[:, v]}
        out |= {(v, "area"): h * w, (v, "ratio"): w / h, (v, "top"): top, (v, "left"): left}
    return {key: column for key, column in out.items() if np.ptp(column.astype(np.float64)) > 0}


def indicators(column: np.ndarray) -> np.ndarray:
    """[N] -> float32 [N, bins], standardised: which value it has, or which quarter of many values it is in.

    For independent columns the mean of the product of two such indicators has variance 1 / N.
    """
    values, bins = np.unique(column, return_inverse=True)
    if len(values) > 4:
        bins = np.searchsorted(np.unique(np.quantile(column, (0.25, 0.5, 0.75))), column)
    one_hot = (bins[:, None] == np.unique(bins)).astype(np.float32)
    return (one_hot - one_hot.mean(0)) / one_hot.std(0)


def most_dependent(columns: dict[tuple, np.ndarray]) -> tuple[float, tuple]:
    """(source, view, name) -> column [N] ... -> the largest dependence of two columns that should have none, and which they are.

    In units of what so many independent pairs exceed once in 1000 sets.
    """
    names, families, blocks = [], [], []
    for (source, v, name), column in columns.items():
        blocks.append(indicators(column))
        width = blocks[-1].shape[1]
        names += [(source, v, name)] * width
        families += [f"{source} {v} {FAMILY.get(name, name)}"] * width
    x = np.concatenate(blocks, 1)
    _, family = np.unique(families, return_inverse=True)
    deviation = np.where(family[:, None] == family, 0, np.abs(x.T @ x) / math.sqrt(len(x)))
    i, j = np.unravel_index(np.argmax(deviation), deviation.shape)
    return deviation[i, j] / norm.isf(1e-3 / len(family) ** 2), (names[i], names[j])


def test_draws_are_independent(ranks):
    """Between views, epochs, the samples of two ranks at one step, neighbouring samples, and seeds; and within a view."""
    spec = dino(local_crops=2)
    first, second = ranks
    sources = {
        "here": draw_columns(spec, first, 0),
        "next epoch": draw_columns(spec, first, 1),
        "other rank": draw_columns(spec, second, 0),
        "neighbour": draw_columns(spec, first + 1, 0),
        "other seed": draw_columns(spec, first, 0, seed=8),
    }
    columns = {(source, *key): column for source, drawn in sources.items() for key, column in drawn.items()}
    assert len(columns) > 5 * 4 * 12
    dependence, pair = most_dependent(columns)
    assert dependence < 1, (pair, dependence)
    # the measure sees a weak and crooked dependence
    crooked = np.abs(columns["here", 0, "brightness"] - 1) + np.random.default_rng(0).uniform(0, 1.5, len(first))
    dependence, pair = most_dependent({**columns, ("crooked", 0, "brightness"): crooked})
    assert dependence > 1 and pair == (("here", 0, "brightness"), ("crooked", 0, "brightness"))


# ------------------------------------------------------------------------------------------------ crops, as the authors' code cuts


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"needs {GOLDEN.name}")
@pytest.mark.parametrize(
    ("golden", "recipe", "views"),
    [
        ("global_0.25_1", "ibot", (0, 1)),
        ("local_0.05_0.25", "scfs", (2, 9)),
        ("global_0.4_1", "dino", (0, 1)),
        ("local_0.05_0.4", "sere", (2, 11)),
        ("local_0.05_0.14", "dino_r50", (2, 9)),
    ],
)
def test_crops_are_distributed_as_dinos(golden, recipe, views, ranks):
    """Quantiles of area and log ratio over 4000 draws of the authors' code on a 500 x 375 image."""
    arrays = np.load(GOLDEN)
    geometry = Geometry(RECIPES[recipe](), seed=7)
    sides = np.full((2, ranks.shape[1]), ((375,), (500,)), np.int32)
    for v, ids, epoch in zip(views, ranks, (0, 5), strict=True):
        _, _, h, w = geometry.draw(ids, epoch, *sides)[0][:, v].T.astype(np.float64)
        for what, values, tolerance in (("area", h * w / (375 * 500), 0.02), ("logratio", np.log(w / h), 0.03)):
            quantiles = np.quantile(values, np.linspace(0, 1, 21))
            assert np.abs(quantiles - arrays[f"rrc_{golden}_{what}_quantiles"]).max() < tolerance, (what, v)
